"""Free photos that come with scikit-image and scikit-learn, and a drawn scene that is always there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Reader = Callable[[], Image.Image]
"""Makes a picture; ImportError or OSError says that it is not here."""


def from_skimage(name: str) -> Reader:
    """A photo of `skimage.data`."""

    def read() -> Image.Image:
        from skimage import data

        return Image.fromarray(getattr(data, name)())

    return read


def from_sklearn(name: str) -> Reader:
    """A sample image of scikit-learn."""

    def read() -> Image.Image:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))

    return read


def drawn_scene() -> Image.Image:
    """A sky, a meadow and a road."""
    height, width = 320, 480
    shade = np.linspace(0, 60, height)[:, None]
    sky = np.stack([120 + shade, 170 + shade, 235 + 0 * shade], axis=-1) + np.zeros((height, width, 1))
    picture = Image.fromarray(sky.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 220, width, height), fill=(82, 140, 60))
    pen.polygon([(150, 320), (330, 320), (260, 220), (220, 220)], fill=(110, 108, 105))
    return picture
