"""CLIPer's sliding windows: cosines and attention of overlapping crops, joined on the whole image's patch grid.

The authors' code (c05fa41) does not average finished maps. It averages the cosines of every stream and the attention of
the last stream over the windows, propagates the one along the other, and mixes the result half and half with the whole
image's probabilities, before the threshold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .decision import window_boxes

WINDOWS_PER_PASS = 8


@dataclass
class WindowStreams:
    """What the windows of a batch give.

    Attributes:
        patches: Indices of a window's patches in the whole grid, per window (n,).
        streams: Features of a window's patches, per window (S, B, n, D), not normalised.
        attention: Attention of the last stream, per window (B, n, n).
    """

    patches: list[Tensor]
    streams: list[Tensor]
    attention: list[Tensor]


def run_windows(
    pixel_values: Tensor,
    window: int,
    stride: int,
    patch_size: int,
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> WindowStreams:
    """Pass all windows through the tower, several at once.

    Args:
        pixel_values: Padded, normalised images, (B, 3, H, W).
        window: Side in pixels.
        stride: Step in pixels; at most the side is used.
        patch_size: Side of a patch.
        run: Crops (b, 3, h, w) -> features of the streams (S, b, n, D) and attention (b, n, n), both without CLS.

    Raises:
        ValueError: Window or stride is no multiple of the patch.
    """
    if window % patch_size or stride % patch_size:
        raise ValueError(
            f"window {window} and window_stride {stride} must be multiples of this model's patch of {patch_size} pixels"
        )
    batch, _, height, width = pixel_values.shape
    boxes = window_boxes((height, width), window, min(stride, window))
    grid = torch.arange(height // patch_size * (width // patch_size), device=pixel_values.device)
    grid = grid.view(height // patch_size, width // patch_size)
    found = WindowStreams([], [], [])
    at_once = max(1, WINDOWS_PER_PASS // batch)
    for first in range(0, len(boxes), at_once):
        group = boxes[first : first + at_once]
        crops = torch.cat([pixel_values[..., top:bottom, left:right] for top, left, bottom, right in group])
        streams, attention = run(crops)  # (S, k*B, n, D), (k*B, n, n)
        found.streams += streams.split(batch, dim=1)
        found.attention += attention.split(batch)
        for box in group:
            top, left, bottom, right = (side // patch_size for side in box)
            found.patches.append(grid[top:bottom, left:right].flatten())
    return found


def window_probabilities(windows: WindowStreams, logits: Callable[[Tensor], Tensor], num_patches: int) -> Tensor:
    """Probabilities of every stream from the windows, (S, B, N, R).

    Args:
        windows: From `run_windows`.
        logits: Features (S, B, n, D) -> scaled cosines (S, B, n, R).
        num_patches: N of the whole grid.
    """
    some, attention = windows.streams[0], windows.attention[0]
    batch, device = some.shape[1], some.device
    counts = torch.zeros(num_patches, device=device)
    pairs = torch.zeros(num_patches, num_patches, device=device)
    joined = torch.zeros(batch, num_patches, num_patches, device=device, dtype=attention.dtype)
    summed: Tensor | None = None
    for patches, streams, weights in zip(windows.patches, windows.streams, windows.attention, strict=True):
        values = logits(streams)
        if summed is None:
            summed = values.new_zeros(*values.shape[:2], num_patches, values.shape[-1])
        summed[:, :, patches] += values
        counts[patches] += 1
        rows = patches[:, None]
        joined[:, rows, patches] += weights
        pairs[rows, patches] += 1
    assert summed is not None  # window_boxes gives at least one box
    joined = joined / (pairs + 1e-5)
    joined = joined / joined.sum(dim=-1, keepdim=True)
    mean = summed / counts[:, None]  # (S, B, N, R)
    return (joined.transpose(-2, -1) @ mean).softmax(dim=-1)  # out_j = sum_i mean_i joined_ij
