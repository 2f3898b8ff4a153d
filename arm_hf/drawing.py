"""Pictures of a label map: an indexed PNG, and the photo under its labels with a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from arm_hf.colors import PALETTES, palette
from arm_hf.legend import MOST_ENTRIES, Segment, add_legend, drawable, font_for, text_size


@dataclass(frozen=True)
class DrawingStyle:
    """How label maps are drawn; see `overlay`.

    Raises:
        ValueError: There is no such palette.
    """

    colors: str = "vivid"
    contours: bool = False

    def __post_init__(self):
        if self.colors not in PALETTES:
            raise ValueError(f"unknown palette {self.colors!r}; choose one of {', '.join(PALETTES)}")


def segments(semantic_map: np.ndarray, id2label: Mapping[int, str], colors: str = "vivid") -> list[Segment]:
    """Return the classes present in a label map, the largest first.

    Args:
        semantic_map: Class index of each pixel, an integer array (H, W).
        id2label: Class index to name.
        colors: Palette, "vivid" or "colorblind" (see `arm_hf.colors.palette`).

    Raises:
        ValueError: If the map is not a non-empty (H, W) array of integers, or holds an index that `id2label` lacks, or
            there is no such palette.
    """
    semantic_map = _checked(semantic_map)
    ids, counts = np.unique(semantic_map, return_counts=True)
    unknown = [int(index) for index in ids if int(index) not in id2label]
    if unknown:
        raise ValueError(
            f"the label map holds the index {unknown[0]}, which id2label (of {len(id2label)} classes) lacks"
        )
    table = palette(id2label, colors)
    found = [
        Segment(int(index), id2label[int(index)], table[int(index)], int(count), int(count) / semantic_map.size)
        for index, count in zip(ids, counts, strict=True)
    ]
    return sorted(found, key=lambda segment: (-segment.pixels, segment.id))


def indexed_png(semantic_map: np.ndarray, id2label: Mapping[int, str], colors: str = "vivid") -> Image.Image:
    """Return the label map as an image whose pixel values are the class indices.

    Up to 256 classes it has mode "P" and shows in the palette's colours; above, it has 16 bits ("I;16") and no colours.

    Args:
        semantic_map: Class index of each pixel, an integer array (H, W).
        id2label: Class index to name.
        colors: Palette, as for `segments`.

    Raises:
        ValueError: As `segments` does, and above 65,536 classes.
    """
    semantic_map = _checked(semantic_map)
    segments(semantic_map, id2label)
    highest = max(id2label)
    if highest > 65535:
        raise ValueError(f"a PNG holds indices up to 65535, id2label goes up to {highest}")
    if highest > 255:
        return Image.fromarray(semantic_map.astype(np.uint16))
    image = Image.fromarray(semantic_map.astype(np.uint8))
    table = np.zeros((256, 3), dtype=np.uint8)
    for index, color in palette(id2label, colors).items():
        table[index] = color
    image.putpalette(table.tobytes())
    return image


def overlay(
    image: Image.Image,
    semantic_map: np.ndarray,
    id2label: Mapping[int, str],
    alpha: float = 0.55,
    names: bool = True,
    legend: bool = True,
    colors: str = "vivid",
    contours: bool = False,
) -> Image.Image:
    """Return the photo under its labels' colours, with thin outlines, names where they fit, and a legend.

    The legend lists the classes by area; it stands beside a tall picture and below a wide one. Small pictures are
    enlarged so that it can be read.

    Args:
        image: The photo, any mode, of the label map's size.
        semantic_map: Class index of each pixel, an integer array (H, W).
        id2label: Class index to name.
        alpha: How much of the colour covers the photo: 0 shows the photo alone (with outlines), 1 the colours alone.
        names: Whether to write its name into the largest patch of a class where it fits.
        legend: Whether to add the legend. Without it the result has the photo's proportions.
        colors: Palette, as for `segments`.
        contours: Leave the photo as it is and draw each patch's rim in its colour, inside the patch; alpha then has no
            effect.

    Raises:
        ValueError: If the sizes differ, alpha lies outside 0..1, or as `segments` does.
    """
    semantic_map = _checked(semantic_map)
    if image.size != semantic_map.shape[::-1]:
        width, height = semantic_map.shape[::-1]
        raise ValueError(f"the image is {image.size[0]} x {image.size[1]} pixels but its label map {width} x {height}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    found = segments(semantic_map, id2label, colors)
    photo, enlarged = _enlarge(image.convert("RGB"), semantic_map)
    picture = _rims(photo, enlarged, found) if contours else _blend(photo, enlarged, found, alpha)
    if names:
        _write_names(picture, semantic_map, found)
    return add_legend(picture, found) if legend else picture


_SMALLEST_SIDE = 640  # a picture whose longer side is shorter is enlarged, or its legend would dwarf it


def _enlarge(photo: Image.Image, semantic_map: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    longest = max(photo.size)
    if longest >= _SMALLEST_SIDE:
        return photo, semantic_map
    factor = math.ceil(_SMALLEST_SIDE / longest)
    photo = photo.resize((photo.width * factor, photo.height * factor), Image.Resampling.BICUBIC)
    return photo, semantic_map.repeat(factor, axis=0).repeat(factor, axis=1)


def _color_table(found: list[Segment]) -> np.ndarray:
    table = np.zeros((max(segment.id for segment in found) + 1, 3), dtype=np.uint8)
    for segment in found:
        table[segment.id] = segment.color
    return table


def _blend(photo: Image.Image, semantic_map: np.ndarray, found: list[Segment], alpha: float) -> Image.Image:
    colors = Image.fromarray(_color_table(found)[semantic_map])
    blended = np.array(Image.blend(photo, colors, alpha))
    blended[_outlines(semantic_map, max(1, round(max(photo.size) / 900)))] = (255, 255, 255)
    return Image.fromarray(blended)


def _rims(photo: Image.Image, semantic_map: np.ndarray, found: list[Segment]) -> Image.Image:
    """Draw a band of its own colour along the inside of each patch, and a thin white line between two bands."""
    line = max(1, round(max(photo.size) / 900))
    band = np.zeros(semantic_map.shape, dtype=bool)
    across, down = semantic_map[:, 1:] != semantic_map[:, :-1], semantic_map[1:] != semantic_map[:-1]
    for part, edge in ((band[:, 1:], across), (band[:, :-1], across), (band[1:], down), (band[:-1], down)):
        part |= edge
    for _ in range(round(max(photo.size) / 220) + line):
        grown = band.copy()
        for ours, theirs in (((slice(1, None), ...), (slice(-1), ...)), ((..., slice(1, None)), (..., slice(-1)))):
            grown[ours] |= band[theirs]
            grown[theirs] |= band[ours]
        band = grown
    drawn = np.array(photo)
    drawn[band] = _color_table(found)[semantic_map[band]]
    drawn[_outlines(semantic_map, line)] = (255, 255, 255)
    return Image.fromarray(drawn)


def _outlines(semantic_map: np.ndarray, width: int) -> np.ndarray:
    """Return where two classes meet, as a mask (H, W) of lines about `width` pixels wide."""
    mask = np.zeros(semantic_map.shape, dtype=bool)
    mask[:, 1:] |= semantic_map[:, 1:] != semantic_map[:, :-1]
    mask[1:] |= semantic_map[1:] != semantic_map[:-1]
    for step in range(1, width):
        grown = mask.copy()
        if step % 2:
            grown[:, :-1] |= mask[:, 1:]
            grown[:-1] |= mask[1:]
        else:
            grown[:, 1:] |= mask[:, :-1]
            grown[1:] |= mask[:-1]
        mask = grown
    return mask


def _write_names(picture: Image.Image, semantic_map: np.ndarray, found: list[Segment]) -> None:
    """Write each name where its class is thickest, if it fits there."""
    draw = ImageDraw.Draw(picture)
    size = text_size(picture)
    step = max(1, math.ceil(max(semantic_map.shape) / 192))
    top, left = (min(step // 2, (side - 1) // 2) for side in semantic_map.shape)
    coarse = semantic_map[top::step, left::step]
    scale = step * picture.width / semantic_map.shape[1]  # pixels of the picture per cell of the coarse map
    for segment in found[:MOST_ENTRIES]:
        depth = _depth(coarse == segment.id)
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        room = 2 * scale * int(depth[row, column])
        font = font_for(segment.label, size)
        text = drawable(segment.label, font)
        if room < 1.5 * size or min(1.3 * room, picture.width) < font.getlength(text):
            continue
        edge = max(2, size // 9)
        # Inside the frame, whatever the patch: a name may be a little wider than its patch.
        half = font.getlength(text) / 2 + 2 * edge
        x = min(max((column * step + left + 0.5) * scale / step, half), picture.width - half)
        center = (x, (row * step + top + 0.5) * scale / step)
        draw.text(center, text, fill="white", font=font, anchor="mm", stroke_width=edge, stroke_fill=(20, 22, 26))


def _depth(mask: np.ndarray) -> np.ndarray:
    """Return for each cell how many rings can be peeled off the mask before it goes; the frame counts as outside."""
    depth = np.zeros(mask.shape, dtype=np.int32)
    inside = np.pad(mask, 1)
    while inside.any():
        depth += inside[1:-1, 1:-1]
        across = inside[:, :-2] & inside[:, 1:-1] & inside[:, 2:]
        inside[1:-1, 1:-1] = across[:-2] & across[1:-1] & across[2:]
    return depth


def _checked(semantic_map: np.ndarray) -> np.ndarray:
    semantic_map = np.asarray(semantic_map)
    if semantic_map.ndim != 2 or semantic_map.size == 0 or not np.issubdtype(semantic_map.dtype, np.integer):
        raise ValueError(
            "a label map must be a non-empty (H, W) array of integers, "
            f"got shape {semantic_map.shape} and type {semantic_map.dtype}"
        )
    return semantic_map
