"""Region maps: integers per pixel that say which pixels belong together, from masks of any generator.

The lowest id of a map stands for the pixels outside of every region.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def regions_from_masks(masks: Iterable[Any], size: tuple[int, int] | None = None) -> Tensor:
    """Integer map of overlapping masks: larger ones are painted first, so that smaller ones stay visible.

    ```python
    >>> from arm_hf import regions_from_masks
    >>> regions_from_masks([[[1, 1, 0]], [[1, 0, 0]]]).tolist()
    [[2, 1, 0]]

    ```

    Args:
        masks: Boolean masks (H, W), as arrays, tensors or PIL images.
        size: Height and width, needed where there may be no mask at all.

    Returns:
        (H, W), int32: 0 outside of all masks, else 1 and up, by falling area.

    Raises:
        ValueError: The masks differ in size, or there is none and no `size`.
    """
    boolean = [
        mask.bool().cpu() if isinstance(mask, Tensor) else torch.from_numpy(np.asarray(mask).astype(bool))
        for mask in masks
    ]
    if not boolean and size is None:
        raise ValueError("there is no mask, so the map's size is unknown; give size=(height, width)")
    shape = tuple(boolean[0].shape) if size is None else tuple(size)
    wrong = [tuple(mask.shape) for mask in boolean if tuple(mask.shape) != shape]
    if wrong:
        raise ValueError(f"masks must all be {shape[0]} x {shape[1]}, got one of shape {wrong[0]}")
    regions = torch.zeros(shape, dtype=torch.int32)
    for index, mask in enumerate(sorted(boolean, key=lambda mask: -int(mask.sum())), start=1):
        regions[mask] = index
    return regions


class MaskGenerator:
    """A mask generator as a function from CLIP's normalised pixels (B, 3, H, W) to region maps (B, H, W).

    It is called for every window anew. To segment an image once and use the map for all its windows, compute
    `regions_from_masks(...)` beforehand and give the map instead.

    Args:
        generator: Takes a PIL image and returns masks: a list of them, or a dict with "masks" (what transformers'
            `pipeline("mask-generation")` returns), or a list of dicts with "mask" or "segmentation" each.
        clip_mean, clip_std: Pixel statistics that the pixels were normalised with.
        options: Given to the generator at every call, `points_per_batch=64` for example.
    """

    def __init__(
        self,
        generator: Callable[..., Any],
        *,
        clip_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        clip_std: Sequence[float] = OPENAI_CLIP_STD,
        **options: Any,
    ):
        self.generator, self.options = generator, options
        self._mean, self._std = torch.tensor(clip_mean)[:, None, None], torch.tensor(clip_std)[:, None, None]

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Region maps of a batch, (B, H, W), int32."""
        maps = []
        for image in pixel_values.float().cpu():
            values = ((image * self._std + self._mean).clamp(0, 1) * 255).round().to(torch.uint8)
            found = self.generator(Image.fromarray(values.permute(1, 2, 0).numpy()), **self.options)
            if isinstance(found, Mapping):
                found = found["masks"]
            masks = [
                mask.get("segmentation", mask.get("mask")) if isinstance(mask, Mapping) else mask for mask in found
            ]
            maps.append(regions_from_masks(masks, (image.shape[-2], image.shape[-1])))
        return torch.stack(maps)


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize integer maps (..., H, W) as `F.interpolate(mode="nearest")` does, exact for any id.

    Args:
        maps: Integers, (..., H, W).
        size: Height and width.
    """
    for dim, length in zip((-2, -1), size, strict=True):
        if maps.shape[dim] != length:
            places = torch.arange(maps.shape[dim], dtype=torch.float32, device=maps.device)
            places = F.interpolate(places[None, None], size=length, mode="nearest")[0, 0].long()
            maps = maps.index_select(dim, places)
    return maps


def connected_components(adjacency: Tensor) -> Tensor:
    """First member of the component that each node of a symmetric graph (R, R) belongs to, (R,).

    This is DBSCAN with one sample per core point, for `adjacency = distance <= eps`.
    """
    count = adjacency.shape[0]
    labels = torch.arange(count, device=adjacency.device)
    adjacency = adjacency | torch.eye(count, dtype=torch.bool, device=adjacency.device)
    while True:
        lowest = torch.where(adjacency, labels, count).amin(dim=1)  # of a node and its neighbours
        lowest = lowest[lowest]  # and of the node that this one is named after
        if torch.equal(lowest, labels):
            return labels
        labels = lowest


def merge_regions(regions: Tensor, grid: tuple[int, int], features: Tensor, distance: float) -> Tensor:
    """Join regions of one image whose mean features are close.

    Args:
        regions: Region of each pixel, (H, W); 0 is outside of all regions and stays so.
        grid: Patches per column and row; regions are resized to it (nearest).
        features: Unit feature of each patch, (N, C).
        distance: How far the cosine of two regions may lie below the highest cosine there is.

    Returns:
        (H, W): joined regions have the lowest of their ids. Regions that no patch sees are left alone.
    """
    ids, index = resize_nearest(regions, grid).flatten().unique(return_inverse=True)
    first = int(ids[0] == 0)
    sums = features.new_zeros(len(ids), features.shape[1]).index_add_(0, index, features)
    means = F.normalize(sums, dim=-1)[first:]
    if len(means) < 2:
        return regions
    similarity = means @ means.T
    components = connected_components(similarity.max() - similarity <= distance)
    joined = torch.cat([ids[:first], ids[first:][components]])
    places = torch.searchsorted(ids, regions).clamp_max(len(ids) - 1)
    return torch.where(ids[places] == regions, joined[places], regions)


def correct_labels(labels: Any, regions: Any, unsegmented: int | None = None) -> Any:
    """CorrCLIP's map correction: the most frequent label of a region becomes the label of all its pixels.

    ```python
    >>> import numpy as np
    >>> from arm_hf import correct_labels
    >>> correct_labels(np.array([[7, 7, 5, 4]]), np.array([[1, 1, 1, 0]])).tolist()
    [[7, 7, 7, 4]]

    ```

    Args:
        labels: Class per pixel, (H, W), an integer array or tensor; "semantic_map" of the pipeline, for example.
        regions: Region per pixel, integers of any size; resized to the labels (nearest).
        unsegmented: Id of the pixels that keep their label; None takes the lowest id, as the code does.

    Returns:
        As `labels`, in its type. Ties go to the smallest label.

    Raises:
        ValueError: `labels` or `regions` is not (H, W).
    """
    before, ids = torch.as_tensor(labels), torch.as_tensor(regions).to(torch.int64)
    if before.ndim != 2 or ids.ndim != 2:
        raise ValueError(f"labels and regions must be (H, W), got {tuple(before.shape)} and {tuple(ids.shape)}")
    ids = resize_nearest(ids.to(before.device), (before.shape[0], before.shape[1]))
    names, index = ids.unique(return_inverse=True)
    classes, label_index = before.unique(return_inverse=True)
    votes = (index * len(classes) + label_index).flatten().bincount(minlength=len(names) * len(classes))
    winners = classes[votes.view(len(names), len(classes)).argmax(dim=1)]
    kept = ids == (names[0] if unsegmented is None else unsegmented)
    corrected = torch.where(kept, before, winners[index])
    return corrected if isinstance(labels, Tensor) else corrected.numpy()


def correct_confidence(confidence: Tensor, before: Tensor, after: Tensor, regions: Any) -> Tensor:
    """Confidence after `correct_labels`: changed pixels take the mean of the pixels of their region that won.

    Args:
        confidence: (H, W) of the labels before.
        before: Labels (H, W) before the correction.
        after: Labels after it.
        regions: As given to `correct_labels`.
    """
    ids = resize_nearest(torch.as_tensor(regions).to(before.device, torch.int64), (before.shape[0], before.shape[1]))
    names, index = ids.unique(return_inverse=True)
    won = before == after
    sums = torch.zeros(len(names), device=confidence.device).index_add_(0, index[won], confidence[won].float())
    means = sums / index[won].bincount(minlength=len(names)).clamp_min(1)
    return torch.where(won, confidence, means[index].to(confidence.dtype))
