"""How long an image takes on this machine: `python tests/tools/benchmark.py [--against FOLDER]`.

Runs the script over photographs of 1,500 pixels, in a folder and in a catalog whose host answers
after 50 ms, with the flags that make a difference. Prints seconds with the start, milliseconds an
image, and the peak memory of the largest process; then the model alone beside transformers' own.

With --against, another version of this repository (made by `git worktree add`) does the same in
turn with this one. Then the ratio is the median of pairs: above 1.00 this version takes longer.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script

import numpy as np
from conftest import FOLDER_FILE
from models import full_model, transformers
from PIL import Image
from stack import REPO, ImageHost, Stack, photographs

import generate_embeddings as script

NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "china.jpg", "flower.jpg", "rocket.jpg"]
SIDE = 1500  # pixels
LATENCY = 0.05  # seconds until the host of the catalog answers


def jpegs(count):
    """Real photographs as JPEGs, each a file of its own: decoders stop at a JPEG's end."""
    made = []
    for name in NAMES:
        photo = Image.open(io.BytesIO(photographs()[name])).convert("RGB")
        file = io.BytesIO()
        photo = photo.resize([round(side * SIDE / max(photo.size)) for side in photo.size])
        photo.save(file, "JPEG", quality=88)
        made.append(file.getvalue())
    return [made[n % len(made)] + n.to_bytes(4, "big") for n in range(count)]


class Run:
    """One command of one version."""

    def __init__(self, version, *flags, expected=None, new=None, env=None):
        self.command = [sys.executable, version / "generate_embeddings.py", *flags]
        self.expected = expected  # images; None where the command embeds none
        self.new = new  # takes away what the run before it stored
        self.env = os.environ | {"CLIP_MODEL": str(full_model())} | (env or {})
        self.seconds, self.peaks = [], []

    def __call__(self):
        if self.new:
            self.new()
        with tempfile.TemporaryFile("w+") as said:
            began = time.perf_counter()
            process = subprocess.Popen(self.command, env=self.env, stdout=said, stderr=said)
            _, status, usage = os.wait4(process.pid, 0)
            self.seconds.append(time.perf_counter() - began)
            self.peaks.append(usage.ru_maxrss / 1024)
            said.seek(0)
            text = said.read()
        wanted = "" if self.expected is None else f"embedded={self.expected} "
        if status or wanted not in text:
            raise SystemExit(f"{self.command} failed:\n{text[-3000:]}")


def table(title, *columns):
    print(f"\n{title}")
    row("", *columns)


def row(name, *cells):
    print(f"{name:36}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def compare(title, runs, rounds):
    """Prints a table of runs: name -> one Run of each version, this one first."""
    beside = ["s there", "ratio", "peak MB there"]
    columns = ["s", "ms an image", "peak MB", *beside]
    table(title, *columns[: 3 * len(next(iter(runs.values())))])
    for name, (ours, *others) in runs.items():
        for number in range(rounds):
            for run in [ours, *others][:: (1, -1)[number % 2]]:
                run()
        seconds = statistics.median(ours.seconds)
        each = f"{seconds / ours.expected * 1000:.0f}" if ours.expected else ""
        cells = [f"{seconds:.1f}", each, f"{max(ours.peaks):.0f}"]
        for other in others:
            pairs = zip(ours.seconds, other.seconds, strict=True)
            ratio = statistics.median(here / there for here, there in pairs)
            cells += [f"{statistics.median(other.seconds):.1f}", f"{ratio:.3f}"]
            cells += [f"{max(other.peaks):.0f}"]
        row(name, *cells)


def time_folders(versions, count, rounds, more):
    """A folder with so many photographs; each version has one, as the file in it is its own."""
    with ExitStack() as made:
        folders = [Path(made.enter_context(tempfile.TemporaryDirectory())) for _ in versions]
        for folder in folders:
            for number, data in enumerate(jpegs(count)):
                (folder / f"{number:06}.jpg").write_bytes(data)

        def runs(*flags, expected=count, new=True):
            return [
                Run(
                    *(version, "--local", folder, *flags, *more),
                    expected=expected,
                    new=(folder / FOLDER_FILE).unlink if new else None,
                )
                for version, folder in zip(versions, folders, strict=True)
            ]

        for run in runs(new=False):
            run()  # the first one, after which there is a file to be deleted, and all is cached
        chosen = {"--search": runs("--search", "a red mug", expected=None, new=False)}
        chosen["default"] = runs()
        chosen["--limit 10"] = runs("--limit", "10", expected=min(10, count))
        chosen["--batch-size 8"] = runs("--batch-size", "8")
        if script.has_bfloat16():
            half = ["--dtype", "bfloat16"]
            chosen["--dtype bfloat16"] = runs(*half)
            chosen["--dtype bfloat16 --batch-size 8"] = runs(*half, "--batch-size", "8")
        compare(f"A folder of {count} photographs", chosen, rounds)


def time_catalogs(versions, count, rounds, more):
    """A catalog of so many photographs; each version has one, as schema.sql is its own."""
    with ExitStack() as made:
        files = {f"/{number}": data for number, data in enumerate(jpegs(count))}
        host = made.enter_context(ImageHost(files, latency=LATENCY))
        runs = []
        for version in versions:
            stack = made.enter_context(Stack())
            use_schema_of(version, stack)
            stack.add_images(host.urls(count))

            def empty(stack=stack):
                stack.sql("truncate product_embeddings")

            runs.append(Run(version, *more, expected=count, new=empty, env=stack.env()))
        compare(f"A catalog of {count} photographs", {"default": runs}, rounds)


def use_schema_of(version, stack):
    stack.reset(schema=False)
    stack.apply_schema(script=(version / "schema.sql").read_text())
    stack.reload_schema()


def time_model(rounds, device):
    """The model alone: transformers' own classes as they come against ours, on all cores."""
    import torch

    plain = transformers().CLIPVisionModelWithProjection.from_pretrained(full_model()).eval()

    @torch.inference_mode()
    def eager(pixels):
        return plain(pixel_values=torch.from_numpy(pixels)).image_embeds

    lanes, batches = (script.cores(), (1, 8)) if device == "cpu" else (1, (1, 8, 64))
    contenders = {"transformers, float32": (eager, 1, 1)}
    for dtype in ["float32", "bfloat16"][: 1 + (script.has_bfloat16() or device != "cpu")]:
        settings = script.Settings(clip_model=str(full_model()), dtype=dtype, device=device)
        encode = script.ClipEncoder(settings).encode
        contenders |= {f"ours, {dtype}, batches of {n}": (encode, n, lanes) for n in batches}
    times = {name: [] for name in contenders}
    pixels = np.random.default_rng(0).normal(size=(64, 3, 224, 224)).astype(np.float32)
    for _ in range(rounds):
        for name, (encode, batch, at_once) in contenders.items():
            torch.set_num_threads(script.cores() // at_once)
            jobs = [pixels[:batch]] * at_once * 2
            with ThreadPoolExecutor(at_once) as pool:  # new threads: they take that number
                list(pool.map(encode, jobs))  # what oneDNN prepares, it keeps for each thread
                began = time.perf_counter()
                list(pool.map(encode, jobs))
            times[name].append((time.perf_counter() - began) / len(jobs) / batch * 1000)
    table(f"The model alone, {device}", "ms an image")
    for name, values in times.items():
        row(name, f"{statistics.median(values):.1f}")


def main():
    usage = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = usage.add_argument
    add("--images", type=int, default=96, help="in the folder and in the catalog (96)")
    add("--rounds", type=int, default=5, help="runs of each command (5)")
    add("--against", type=Path, metavar="FOLDER", help="another version of this repository")
    add("--device", default="cpu", help="as the script's (cpu)")
    args = usage.parse_args()
    versions = [REPO, args.against.resolve()] if args.against else [REPO]
    more = ["--device", args.device]
    time_folders(versions, args.images, args.rounds, more)
    time_catalogs(versions, args.images, args.rounds, more)
    time_model(args.rounds, args.device)


if __name__ == "__main__":
    main()
