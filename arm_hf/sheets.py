"""Many pictures on one: score maps of classes, and sheets of captioned tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from arm_hf.legend import drawable, font_for, shorten

# Anchors of viridis (S. van der Walt and N. Smith, 2015): even steps for every kind of eye, also in print.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 74, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (110, 206, 88),
        (181, 222, 43),
        (253, 231, 37),
    ],
    dtype=np.float32,
)
_PAPER, _INK, _FAINT_INK = (252, 252, 250), (28, 30, 34), (110, 114, 120)


def heat_map(
    image: Image.Image, scores: np.ndarray, limits: tuple[float, float] = (0.0, 1.0), alpha: float = 0.75
) -> Image.Image:
    """Return the photo in grey under the scores of one class: dark violet is the lower limit, yellow the upper.

    Args:
        image: The photo, any mode and size; the scores are stretched over it.
        scores: One number per pixel, (H, W).
        limits: Scores that the ends of the colour scale stand for; what lies beyond looks like the end.
        alpha: How much of the colour covers the photo, 0..1.

    Raises:
        ValueError: If the scores are not a non-empty (H, W) array of finite numbers, the limits are not rising, or
            alpha lies outside 0..1.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"scores must be a non-empty (H, W) array of finite numbers, got the shape {scores.shape}")
    low, high = limits
    if not low < high:
        raise ValueError(f"the limits of a heat map must rise, got {low:g} to {high:g}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    level = Image.fromarray(((scores - low) / (high - low)).clip(0.0, 1.0))
    place = np.asarray(level.resize(image.size, Image.Resampling.BILINEAR)) * (len(_VIRIDIS) - 1)
    lower = np.minimum(place.astype(np.int64), len(_VIRIDIS) - 2)
    part = (place - lower)[..., None]
    colors = _VIRIDIS[lower] * (1 - part) + _VIRIDIS[lower + 1] * part  # (H, W, 3)
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(colors.astype(np.uint8)), alpha)


def score_sheet(
    image: Image.Image,
    class_scores: np.ndarray,
    id2label: Mapping[int, str],
    most: int = 24,
    tile: int = 360,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Image.Image:
    """Return the heat maps of the classes side by side, the one with the largest mean score first, and a scale.

    Args:
        image: The photo.
        class_scores: (K, H, W), as the pipeline returns with `class_scores=True`.
        id2label: Class index to name, K of them.
        most: Show at most so many classes.
        tile: Longer side of a map in pixels.
        limits: As for `heat_map`.

    Raises:
        ValueError: If the number of scores and names differ, or as `heat_map` does.
    """
    class_scores = np.asarray(class_scores)
    if class_scores.ndim != 3 or len(class_scores) != len(id2label):
        raise ValueError(f"class scores must be (K, H, W) with K = {len(id2label)} classes, got {class_scores.shape}")
    small = image.convert("RGB")
    small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    tiles = [("photo", small)]
    for index in rank_classes(class_scores)[:most]:
        title = f"{id2label[index]}   up to {class_scores[index].max():.2f}"
        tiles.append((title, heat_map(small, class_scores[index], limits)))
    return _add_scale(tile_sheet(tiles, tile), limits)


def rank_classes(class_scores: np.ndarray) -> list[int]:
    """Return the class indices of (K, H, W) scores, the largest mean first."""
    means = np.asarray(class_scores).mean(axis=(1, 2), dtype=np.float64)
    return [int(index) for index in np.argsort(-means, kind="stable")]


def tile_sheet(tiles: Sequence[tuple[str, Image.Image]], tile: int = 360, columns: int | None = None) -> Image.Image:
    """Return captioned pictures in rows.

    Args:
        tiles: Caption and picture; each is fitted into a square of `tile` pixels and never enlarged beyond it.
        tile: Side of that square.
        columns: Pictures in a row; by default what gives the sheet the shape of a screen.

    Raises:
        ValueError: If there is no picture, or a number is below 1.
    """
    if not tiles:
        raise ValueError("a sheet needs at least one picture")
    if tile < 1 or (columns is not None and columns < 1):
        raise ValueError(f"tile and columns must be at least 1, got {tile} and {columns}")
    fitted = []
    for title, picture in tiles:
        scale = tile / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        fitted.append((title, picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)))
    width, height = (max(side) for side in zip(*(picture.size for _, picture in fitted), strict=True))
    letter = max(12, round(tile / 22))
    caption, gap = round(1.7 * letter), max(6, tile // 40)
    if columns is None:
        columns = max(1, round(math.sqrt(len(fitted) * (height + caption) / width * 1.6)))
    columns = min(columns, len(fitted))
    rows = math.ceil(len(fitted) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + caption + gap) + gap), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (title, picture) in enumerate(fitted):
        left, top = gap + index % columns * (width + gap), gap + index // columns * (height + caption + gap)
        font = font_for(title, letter)
        text = shorten(drawable(title, font), font, width)
        pen.text((left, top + caption / 2), text, fill=_INK, font=font, anchor="lm")
        sheet.paste(picture, (left + (width - picture.width) // 2, top + caption))
    return sheet


def _add_scale(sheet: Image.Image, limits: tuple[float, float]) -> Image.Image:
    """Add the colour scale of heat maps below a sheet, with its two numbers."""
    height = 40
    canvas = Image.new("RGB", (sheet.width, sheet.height + height), _PAPER)
    canvas.paste(sheet, (0, 0))
    width = min(360, sheet.width // 2)
    ramp = np.linspace(*limits, width, dtype=np.float32)[None].repeat(14, axis=0)
    left, top = (sheet.width - width) // 2, sheet.height + (height - 14) // 2 - 4
    canvas.paste(heat_map(Image.new("L", (width, 14)), ramp, limits, alpha=1.0), (left, top))
    pen, font = ImageDraw.Draw(canvas), font_for("0", 15)
    pen.text((left - 8, top + 7), f"{limits[0]:g}", fill=_FAINT_INK, font=font, anchor="rm")
    pen.text((left + width + 8, top + 7), f"{limits[1]:g}", fill=_FAINT_INK, font=font, anchor="lm")
    return canvas
