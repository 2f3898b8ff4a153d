"""What other models give to a method: the mapping `outside` that models and pipeline take as an argument.

* `"proxy_features"`: a function from the padded, normalised pixels (B, 3, H, W) to features (B, C, h, w), such as
  `ProxyFeatures` (one with an attribute `kind` is also told which kind of features the method wants); or such a tensor,
  which lies over the padded image.
* `"regions"`: integers (H, W) or (B, H, W) over the image, of any size; or a function from the padded pixels to
  (B, H, W), such as `MaskGenerator`. The lowest id stands for pixels outside of all regions.

Functions are called for every batch of windows. Maps of whole images are cut to the windows: integers of two or three
dimensions and floats of four. Everything else in the mapping reaches the method as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .method import MethodContext
from .regions import resize_nearest

Box = tuple[int, int, int, int]


def cut_to_windows(
    outside: Mapping[str, Any], places: Sequence[tuple[int, Box]], image_size: tuple[int, int], num_images: int
) -> dict[str, Any]:
    """What one batch of windows gets of `outside`.

    Args:
        outside: Maps of whole images, functions, and anything else.
        places: Index of the image and box (top, left, bottom, right) of each window; all boxes have one size.
        image_size: Height and width that the boxes refer to.
        num_images: Images in the batch that `outside` was made for.

    Raises:
        ValueError: A map has another number of images.
    """
    result = dict(outside)
    for key, value in outside.items():
        maps = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(maps, Tensor) or maps.ndim not in ((4,) if maps.is_floating_point() else (2, 3)):
            continue
        maps = maps[None] if maps.ndim == 2 else maps
        if maps.shape[0] not in (1, num_images):
            raise ValueError(f"outside[{key!r}] holds {maps.shape[0]} maps for {num_images} images")
        maps = maps.expand(num_images, *maps.shape[1:])
        result[key] = torch.stack([_cut(maps[index], box, image_size) for index, box in places])
    return result


def _cut(maps: Tensor, box: Box, image_size: tuple[int, int]) -> Tensor:
    """The part of a map (..., h, w) below a box, in whole cells; equal boxes give parts of equal size."""
    for dim, first, last in ((-2, box[0], box[2]), (-1, box[1], box[3])):
        cells = maps.shape[dim] / image_size[dim]
        length = max(1, round((last - first) * cells))
        maps = maps.narrow(dim, min(round(first * cells), maps.shape[dim] - length), length)
    return maps


def _outside(context: MethodContext, key: str, method: str, what: str) -> Any:
    if context.outside.get(key) is None:
        raise ValueError(f"method {method!r} needs {what}: pass outside={{{key!r}: ...}} to the pipeline or the model")
    return context.outside[key]


def proxy_features(context: MethodContext, method: str, kind: str) -> tuple[Tensor, tuple[int, int]]:
    """Unit features of the other model, float32 (B, N, C), and their grid.

    Args:
        context: Supplies `outside["proxy_features"]` and the pixels.
        method: Who asks, for the messages.
        kind: What `ProxyFeatures` should give if it was not told.

    Raises:
        ValueError: They are missing, or not (B, C, h, w).
    """
    value = _outside(context, "proxy_features", method, "features of a vision model, e.g. ProxyFeatures.from_timm(...)")
    pixels = context.trunk.pixel_values
    if callable(value):
        value = value(pixels, kind) if hasattr(value, "kind") else value(pixels)
    maps = torch.as_tensor(value).detach().to(pixels.device, torch.float32)
    if maps.ndim != 4 or maps.shape[0] != pixels.shape[0]:
        raise ValueError(
            f"outside['proxy_features'] must be ({pixels.shape[0]}, C, h, w) for {pixels.shape[0]} images, got "
            f"{tuple(maps.shape)}"
        )
    return F.normalize(maps.flatten(2), dim=1).transpose(1, 2), (maps.shape[-2], maps.shape[-1])


def whole_regions(outside: Mapping[str, Any] | None, pixel_values: Tensor, index: int) -> Tensor:
    """Region map (H, W) of one whole image, for the correction of its label map.

    Args:
        outside: Supplies "regions".
        pixel_values: Normalised images, (B, 3, H, W).
        index: Which of them.

    Raises:
        ValueError: There are no regions, or not as many as images.
    """
    value = (outside or {}).get("regions")
    if value is None:
        raise ValueError(
            'correct_regions needs a map of regions: pass outside={"regions": ...}, an integer array or MaskGenerator'
        )
    if callable(value):
        return torch.as_tensor(value(pixel_values[index : index + 1]))[0]
    regions = torch.as_tensor(value)
    regions = regions[None] if regions.ndim == 2 else regions
    if regions.ndim != 3 or regions.is_floating_point() or regions.shape[0] not in (1, pixel_values.shape[0]):
        raise ValueError(
            f"outside['regions'] must be integers (H, W) or ({pixel_values.shape[0]}, H, W), got "
            f"{regions.dtype} {tuple(regions.shape)}"
        )
    return regions[index if regions.shape[0] > 1 else 0]


def region_maps(context: MethodContext, method: str) -> Tensor:
    """Region per pixel of the padded images, (B, H, W), int64; what was added around an image is a region of its own.

    Args:
        context: Supplies `outside["regions"]` and the pixels.
        method: Who asks, for the messages.

    Raises:
        ValueError: They are missing, not integers, or not (H, W) or (B, H, W).
    """
    value = _outside(context, "regions", method, "a map of regions, e.g. MaskGenerator(...) or an integer array")
    pixels, padding = context.trunk.pixel_values, context.trunk.padding
    padded = callable(value)
    value = value(pixels) if padded else value
    regions = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    if regions.is_floating_point() or regions.is_complex():
        raise ValueError(f"outside['regions'] must hold integers, got {regions.dtype}")
    regions = regions[None] if regions.ndim == 2 else regions
    if regions.ndim != 3 or regions.shape[0] not in (1, pixels.shape[0]) or regions.numel() == 0:
        raise ValueError(
            f"outside['regions'] must be (H, W) or ({pixels.shape[0]}, H, W) for {pixels.shape[0]} images, got "
            f"{tuple(regions.shape)}"
        )
    regions = regions.to(pixels.device, torch.int64).expand(pixels.shape[0], -1, -1)
    height, width = context.trunk.padded_size
    if padded:
        regions = padding.crop(resize_nearest(regions, (height, width)))
    inner = (height - padding.top - padding.bottom, width - padding.left - padding.right)
    borders = (padding.left, padding.right, padding.top, padding.bottom)
    if padded and min(borders) < 0:
        return regions  # the rule "drop": the function saw what was left
    regions = resize_nearest(regions, inner)
    return F.pad(regions, borders, value=int(regions.max()) + 1) if any(borders) else regions
