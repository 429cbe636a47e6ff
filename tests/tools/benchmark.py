"""How long an image takes, and where the time goes: `python tests/tools/benchmark.py`.

Starts the real stack and an image host that answers after 100 ms, and prints from one run
    1. the model alone: transformers' own classes as they come (1.00) against ours
    2. where an image's time goes
    3. the whole job: a sequential stand-in ("written in half an hour": requests, transformers'
       processor and model, one upsert each) against the script
    4. the script over the model alone, in turns: with a host 300 ms away and with larger
       photographs, too
Figures are medians; contenders take turns, so that a machine's moods hit all of them. Where
onnxruntime or openvino is installed, the model in them is a line, too (they need onnx and
onnxscript to take it over).
"""

import argparse
import contextlib
import datetime
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script

import numpy as np
import psutil
import torch
from conftest import TUNED
from models import full_model
from PIL import Image
from stack import ImageHost, Stack, photographs

import generate_embeddings as script

EAGER = "transformers, float32"
ALL_CORES = "ours, float32, one image on all cores"
EACH_CORE = "ours, float32, one on each core"  # what the script does
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
    for dtype in ("float32", "bfloat16"):
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


def time_model(run, batch, lanes, repeats=2):
    """Milliseconds per image."""
    pixels = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)
    torch.set_num_threads(script.cores() // lanes)
    with ThreadPoolExecutor(lanes) as pool:  # new threads: they keep that number
        jobs = [pixels[:batch]] * lanes * repeats
        list(pool.map(run, jobs[: 2 * lanes]))  # what oneDNN prepares, it keeps for each thread
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


# ------------------------------------------------------------------ the whole job


def stand_in():
    """The whole job as written in half an hour; settings as the script's, one line per image."""
    import requests
    import supabase
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    client = supabase.create_client(
        os.environ["SUPABASE_URL"], os.environ["SUPABASE_SERVICE_ROLE_KEY"]
    )
    model = CLIPModel.from_pretrained(os.environ["CLIP_MODEL"]).eval()
    processor = CLIPImageProcessorPil()
    for asset in client.table("assets").select("id,image_url").execute().data:
        image = Image.open(io.BytesIO(requests.get(asset["image_url"], timeout=30).content))
        inputs = processor(images=image.convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            vector = model.get_image_features(**inputs).pooler_output[0]
        row = {"asset_id": asset["id"], "embedding": vector.tolist(), "model_version": "x"}
        client.table("product_embeddings").upsert(row, on_conflict="asset_id").execute()
        print(datetime.datetime.now(), "done", flush=True)


WORKERS = min(script.MOST_WORKERS, script.WORKERS_PER_CORE * script.cores())
WAVE = 8 * script.cores()  # images that are done at the same time, with batches of 8
AHEAD = 2 * WORKERS + 2 * WAVE  # images that the script may hold ready for the model


def time_job(stack, command, **settings):
    """Runs a command on an empty table. Returns (ms an image, s to the first one, peak MB).

    An image's time is that of the middle of a run, where for each one that the model takes
    another is loaded: without the start, in which images are got ready while the model loads,
    and without the end, which lives on them.
    """
    stack.sql("truncate product_embeddings")
    began = datetime.datetime.now()
    run = subprocess.run(
        ["/usr/bin/env", "time", "-f", "peak %M", sys.executable, *map(str, command)],
        env=stack.env(CLIP_MODEL=str(full_model()), **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stamps = re.findall(r"^([\d-]+ [\d:]+[.,]\d+) .*\bdone\b", run.stdout, re.MULTILINE)
    if run.returncode or len(stamps) <= AHEAD + WAVE + AHEAD:
        raise SystemExit(f"{command} failed:\n{run.stdout[-3000:]}")
    times = [datetime.datetime.fromisoformat(stamp.replace(",", ".")) for stamp in stamps]
    middle = times[AHEAD + WAVE - 1 : len(times) - AHEAD]
    each = (middle[-1] - middle[0]).total_seconds() / (len(middle) - 1) * 1000
    peak = int(re.search(r"^peak (\d+)", run.stdout, re.MULTILINE)[1]) / 1024
    return each, (times[0] - began).total_seconds(), peak


def median_jobs(stack, commands, rounds):
    """name -> medians of (ms an image, s to the first one, peak MB); in turns."""
    runs = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(time_job(stack, command))
    return {name: [statistics.median(v) for v in zip(*r, strict=True)] for name, r in runs.items()}


def fill(stack, host, photos, count):
    """A catalog over these photographs, of which `count` are timed."""
    numbers = range(AHEAD + WAVE + count + AHEAD)
    host.files = {f"/{number}.jpg": photos[number % len(photos)] for number in numbers}
    stack.sql("truncate assets cascade")
    stack.add_assets((uuid.uuid4(), host.url_of(path), "client") for path in host.files)


def program(folder):
    """The command that runs the script with a line for each image, from a file in the folder."""
    path = Path(folder, "tuned.py")
    path.write_text(TUNED)
    return [path, "LOG_EVERY=1", "--"]


def time_jobs(stack, host, program, count, rounds):
    """Prints the table of the whole job."""
    jobs = {"sequential stand-in": [Path(__file__), "--stand-in"], "script (default)": program}
    for flags in ("--batch-size 8", "--dtype bfloat16", "--dtype bfloat16 --batch-size 8"):
        jobs[f"script, {flags}"] = [*program, *flags.split()]
    fill(stack, host, jpegs(1500), count)
    found = median_jobs(stack, jobs, rounds)
    slowest = found["sequential stand-in"][0]
    table(
        f"Whole job: {count} photographs of 1500 px, host 100 ms away",
        ["", "ms an image", "times as fast", "s to first", "peak MB"],
    )
    for name, (each, first, peak) in found.items():
        row(name, f"{each:.0f}", f"{slowest / each:.1f}", f"{first:.1f}", f"{peak:.0f}")


CASES = {
    "1,500 px, host 100 ms away": ({"longer_side": 1500}, 0.1),
    "1,500 px, host 300 ms away": ({"longer_side": 1500}, 0.3),
    "4 megapixels, host 100 ms away": ({"megapixels": 4}, 0.1),
    "12 megapixels, host 100 ms away": ({"megapixels": 12}, 0.1),
}


def time_of_hosts():
    """Seconds of processor time so far, on each core, of what stands in for other machines: the
    image host and the gateway (in this process), PostgREST and PostgreSQL."""
    here = psutil.Process()
    others = [p for p in psutil.process_iter() if p.name().startswith("postgre")]
    spent = [process.cpu_times() for process in (here, *others)]
    return sum(time.user + time.system for time in spent) / script.cores()


def time_overhead(stack, host, program, models, count, rounds):
    """Prints the whole job's time over that of the model alone, measured right before it."""
    found = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, (photos, latency) in CASES.items():
            alone = [time_model(*models[which], repeats=20) for which in (ALL_CORES, EACH_CORE)]
            fill(stack, host, jpegs(**photos), count)
            host.latency = latency
            before = time_of_hosts()
            each = time_job(stack, program)[0]
            hosts = (time_of_hosts() - before) / len(host.files) * 1000
            found[name].append((each, hosts, *(each / model for model in alone)))
    table(
        "Whole job (default) over the model alone",
        ["", "ms an image", "hosts' part", "over all cores", "over each core"],
    )
    for name, runs in found.items():
        each, hosts, *ratios = (statistics.median(values) for values in zip(*runs, strict=True))
        row(name, f"{each:.0f}", f"{hosts:.1f}", *(f"{ratio:.2f}" for ratio in ratios))


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
                    lambda url: fetcher.fetch(script.Place(url, {})),
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


def main():
    usage = argparse.ArgumentParser(description="Times the model and the whole job.")
    usage.add_argument("--images", type=int, default=128, help="timed in a run, at least (128)")
    usage.add_argument("--rounds", type=int, default=3, help="runs of each contender (3)")
    usage.add_argument("--model", action="store_true", help="time the model alone")
    usage.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)
    args = usage.parse_args()
    if args.stand_in:
        return stand_in()
    count = WAVE * math.ceil(args.images / WAVE)  # else a run's last batches are timed in part
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}")
    models = contenders(full_model())
    time_models(models, 10 * args.rounds)
    if args.model:
        return None
    time_parts(full_model())
    with Stack() as stack, ImageHost(latency=0.1) as host, tempfile.TemporaryDirectory() as folder:
        stack.reset(old_grants=True)  # the stand-in reads and writes tables
        time_jobs(stack, host, program(folder), count, args.rounds)
        time_overhead(stack, host, program(folder), models, count, args.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n(this program itself: {peak:.0f} MB)")
    return None


if __name__ == "__main__":
    main()
