"""Losses that ARM can be trained with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError when a label map holds a value that is neither a class nor `ignore_index`.

    Args:
        labels: Label maps of any shape.
        num_classes: Labels from 0 to this, less one, are classes.
        ignore_index: The only other value allowed.
    """
    if labels.is_floating_point() or labels.ndim != 3:
        raise ValueError(f"labels must be integers of shape (B, H, W), got {labels.dtype} {tuple(labels.shape)}")
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
    if wrong.numel():
        found = sorted(set(wrong.unique().tolist()))[:5]
        raise ValueError(
            f"label values {found} are out of range: {num_classes} classes were given (0 to {num_classes - 1}) and "
            f"{ignore_index} is ignored"
        )


def pixel_weights(labels: Tensor, config: Any) -> Tensor:
    """What every pixel counts in the mean that `segmentation_loss` is.

    Args:
        labels: Class index per pixel, (B, H, W), at the resolution of the loss.
        config: `pixel_weighting`, `loss`, `ignored_pixels` and `ignore_index` are read, see `ARMConfig`.

    Returns:
        (B, H, W) float32: 0 where a pixel is left out; else 1, or for "region" the inverse square root of the number of
        pixels of the same label in the image.
    """
    labels = labels.long()
    valid = labels != config.ignore_index
    counted = torch.ones_like(valid) if config.loss != "cross_entropy" and config.ignored_pixels == "zeros" else valid
    weights = counted.float()
    if config.pixel_weighting == "even":
        return weights
    batch = torch.arange(len(labels), device=labels.device)[:, None, None]
    labels_and_rest = torch.where(valid, labels, labels.masked_fill(~valid, -1).amax() + 1)
    regions = batch * (labels_and_rest.amax() + 1) + labels_and_rest
    areas = torch.bincount(regions.flatten()).float()
    return weights * areas.rsqrt()[regions]


def segmentation_loss(maps: Tensor, labels: Tensor, config: Any) -> Tensor:
    """Loss of fused maps against a label map.

    Binary cross-entropy is the paper's loss (section 4.1): every class is a yes/no question at every pixel, and the
    mean runs over pixels and classes. With `ignored_pixels="zeros"` ignored pixels answer "no" for all classes.

    Args:
        maps: M_f (or M_r for "bce_refinement"), (B, K, H', W').
        labels: Class index per pixel, (B, H, W).
        config: `loss`, `loss_resolution`, `pixel_weighting`, `ignored_pixels` and `ignore_index` are read, see
            `ARMConfig`.

    Raises:
        ValueError: A label is out of range or the batch sizes differ.
    """
    check_labels(labels, maps.shape[1], config.ignore_index)
    if labels.shape[0] != maps.shape[0]:
        raise ValueError(f"{labels.shape[0]} label maps for {maps.shape[0]} images")
    maps = maps.float()
    if config.loss_resolution == "labels":
        maps = F.interpolate(maps, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    elif labels.shape[-2:] != maps.shape[-2:]:
        labels = F.interpolate(labels[:, None].float(), size=maps.shape[-2:], mode="nearest")[:, 0].long()
    labels = labels.long()
    valid = labels != config.ignore_index
    weights = pixel_weights(labels, config)  # (B, H, W)
    if config.loss == "cross_entropy":
        per_pixel = F.cross_entropy(maps, labels, ignore_index=config.ignore_index, reduction="none")
    else:
        target = torch.zeros_like(maps)
        target.scatter_(1, torch.where(valid, labels, 0)[:, None], valid[:, None].to(maps.dtype))
        per_pixel = F.binary_cross_entropy_with_logits(maps, target, reduction="none").mean(dim=1)
    total = weights.sum()
    return (per_pixel * weights).sum() / torch.where(total > 0, total, 1)
