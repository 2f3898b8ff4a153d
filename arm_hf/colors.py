"""One colour per label name: the same in every process and picture, and easy to tell from its neighbours'.

Two palettes: "vivid" glows over a photo and gives sky, grass, road and the like the colours that people expect;
"colorblind" keeps its colours apart for people with any of the three kinds of colour blindness, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from arm_hf.modeling.prompts import BACKGROUND_NAME

Color = tuple[int, int, int]

PALETTES = ("vivid", "colorblind")

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


# With more classes no palette keeps them apart, and comparing each with all before it takes minutes.
_MOST_COMPARED = 1000


def label_color(name: str) -> Color:
    """Return the colour a label prefers: the same in every process, picture and vocabulary."""
    if name.casefold() == BACKGROUND_NAME:
        return BACKGROUND_COLOR
    return _to_srgb(_candidates(name, 1))[0]


def palette(id2label: Mapping[int, str], kind: str = "vivid") -> dict[int, Color]:
    """Return a colour for each class, easy to tell apart as far as their number allows.

    A class gets the colour its name prefers (in "vivid", that of `label_color`) unless a class before it has one that
    looks too much like it; then the name's next choice. A word keeps its colour from picture to picture, and mostly
    between vocabularies.

    Args:
        id2label: Class index to name.
        kind: One of `PALETTES`. "colorblind" takes the seven colours of Okabe and Ito first ("Color Universal Design",
            2008), then others of many lightnesses, and judges likeness as every kind of eye does; above some 20
            classes no palette can keep all of them apart for every eye: names and contours then tell more than colours.

    Raises:
        ValueError: Unknown palette.
    """
    if kind not in PALETTES:
        raise ValueError(f"unknown palette {kind!r}; choose one of {', '.join(PALETTES)}")
    if len(id2label) > _MOST_COMPARED:
        return {index: label_color(name) for index, name in id2label.items()}
    colors = _vivid if kind == "vivid" else _colorblind
    return dict(zip(id2label, colors(tuple(id2label.values())), strict=True))


@lru_cache(maxsize=32)
def _vivid(names: tuple[str, ...]) -> tuple[Color, ...]:
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
        nearest = np.linalg.norm((candidates[:, None] - chosen[None, :done]) * _OVER_A_PHOTO, axis=-1).min(axis=1)
        far = np.flatnonzero(nearest >= distance)
        chosen[done] = candidates[far[0] if len(far) else nearest.argmax()]
    colors = _to_srgb(chosen[1:])
    return tuple(colors[place] for place in np.argsort(order, kind="stable"))


@lru_cache(maxsize=32)
def _colorblind(names: tuple[str, ...]) -> tuple[Color, ...]:
    """As `_vivid`, with likeness judged by the eye that tells two colours apart least."""
    seen = np.zeros((len(_EYES), len(names) + 1, 3))  # OKLab of the colours given so far, as each kind of eye sees them
    seen[:, :1] = _as_seen(np.array([BACKGROUND_COLOR]))
    count = max(8, min(120, 16000 // max(1, len(names))))
    distance = 0.075 / max(1.0, len(names) / 7) ** 0.5
    colors: list[Color] = []
    for done, name in enumerate(names, start=1):
        if name.casefold() == BACKGROUND_NAME:
            colors.append(BACKGROUND_COLOR)
            seen[:, done] = seen[:, 0]
            continue
        digest = hashlib.shake_128(b"colorblind" + name.casefold().encode("utf-8")).digest(2 * len(_OKABE_ITO))
        order = np.argsort(np.frombuffer(digest, dtype="<u2"), kind="stable")
        tries = np.concatenate([_OKABE_ITO[order], _to_srgb(_candidates(name, count, lightness=(0.35, 0.60)))])
        candidates = _as_seen(tries)  # (eyes, T, 3)
        apart = _squared_distances(candidates, seen[:, :done]).min(axis=(0, 2))  # (T,)
        far = np.flatnonzero(apart >= distance**2)
        best = far[0] if len(far) else apart.argmax()
        seen[:, done] = candidates[:, best]
        red, green, blue = tries[best]
        colors.append((int(red), int(green), int(blue)))
    return tuple(colors)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(E, N, 3) and (E, M, 3) to (E, N, M)."""
    return (a**2).sum(-1)[..., None] + (b**2).sum(-1)[:, None] - 2 * a @ b.transpose(0, 2, 1)


def _candidates(name: str, count: int, lightness: tuple[float, float] = (0.46, 0.42)) -> np.ndarray:
    """Return OKLab colours for a name, best first, (count, 3), from its hash; lightness is (lowest, range).

    The default is bright enough to glow over a photo.
    """
    digest = hashlib.shake_128(name.casefold().encode("utf-8")).digest(6 * count)
    uniform = np.frombuffer(digest, dtype="<u2").reshape(count, 3) / 65535.0
    light = lightness[0] + lightness[1] * uniform[:, 0]
    chroma = 0.10 + 0.15 * uniform[:, 1]
    hue = 2 * math.pi * uniform[:, 2]
    lab = np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
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


# What people without one of the three cones see, on linear RGB: G. M. Machado, M. M. Oliveira, L. A. F. Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1. The first is the usual eye.
_EYES = np.array(
    [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)

# Orange, sky blue, bluish green, yellow, blue, vermilion, reddish purple.
_OKABE_ITO = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
)


def _linear(rgb: np.ndarray) -> np.ndarray:
    value = rgb / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _from_srgb(rgb: np.ndarray) -> np.ndarray:
    return np.cbrt(_linear(rgb) @ _TO_LMS.T) @ _TO_LAB.T


def _as_seen(rgb: np.ndarray) -> np.ndarray:
    """Return sRGB colours (N, 3) in OKLab as each kind of eye sees them, (eyes, N, 3)."""
    seen = (_linear(rgb) @ _EYES.transpose(0, 2, 1)).clip(0.0, 1.0)
    return np.cbrt(seen @ _TO_LMS.T) @ _TO_LAB.T


def _to_srgb(lab: np.ndarray) -> list[Color]:
    linear = (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    linear = linear.clip(0.0, 1.0)
    value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [(int(red), int(green), int(blue)) for red, green, blue in np.rint(255 * value)]


# Over a photo a colour's lightness is partly the photo's, so two colours that differ in it alone look alike.
_OVER_A_PHOTO = np.array([0.6, 1.0, 1.0])

_BACKGROUND_LAB = _from_srgb(np.array(BACKGROUND_COLOR))
