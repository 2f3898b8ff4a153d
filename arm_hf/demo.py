"""The demo: two photos, segmented with words by the command line and the embedded model.

    python -m arm_hf.demo --out demo_output

The photos are free ones from a folder `shared/photos` beside the checkout where there is one (or in $ARM_HF_SHARED),
else the ones that come with scikit-image and scikit-learn (`pip install 'arm_hf[demo]'`), else a drawn scene.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHARED_PHOTOS = Path(os.environ.get("ARM_HF_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "photos"


@dataclass(frozen=True)
class DemoPhoto:
    """A picture of the demo.

    Attributes:
        name: Name of its files in the output folder.
        labels: The words, as typed on the command line.
        read: Makes the picture; ImportError or FileNotFoundError says that it is not here.
    """

    name: str
    labels: str
    read: Callable[[], Image.Image]


def _shared(name: str) -> Image.Image:
    with Image.open(SHARED_PHOTOS / name) as image:
        return image.convert("RGB")


def _chelsea() -> Image.Image:
    from skimage.data import chelsea

    return Image.fromarray(chelsea())


def _temple() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def _drawing() -> Image.Image:
    height, width = 320, 480
    shade = np.linspace(0, 60, height)[:, None]
    sky = np.stack([120 + shade, 170 + shade, 235 + 0 * shade], axis=-1) + np.zeros((height, width, 1))
    picture = Image.fromarray(sky.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 220, width, height), fill=(82, 140, 60))
    pen.polygon([(150, 320), (330, 320), (260, 220), (220, 220)], fill=(110, 108, 105))
    return picture


# The first of each row that can be read is used.
PHOTOS: tuple[tuple[DemoPhoto, ...], ...] = (
    (
        DemoPhoto("temple", "temple=building, tree, sky", lambda: _shared("china_temple.jpg")),
        DemoPhoto("temple", "temple=building, tree, sky", _temple),
        DemoPhoto("scene", "sky, grass, road", _drawing),
    ),
    (
        DemoPhoto("dog", "dog, grass, tree", lambda: _shared("dog_frisbee.jpg")),
        DemoPhoto("cat", "cat, wall", _chelsea),
    ),
)


def choose(row: tuple[DemoPhoto, ...]) -> tuple[DemoPhoto, Image.Image] | None:
    """The first photo of a row that is here, with its pixels; None if there is none."""
    for photo in row:
        try:
            return photo, photo.read()
        except (ImportError, FileNotFoundError):
            continue
    return None


def main() -> None:
    """Writes the photos and what was found in them, and says where."""
    parser = argparse.ArgumentParser(prog="python -m arm_hf.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument("--model", help="another model than the embedded one: a folder or a hub id")
    arguments = parser.parse_args()

    photos = arguments.out / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for found in map(choose, PHOTOS):
        if found is None:
            continue
        photo, image = found
        path = photos / f"{photo.name}.png"
        image.save(path)
        words = ["segment", str(path), "--labels", photo.labels, "--out", str(arguments.out), "--overwrite"]
        if arguments.model:
            words += ["--model", arguments.model]
        print("$", shlex.join(["arm-hf", *words]), flush=True)
        done = subprocess.run([sys.executable, "-m", "arm_hf", *words])
        if done.returncode:
            sys.exit(done.returncode)

    print("\nThe pictures:")
    for path in sorted(arguments.out.glob("*.png")):
        print(" ", path.resolve())


if __name__ == "__main__":
    main()
