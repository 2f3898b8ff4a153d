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
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from arm_hf.sample_photos import Reader, drawn_scene, from_skimage, from_sklearn

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
    read: Reader


def _shared(name: str) -> Image.Image:
    with Image.open(SHARED_PHOTOS / name) as image:
        return image.convert("RGB")


# The first of each row that can be read is used.
PHOTOS: tuple[tuple[DemoPhoto, ...], ...] = (
    (
        DemoPhoto("temple", "temple, tree, sky", lambda: _shared("china_temple.jpg")),
        DemoPhoto("temple", "temple, tree, sky", from_sklearn("china.jpg")),
        DemoPhoto("scene", "sky, grass, road", drawn_scene),
    ),
    (
        DemoPhoto("dog", "dog, grass, tree", lambda: _shared("dog_frisbee.jpg")),
        DemoPhoto("cat", "cat, wall", from_skimage("chelsea")),
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
