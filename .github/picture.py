"""Makes page.png anew, the picture in README.md: a page of the script, shown by Chromium.

    python .github/picture.py

It needs tests/requirements.txt and Chromium. The photographs are scikit-image's. Its docstrings in
skimage/data/_fetchers.py name their terms: chelsea and clock (Stefan van der Walt), coffee (Rachel
Michetti) and camera (Lav Varshney) are CC0 or in the public domain, as are rocket (SpaceX) and
hubble_deep_field (NASA). The model is the tests' own, with random weights: it finds copies as the
real one does, but tells nothing about look-alikes.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests"))

import models  # noqa: E402
from stack import photographs  # noqa: E402

WIDTH, HEIGHT = 1200, 1080  # pixels
PHOTOS = {
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "camera": "camera.png",
    "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg",
}


def fill(folder: Path) -> None:
    """A folder as shops have it: copies of some pictures, and files that are none."""
    data = photographs()
    images = {name: Image.open(io.BytesIO(data[file])) for name, file in PHOTOS.items()}
    for name, image in images.items():
        image.convert("RGB").save(folder / f"{name}.jpg", quality=92)
    coffee = images["coffee"].convert("RGB")
    shutil.copy(folder / "coffee.jpg", folder / "coffee (1).jpg")
    coffee.resize((300, 200)).save(folder / "coffee-small.jpg", quality=80)
    images["cat"].convert("RGB").save(folder / "cat-2023.webp")
    images["rocket"].convert("RGB").save(folder / "rocket.png")
    (folder / "mug.jpg").write_text("<!doctype html><title>Log in</title>")
    (folder / "scarf.jpg").write_bytes((folder / "stars.jpg").read_bytes()[:20_000])
    (folder / "logo.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "Corner shop"
        folder.mkdir()
        fill(folder)
        page = Path(temporary) / "page.html"
        shot = Path(temporary) / "shot.png"
        script = [sys.executable, REPO / "generate_embeddings.py"]
        run = [*script, "--local", folder, "--gallery", page]
        environment = os.environ | {"CLIP_MODEL": str(models.full_model())}
        subprocess.run(run, env=environment, check=False)  # 1: some images fail, as they shall
        look = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={shot}"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        subprocess.run(
            [chromium, *look, size, page.as_uri()], check=True, stderr=subprocess.DEVNULL
        )
        picture = Image.open(shot).convert("RGB").quantize(256)
        picture.save(REPO / ".github" / "page.png", optimize=True)


if __name__ == "__main__":
    main()
