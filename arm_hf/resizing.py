"""Bring an image to the size that the network sees, by the rules of the literature.

Two things differ between the papers' code and move mIoU by some tenths: the interpolation ("opencv-bilinear", without
smoothing, in the code built on mmsegmentation; "pil-bicubic", with smoothing, in CLIPer's), and how sizes are rounded
("pixel": to whole pixels; "patch": to whole patches). "processor" leaves both to the model's own image processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arm_hf.modeling.pipeline_arm import at_least_one_pixel

INTERPOLATIONS = ("opencv-bilinear", "pil-bicubic", "processor")
ROUNDINGS = ("pixel", "patch")

_WEIGHT_BITS = 11  # OpenCV's fixed-point weights: 2048 is 1


def target_size(
    size: tuple[int, int], short_side: int, long_side: int | None, rounding: str, patch_size: int
) -> tuple[int, int]:
    """Height and width after resizing with the proportions kept.

    Args:
        size: Height and width of the image.
        short_side: The shorter side becomes this long,
        long_side: unless the longer side would then be longer than this.
        rounding: "pixel" rounds half up as mmcv does, "patch" to the nearest multiple of the patch as CLIPer does.
        patch_size: Side of a patch in pixels.

    Raises:
        ValueError: Unknown rounding, or a side that is not positive.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if short_side < 1 or (long_side is not None and long_side < short_side):
        raise ValueError(f"sides must be positive and in order, got short_side={short_side}, long_side={long_side}")
    factor = short_side / min(size)
    if long_side is not None:
        factor = min(factor, long_side / max(size))
    if rounding == "patch":
        height, width = (max(1, round(side * factor / patch_size)) * patch_size for side in size)
    else:
        height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resize(image: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an RGB image to a height and width, (H, W, 3) uint8.

    Args:
        image: Any mode; it is read as RGB.
        size: Height and width.
        interpolation: "opencv-bilinear" or "pil-bicubic".

    Raises:
        ValueError: Unknown interpolation.
    """
    image = image.convert("RGB")
    if interpolation == "pil-bicubic":
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    if interpolation == "opencv-bilinear":
        return opencv_bilinear(np.asarray(image), size)
    raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")


def opencv_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What `cv2.resize(..., interpolation=cv2.INTER_LINEAR)` computes for bytes, bit by bit, without OpenCV.

    Weights are rounded to 1/2048; the sum along a row keeps 15 of its bits below the point, that along a column rounds
    half up. Beyond the border the border repeats.

    Args:
        pixels: (H, W, C) uint8.
        size: Height and width of the result.
    """
    left, right, left_weight, right_weight = _taps(pixels.shape[1], size[1], clamp=True)
    top, bottom, top_weight, bottom_weight = _taps(pixels.shape[0], size[0], clamp=False)
    source = pixels.astype(np.int32)
    rows = source[:, left] * left_weight[:, None] + source[:, right] * right_weight[:, None]  # (H, w, C)
    rows >>= 4
    upper = rows[top] * top_weight[:, None, None] >> 16
    lower = rows[bottom] * bottom_weight[:, None, None] >> 16
    return (upper + lower + 2 >> 2).clip(0, 255).astype(np.uint8)


def _taps(source: int, target: int, clamp: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Indices and fixed-point weights of the two neighbours of every target position.

    Along columns OpenCV repeats the border by its index alone; along rows it also drops the second neighbour there.
    """
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    fraction = position - first.astype(np.float32)
    if clamp:
        fraction[(first < 0) | (first >= source - 1)] = 0
    one = np.float32(2**_WEIGHT_BITS)
    weights = (np.rint((1 - fraction) * one).astype(np.int32), np.rint(fraction * one).astype(np.int32))
    return first.clip(0, source - 1), (first + 1).clip(0, source - 1), *weights


def to_pixel_values(
    image: Image.Image,
    processor: Any,
    *,
    interpolation: str,
    short_side: int | None,
    long_side: int | None,
    rounding: str,
    patch_size: int,
    processor_size: Mapping[str, int] | None = None,
) -> Tensor:
    """Resize and normalise one image, (3, H, W) float32.

    Args:
        image: The image.
        processor: The model's image processor; it supplies mean and standard deviation.
        interpolation: One of `INTERPOLATIONS`; "processor" leaves resizing to the processor.
        short_side: See `target_size`; not used by "processor".
        long_side: See `target_size`.
        rounding: See `target_size`.
        patch_size: See `target_size`.
        processor_size: The `size` that the processor gets, with "processor".
    """
    if interpolation == "processor":
        wanted = at_least_one_pixel(dict(processor_size or {}), image.size)
        result = processor(images=image, size=wanted, do_center_crop=False, return_tensors="pt")
        return result["pixel_values"][0]
    if short_side is None:
        raise ValueError(f"{interpolation} needs the length of the shorter side")
    size = target_size((image.height, image.width), short_side, long_side, rounding, patch_size)
    pixels = torch.from_numpy(resize(image, size, interpolation).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (pixels - mean) / std
