"""How long an image takes, beside what people would do instead: `python tests/tools/benchmark.py`.

Starts the real stack and an image host that answers after 100 ms, and prints from one run
    1. the model alone: transformers' own classes as they come (1.00) against ours
    2. where an image's time goes
    3. a whole catalog in Supabase: a sequential script ("written in half an hour": requests,
       transformers' processor and model, one upsert each), the same with eight downloads at
       once, and ours
    4. a whole folder, from the command's start to its end: ours, fastembed and rclip
Figures are medians; contenders take turns, so that a machine's moods hit all of them. Peak memory
is that of a command's largest process. bfloat16 is left out where the processor has no arithmetic
for it. On 2 cores 1 to 4 take some six minutes, one or two more with the peers.

fastembed and rclip get the same weights, in ONNX; requirements-peers.txt says how to install them,
else they are left out. Not compared, to stay small: transformers.js, which needs Node.js,
sentence-transformers, which runs transformers' model again, and clip-retrieval. Where onnxruntime
or openvino is installed beside the script, the model in them is a line of 1, too (they need onnx
and onnxscript to take it over).
"""

import argparse
import contextlib
import datetime
import functools
import io
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script

import numpy as np
import torch
from models import full_model
from PIL import Image
from stack import ImageHost, Stack, photographs

import generate_embeddings as script

EAGER = "transformers, float32"
SEQUENTIAL = "sequential, libraries' defaults"
PEERS = Path(script.__file__).parent / ".cache" / "peers" / "bin" / "python"
NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "china.jpg", "flower.jpg", "rocket.jpg"]


def jpegs(longer_side=None, megapixels=None):
    """Real photographs as JPEGs of that size: the longer side in pixels, or all of them."""
    made = []
    for name in NAMES:
        photo = Image.open(io.BytesIO(photographs()[name])).convert("RGB")
        scale = (
            math.sqrt(megapixels * 1e6 / (photo.width * photo.height))
            if megapixels
            else longer_side / max(photo.size)
        )
        size = [round(side * scale) for side in photo.size]
        data = io.BytesIO()
        photo.resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=88)
        made.append(data.getvalue())
    return made


def dtypes():
    return ["float32", "bfloat16"] if script.has_bfloat16() else ["float32"]


# ------------------------------------------------------------------ the model alone


def contenders(folder):
    """name -> callable(pixels (n, 3, 224, 224) float32), batch size, and how many at once."""
    from transformers import CLIPVisionModelWithProjection

    plain = CLIPVisionModelWithProjection.from_pretrained(folder).eval()

    @torch.inference_mode()
    def eager(pixels):
        return plain(pixel_values=torch.from_numpy(pixels)).image_embeds

    cores = script.cores()
    made = {EAGER: (eager, 1, 1)}
    for dtype in dtypes():
        ours = script.ClipEncoder(script.Settings(clip_model=str(folder), dtype=dtype)).encode
        made[f"ours, {dtype}, one image on all cores"] = (ours, 1, 1)
        made[f"ours, {dtype}, one on each core"] = (ours, 1, cores)
        made[f"ours, {dtype}, batch 8 on each core"] = (ours, 8, cores)
    torch.set_num_threads(cores)  # ClipEncoder takes one thread for an image
    # in a thread that ends: OpenMP threads left over would make those of the others slower
    with ThreadPoolExecutor(1) as pool:
        return made | pool.submit(exported, plain).result()


def exported(model):
    """The model in onnxruntime and openvino, where they are installed."""
    made = {}
    with contextlib.suppress(ImportError):
        import onnxruntime

        file = io.BytesIO()
        pixels = torch.zeros(1, 3, 224, 224)
        torch.onnx.export(model, (pixels,), file, input_names=["pixel_values"], dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file.getvalue(), options)
        made["onnxruntime, float32"] = (lambda x: session.run(None, {"pixel_values": x}), 1, 1)
    with contextlib.suppress(ImportError):
        import openvino

        compiled = openvino.compile_model(
            openvino.convert_model(model, example_input=torch.zeros(1, 3, 224, 224)),
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32"},
        )
        made["openvino, float32"] = (compiled, 1, 1)
    return made


def time_model(run, batch, lanes):
    """Milliseconds per image."""
    pixels = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)
    torch.set_num_threads(script.cores() // lanes)
    with ThreadPoolExecutor(lanes) as pool:  # new threads: they keep that number
        jobs = [pixels[:batch]] * lanes * 2
        list(pool.map(run, jobs))  # what oneDNN prepares, it keeps for each thread
        began = time.perf_counter()
        list(pool.map(run, jobs))
        seconds = time.perf_counter() - began
    return seconds / batch / len(jobs) * 1000


def time_models(models, rounds):
    """Prints a table of the models alone."""
    times = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(time_model(*model))
    medians = {name: statistics.median(values) for name, values in times.items()}
    table("Model alone", ["", "ms an image", "ratio"])
    for name, median in medians.items():
        row(name, f"{median:.0f}", f"{median / medians[EAGER]:.2f}")


# ------------------------------------------------------------------ a catalog in Supabase


def stand_in(at_once, limit):
    """The whole job as written in half an hour; settings as the script's, one line per image."""
    import requests
    import supabase
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def download(asset):
        return asset, requests.get(asset["image_url"], timeout=30).content

    client = supabase.create_client(
        os.environ["SUPABASE_URL"], os.environ["SUPABASE_SERVICE_ROLE_KEY"]
    )
    model = CLIPModel.from_pretrained(os.environ["CLIP_MODEL"]).eval()
    processor = CLIPImageProcessorPil()
    assets = client.table("assets").select("id,image_url").limit(limit).execute().data
    with ThreadPoolExecutor(at_once) as pool:
        downloads = pool.map(download, assets) if at_once > 1 else map(download, assets)
        for asset, data in downloads:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            inputs = processor(images=image, return_tensors="pt")
            with torch.no_grad():
                vector = model.get_image_features(**inputs).pooler_output[0]
            row = {"asset_id": asset["id"], "embedding": vector.tolist(), "model_version": "x"}
            client.table("product_embeddings").upsert(row, on_conflict="asset_id").execute()
            print(datetime.datetime.now(), "done", flush=True)


class Job(NamedTuple):
    """A command, and how many of the first and of the last images it does are not timed."""

    command: list
    first: int = 1
    last: int = 0


WORKERS = min(script.MOST_WORKERS, script.WORKERS_PER_CORE * script.cores())
WAVE = 8 * script.cores()  # images that are done at the same time, with batches of 8
AHEAD = 2 * WORKERS + 2 * WAVE  # images that the script may hold ready for the model


def our_job(program, flags=()):
    """The script is timed in the middle of a run, where for each image that the model takes
    another is loaded: without the start, in which images are got ready while the model loads,
    and without the end, which lives on them."""
    return Job([*program, *flags], first=AHEAD + WAVE, last=AHEAD)


def timed(command, env):
    """Runs a command. Returns what it printed, and its peak memory in MB."""
    run = subprocess.run(
        ["/usr/bin/env", "time", "-f", "peak %M", *map(str, command)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"{command} failed:\n{run.stdout[-3000:]}")
    return run.stdout, int(re.search(r"^peak (\d+)", run.stdout, re.MULTILINE)[1]) / 1024


def stamps_of(output):
    """The times of the lines that tell of an image done."""
    stamps = re.findall(r"^([\d-]+ [\d:]+[.,]\d+) .*\bdone\b", output, re.MULTILINE)
    return [datetime.datetime.fromisoformat(stamp.replace(",", ".")) for stamp in stamps]


def time_job(stack, job):
    """Runs a job on an empty table. Returns (ms an image, s to the first one, peak MB)."""
    stack.sql("truncate product_embeddings")
    began = datetime.datetime.now()
    output, peak = timed([sys.executable, *job.command], stack.env(CLIP_MODEL=str(full_model())))
    times = stamps_of(output)
    middle = times[job.first - 1 : len(times) - job.last]
    if len(middle) < 2:
        raise SystemExit(f"{job.command} did too few images:\n{output[-3000:]}")
    each = (middle[-1] - middle[0]).total_seconds() / (len(middle) - 1) * 1000
    return each, (times[0] - began).total_seconds(), peak


def in_turns(contenders, rounds):
    """name -> medians of what each of these callables returns; they take turns."""
    runs = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            runs[name].append(run())
    return {name: [statistics.median(v) for v in zip(*r, strict=True)] for name, r in runs.items()}


def fill(stack, host, photos, count):
    """A catalog over these photographs, of which `count` are timed."""
    numbers = range(AHEAD + WAVE + count + AHEAD)
    host.files = {f"/{number}.jpg": photos[number % len(photos)] for number in numbers}
    stack.sql("truncate assets cascade")
    stack.add_assets((uuid.uuid4(), host.url_of(path), "client") for path in host.files)


# The script with a line of its log for each image embedded
EACH_SAID = f"""
import os, sys
sys.path.insert(0, {str(Path(script.__file__).parent)!r})
import generate_embeddings as script
if __name__ == "__main__":  # the decoders' processes import this file, too
    script.Progress.LINE_SECONDS = 0.0
    code = script.main()
    sys.stdout.flush()
    os._exit(code)  # as the script itself
"""


def program(folder):
    """The command that runs that, from a file in the folder."""
    path = Path(folder, "each_said.py")
    path.write_text(EACH_SAID)
    return [path]


def our_flags():
    """What a user may add to the command, as lists of flags."""
    for dtype in dtypes():
        for batch in (1, 8):
            flags = []
            if dtype != "float32":
                flags += ["--dtype", dtype]
            if batch != 1:
                flags += ["--batch-size", str(batch)]
            yield flags


def time_jobs(stack, host, program, count, rounds):
    """Prints the table of a catalog in Supabase."""
    here = Path(__file__)
    jobs = {
        SEQUENTIAL: Job([here, "--stand-in=1", f"--images={count + 1}"]),
        "the same, 8 downloads at once": Job([here, "--stand-in=8", f"--images={count + 1}"]),
    }
    for flags in our_flags():
        jobs[" ".join(["script", *flags])] = our_job(program, flags)
    fill(stack, host, jpegs(1500), count)
    runs = {name: functools.partial(time_job, stack, job) for name, job in jobs.items()}
    found = in_turns(runs, rounds)
    slowest = found[SEQUENTIAL][0]
    table(
        f"Catalog in Supabase: {count} photographs of 1500 px, host 100 ms away, without the start",
        ["", "ms an image", "times as fast", "s to first", "peak MB"],
    )
    for name, (each, first, peak) in found.items():
        row(name, f"{each:.0f}", f"{slowest / each:.1f}", f"{first:.1f}", f"{peak:.0f}")


# ------------------------------------------------------------------ a folder


def time_folder(command, count, env, photos):
    """Runs a command over a folder for the first time. Returns (ms an image, peak MB)."""
    Path(photos, script.FolderStore.FILE).unlink(missing_ok=True)
    began = time.perf_counter()
    output, peak = timed(command, env)
    seconds = time.perf_counter() - began
    if f"embedded={count}" not in output:
        raise SystemExit(f"{command} did not embed {count} images:\n{output[-3000:]}")
    return seconds / count * 1000, peak


def time_folders(count, rounds, peers):
    """Prints the table of a folder. `peers` is the Python that has them, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        made = jpegs(1500)
        for number in range(count):
            # no two alike, as rclip embeds equal files once; decoders stop at a JPEG's end
            data = made[number % len(made)] + number.to_bytes(4, "big")
            Path(photos, f"{number:06}.jpg").write_bytes(data)
        ours = [sys.executable, Path(script.__file__), "--local", photos]
        commands = {" ".join(["script", *flags]): [*ours, *flags] for flags in our_flags()}
        if peers:
            program = [peers, Path(__file__).with_name("peers.py")]
            onnx = Path(folder, "onnx")
            onnx.mkdir()
            timed([*program, "export", full_model(), onnx], os.environ)
            commands["fastembed"] = [*program, "fastembed", onnx, photos]
            commands["fastembed, a process a core"] = [*program, "fastembed-parallel", onnx, photos]
            commands["rclip at 224 px"] = [*program, "rclip", onnx, photos]
        env = os.environ | {"CLIP_MODEL": str(full_model())}
        runs = {
            name: functools.partial(time_folder, command, count, env, photos)
            for name, command in commands.items()
        }
        found = in_turns(runs, rounds)
    default = found["script"][0]
    table(
        f"Folder of {count} photographs of 1500 px, with the start",
        ["", "ms an image", "over default", "peak MB"],
    )
    for name, (each, peak) in found.items():
        row(name, f"{each:.0f}", f"{each / default:.2f}", f"{peak:.0f}")
    if not peers:
        print("(fastembed and rclip: requirements-peers.txt says how to have them here)")


def time_parts(folder):
    """Prints where an image's time goes, one part at a time, one thread."""
    encode = script.ClipEncoder(script.Settings(clip_model=str(folder))).encode
    decoder = script.Decoder()
    with ImageHost() as host:
        fetcher = script.Fetcher(script.Settings(private_hosts=True))
        table("Where an image's time goes, ms", ["", "fetch", "decode", "normalise", "model"])
        for name, photos in (
            ("1,500 px", jpegs(1500)),
            ("4 megapixels", jpegs(megapixels=4)),
            ("12 megapixels", jpegs(megapixels=12)),
        ):
            host.files = {f"/{n}.jpg": data for n, data in enumerate(photos)}
            times = []
            for path in [*host.files] * 3:
                steps = (
                    lambda url: fetcher.fetch(script.Source(url, {}), script.Deadline(30)).data,
                    decoder.decode,
                    lambda levels: script.normalise(levels)[None],
                    encode,
                )
                given, stamps = host.url_of(path), [time.perf_counter()]
                for step in steps:
                    given = step(given)
                    stamps.append(time.perf_counter())
                times.append(np.diff(stamps) * 1000)
            row(name, *(f"{part:.1f}" for part in np.median(times, axis=0)))


def table(title, columns):
    print(f"\n{title}")
    row(*columns)


def row(name, *cells):
    print(f"{name:40}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def instructions():
    """Which of the processor's instructions make a difference for the model."""
    able = torch.cpu.get_capabilities()
    names = {"AMX": "amx_tile", "avx512_bf16": "avx512_bf16", "AVX-512": "avx512_f"}
    return ", ".join(
        f"with {name}" if able.get(key) is True else f"without {name}"
        for name, key in names.items()
    )


def main():
    usage = argparse.ArgumentParser(description="Times the model and the whole job.")
    usage.add_argument(
        "--images", type=int, default=96, help="in the folder; a catalog's half (96)"
    )
    usage.add_argument("--rounds", type=int, default=3, help="runs of each contender (3)")
    usage.add_argument("--model", action="store_true", help="time the model alone")
    usage.add_argument(
        "--peers", type=Path, default=PEERS, metavar="PYTHON", help="that has fastembed and rclip"
    )
    usage.add_argument("--stand-in", type=int, metavar="AT_ONCE", help=argparse.SUPPRESS)
    args = usage.parse_args()
    if args.stand_in:
        return stand_in(args.stand_in, args.images)
    count = WAVE * math.ceil(args.images / 2 / WAVE)  # else last batches are timed in part
    print(f"{processor()}, {instructions()}")
    print(f"{script.cores()} cores, torch {torch.__version__}, {platform.system()}")
    models = contenders(full_model())
    time_models(models, 2 * args.rounds)
    if args.model:
        return None
    time_parts(full_model())
    with Stack() as stack, ImageHost(latency=0.1) as host, tempfile.TemporaryDirectory() as folder:
        stack.reset(old_grants=True)  # the stand-in reads and writes tables
        time_jobs(stack, host, program(folder), count, args.rounds)
    time_folders(args.images, args.rounds, args.peers if args.peers.exists() else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n(this program itself: {peak:.0f} MB)")
    return None


if __name__ == "__main__":
    main()
