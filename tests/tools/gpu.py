"""Measures the model on a GPU: images a second, agreement with the CPU, where the time goes.

    python tests/tools/gpu.py [--images 2000] [--device cuda] [--seconds 20]

Needs torch, transformers (for a model with random weights, 605 MB in .cache) and the script's own
packages; nothing is downloaded. Takes about four minutes on a data centre's GPU. The pixels are
those of photographs, if scikit-image is there, cropped and turned in many ways, else noise.
"""

import argparse
import importlib.util
import sys
import time
import types
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
NEEDED = ("torch", "numpy", "transformers", "tokenizers", "PIL", "requests", "urllib3", "tqdm")
BATCHES = (1, 8, 32, 64)
DTYPES = ("float32", "bfloat16")
COMPARED = 200  # images that the CPU embeds as well
PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket", "chelsea", "immunohistochemistry", "retina")


def check_packages():
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"missing here: {', '.join(missing)}")
    if importlib.util.find_spec("dotenv") is None:
        sys.modules["dotenv"] = types.ModuleType(
            "dotenv"
        )  # reads settings, of which there are none


def make_pixels(count):
    """Pixels of photographs, (count, 3, 224, 224) float32, no two alike."""
    import numpy as np
    from PIL import Image

    import generate_embeddings as script

    rng = np.random.default_rng(0)
    photographs = load_photographs()
    print(f"pixels: {count} crops of {len(photographs)} photographs")
    made = np.empty((count, 3, script.SIDE, script.SIDE), np.float32)
    for number in range(count):
        if photographs:
            image = Image.fromarray(photographs[number % len(photographs)])
            side = int(min(image.size) * rng.uniform(0.3, 1))
            left = rng.integers(image.width - side + 1)
            top = rng.integers(image.height - side + 1)
            box = (left, top, left + side, top + side)
            levels = np.asarray(image.resize((script.SIDE, script.SIDE), box=box))
        else:
            levels = rng.integers(0, 256, (script.SIDE, script.SIDE, 3), np.uint8)
        made[number] = script.normalise(levels)
    return made


def load_photographs():
    try:
        from skimage import data
    except ImportError:
        return []
    found = []
    for name in PHOTOGRAPHS:
        try:
            found.append(getattr(data, name)())
        except Exception as error:  # some are not in the package, but on the network
            print(f"without the photograph {name}: {type(error).__name__}")
    return found


def images_per_second(encode, pixels, batch, seconds):
    """The rate over all pixels, or over as many as `seconds` allow."""
    encode(pixels[:batch])
    done = 0
    start = time.perf_counter()
    while done + batch <= len(pixels) and time.perf_counter() - start < seconds:
        encode(pixels[done : done + batch])
        done += batch
    return done / (time.perf_counter() - start)


def milliseconds(work, device, times=30):
    """The median time of `work`, all that it started on the device included."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    work()
    spent = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        work()
        wait()
        spent.append(time.perf_counter() - start)
    return 1000 * sorted(spent)[times // 2]


def say_where_time_goes(encoder, pixels, device, dtype):
    """The parts of one call of encode: to the device, the tower, back."""
    import torch

    batch = torch.from_numpy(pixels)
    there = batch.to(device)
    with torch.inference_mode():
        made = encoder.tower(there)
        copy = milliseconds(lambda: batch.to(device), device)
        tower = milliseconds(lambda: encoder.tower(there), device)
        back = milliseconds(lambda: made.float().cpu().numpy(), device)
    print(
        f"{dtype:9} batch {len(pixels):3}: copy {copy:.2f} ms, tower {tower:.2f}, back {back:.2f}"
    )


def main():
    usage = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usage.add_argument("--images", type=int, default=2000)
    usage.add_argument("--device", default="cuda")
    usage.add_argument("--seconds", type=float, default=20, help="at most, for each figure")
    options = usage.parse_args()
    check_packages()
    sys.path[:0] = [str(REPO), str(REPO / "tests")]
    import models
    import numpy as np
    import torch

    import generate_embeddings as script

    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch finds no CUDA device here")
        print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory >> 30)
    print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())

    folder = str(models.full_model())
    pixels = make_pixels(options.images)
    compared = pixels[:COMPARED]
    on_cpu = script.ClipEncoder(script.Settings(clip_model=folder))
    wanted = np.concatenate([on_cpu.encode(compared[n : n + 8]) for n in range(0, COMPARED, 8)])
    pair = np.median(np.linalg.norm(wanted - np.roll(wanted, 1, axis=0), axis=1))
    print(f"distance between different images, median: {pair:.4f}")

    for dtype in DTYPES:
        settings = script.Settings(clip_model=folder, device=options.device, dtype=dtype)
        encoder = script.ClipEncoder(settings)
        found = np.concatenate([encoder.encode(compared[n : n + 8]) for n in range(0, COMPARED, 8)])
        worst = np.linalg.norm(found - wanted, axis=1).max()
        print(f"{dtype:9} farthest from the CPU's float32: {worst:.2e}, {worst / pair:.3%} of that")
        for batch in BATCHES:
            rate = images_per_second(encoder.encode, pixels, batch, options.seconds)
            print(f"{dtype:9} batch {batch:3}: {rate:8.0f} images/s", flush=True)
        for batch in (1, 64):
            say_where_time_goes(encoder, pixels[:batch], options.device, dtype)


if __name__ == "__main__":
    main()
