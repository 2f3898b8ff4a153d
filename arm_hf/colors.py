"""One colour per label name: the same in every process and picture, and easy to tell from its neighbours'."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from arm_hf.modeling.prompts import BACKGROUND_NAME

Color = tuple[int, int, int]

BACKGROUND_COLOR: Color = (58, 62, 68)

# What people expect of these words; every other word gets a colour from its hash.
_EXPECTED: dict[str, Color] = {
    "sky": (120, 190, 255),
    "cloud": (185, 200, 225),
    "water": (40, 120, 220),
    "sea": (30, 95, 190),
    "river": (60, 140, 235),
    "grass": (110, 200, 70),
    "tree": (30, 135, 60),
    "plant": (90, 175, 130),
    "vegetation": (60, 150, 40),
    "mountain": (125, 90, 70),
    "sand": (240, 215, 140),
    "snow": (235, 248, 255),
    "road": (150, 120, 175),
    "building": (200, 140, 90),
    "person": (235, 45, 85),
}


def label_color(name: str) -> Color:
    """Return the colour a label prefers: the same in every process, picture and vocabulary."""
    if name.casefold() == BACKGROUND_NAME:
        return BACKGROUND_COLOR
    return _to_srgb(_candidates(name, 1))[0]


def palette(id2label: Mapping[int, str]) -> dict[int, Color]:
    """Return a colour for each class, easy to tell apart as far as their number allows.

    A class gets the colour its name prefers (`label_color`) unless a class before it has one that looks too much like
    it; then the name's next choice. A word keeps its colour from picture to picture, and mostly between vocabularies.
    """
    return dict(zip(id2label, _palette(tuple(id2label.values())), strict=True))


@lru_cache(maxsize=32)
def _palette(names: tuple[str, ...]) -> tuple[Color, ...]:
    """Give each name the first of its candidates that keeps its distance from the colours given before.

    Words with an expected colour come first, then the others in order.
    """
    chosen = np.zeros((len(names) + 1, 3))  # OKLab
    chosen[0] = _BACKGROUND_LAB
    # As many colours as there are names share the gamut: what counts as "too alike" shrinks with their number.
    distance = 0.13 / max(1.0, len(names) / 8) ** 0.4
    tries = max(6, min(48, 16000 // max(1, len(names))))
    order = sorted(range(len(names)), key=lambda index: names[index].casefold() not in _EXPECTED)
    for done, index in enumerate(order, start=1):
        if (name := names[index].casefold()) in _EXPECTED or name == BACKGROUND_NAME:
            chosen[done] = _from_srgb(np.array(label_color(name)))
            continue
        candidates = _candidates(names[index], tries)  # (T, 3)
        nearest = np.linalg.norm(candidates[:, None] - chosen[None, :done], axis=-1).min(axis=1)  # (T,)
        far = np.flatnonzero(nearest >= distance)
        chosen[done] = candidates[far[0] if len(far) else nearest.argmax()]
    colors = _to_srgb(chosen[1:])
    return tuple(colors[place] for place in np.argsort(order, kind="stable"))


def _candidates(name: str, count: int) -> np.ndarray:
    """Return OKLab colours for a name, best first, (count, 3): from its hash, bright enough to glow over a photo."""
    digest = hashlib.shake_128(name.casefold().encode("utf-8")).digest(6 * count)
    uniform = np.frombuffer(digest, dtype="<u2").reshape(count, 3) / 65535.0
    lightness = 0.46 + 0.42 * uniform[:, 0]
    chroma = 0.10 + 0.15 * uniform[:, 1]
    hue = 2 * math.pi * uniform[:, 2]
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    first = _EXPECTED.get(name.casefold())
    if first is not None:
        lab[0] = _from_srgb(np.array(first))
    # Back into what a screen can show, so that distances are those of the colours really drawn.
    return _from_srgb(np.array(_to_srgb(lab)))


# OKLab and back: B. Ottosson, "A perceptual color space for image processing", 2020.
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _from_srgb(rgb: np.ndarray) -> np.ndarray:
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def _to_srgb(lab: np.ndarray) -> list[Color]:
    linear = (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    linear = linear.clip(0.0, 1.0)
    value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [(int(red), int(green), int(blue)) for red, green, blue in np.rint(255 * value)]


_BACKGROUND_LAB = _from_srgb(np.array(BACKGROUND_COLOR))
