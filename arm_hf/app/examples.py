"""Photos to try the page with: free ones that come with scikit-image and scikit-learn, else a drawn scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def _from_skimage(name: str) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        from skimage import data

        return Image.fromarray(getattr(data, name)())

    return read


def _from_sklearn(name: str) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))

    return read


def _scene() -> Image.Image:
    height, width = 320, 480
    shade = np.linspace(0, 60, height)[:, None]
    sky = np.stack([120 + shade, 170 + shade, 235 + 0 * shade], axis=-1) + np.zeros((height, width, 1))
    picture = Image.fromarray(sky.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 220, width, height), fill=(82, 140, 60))
    pen.polygon([(150, 320), (330, 320), (260, 220), (220, 220)], fill=(110, 108, 105))
    return picture


# Chelsea the cat and the coffee: CC0; astronaut: NASA, public domain; temple (danielbuechele) and flower (vultilion) on
# Flickr: CC BY 2.0.
_PHOTOS: tuple[tuple[str, str, Callable[[], Image.Image]], ...] = (
    ("temple", "temple=building, tree, sky", _from_sklearn("china.jpg")),
    ("cat", "cat, wall", _from_skimage("chelsea")),
    ("coffee", "cup, table", _from_skimage("coffee")),
    ("astronaut", "person=woman|astronaut, wall", _from_skimage("astronaut")),
    ("flower", "flower, leaf", _from_sklearn("flower.jpg")),
)


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """Write the photos that are to be had into a folder; return path and words of each."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, str]] = []
    for name, words, read in (*_PHOTOS, ("scene", "sky, grass, road", _scene)):
        if name == "scene" and found:
            break
        try:
            picture = read()
        except (ImportError, OSError):  # the library is not here, or came without its pictures
            continue
        path = folder / f"{name}.jpg"
        picture.convert("RGB").save(path, quality=92)
        found.append((str(path), words))
    return found
