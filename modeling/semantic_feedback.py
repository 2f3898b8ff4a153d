"""ResCLIP's semantic feedback: labels of patches from a first pass, and the matrix of patches that share one.

Yang et al., "ResCLIP", CVPR 2025, Eqs. 7 to 11, in the form of the authors' code (0e085f7); the paper's forms where
they differ are options. `resclip.py` adds the matrix to the scores of the last block.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .decision import MAX_CHUNK_VALUES
from .pamr import PAMR

PATHS = ("segment", "region", "any")
SMOOTHINGS = ("raster", "map", "none")


@torch.no_grad()
def first_pass_labels(
    scores: Tensor, pixel_values: Tensor, patch_size: int, scale: float, threshold: float, pamr_iterations: int
) -> Tensor:
    """Labels of the patches from a first pass: the most frequent label of their pixels.

    Scores are upsampled to the image and refined by PAMR; a pixel takes its best query, or query 0 where the softmax
    over queries stays below `threshold`. Ties between labels of a patch go to the lower one. Queries are processed in
    parts, so that memory stays bounded.

    Args:
        scores: Cosines of the first pass, (B, Q, h, w).
        pixel_values: Normalised images of whole patches, (B, 3, H, W).
        patch_size: Side of a patch in pixels.
        scale: Factor inside the softmax.
        threshold: Probability below which query 0 is taken.
        pamr_iterations: Rounds of PAMR, 0 for none.

    Returns:
        Query indices, (B, H / patch_size, W / patch_size), int64.
    """
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    step = max(1, MAX_CHUNK_VALUES // (size[0] * size[1]))
    labels = []
    for image, queries in zip(pixel_values, scores.float(), strict=True):
        refine = PAMR(image, pamr_iterations) if pamr_iterations else None
        best = torch.full(size, -torch.inf, device=scores.device)
        label = torch.zeros(size, dtype=torch.int64, device=scores.device)
        log_sum = torch.full(size, -torch.inf, device=scores.device) if threshold > 0 else None
        for start in range(0, queries.shape[0], step):
            part = F.interpolate(queries[None, start : start + step], size=size, mode="bilinear", align_corners=False)[
                0
            ]
            part = part if refine is None else refine(part)
            highest, index = part.max(dim=0)
            label = torch.where(highest > best, index + start, label)
            best = torch.maximum(best, highest)
            if log_sum is not None:
                log_sum = torch.logaddexp(log_sum, part.mul_(scale).logsumexp(dim=0))
        if log_sum is not None:
            label = label.masked_fill((scale * best - log_sum).exp() < threshold, 0)
        labels.append(_patch_mode(label, patch_size, scores.shape[1]))
    return torch.stack(labels)


def _patch_mode(labels: Tensor, patch_size: int, num_labels: int) -> Tensor:
    """Most frequent label of each patch, the lowest on ties: (H, W) -> (h, w)."""
    blocks = labels.unflatten(0, (-1, patch_size)).unflatten(2, (-1, patch_size)).transpose(1, 2)  # (h, w, p, p)
    height, width = blocks.shape[:2]
    patch = torch.arange(height * width, device=labels.device).view(height, width, 1, 1)
    counts = torch.bincount((patch * num_labels + blocks).flatten(), minlength=height * width * num_labels)
    return counts.view(height, width, num_labels).argmax(dim=-1)


def segment_is_free(labels: Tensor) -> Tensor:
    """Whether the straight line from patch i to patch j starts inside i's label.

    As in the reference code the line is sampled at m + 1 points, m the longest Chebyshev distance on the grid, rounded
    half to even; only the first d + 1 of them are looked at, d the distance from i to j. So only the longest pairs are
    tested along the whole line, and the result is not symmetric.

    Args:
        labels: Labels of the patches of one image, (h, w).

    Returns:
        Boolean, (h*w, h*w).
    """
    height, width = labels.shape
    longest = max(height, width) - 1
    ys, xs = torch.arange(height, device=labels.device), torch.arange(width, device=labels.device)
    rows_apart, columns_apart = (ys[:, None] - ys).abs(), (xs[:, None] - xs).abs()
    # Rows and columns of a sample depend on rows and columns of the end points alone, and whole rows can be copied at
    # once, in the order (yi, yj, xi, xj).
    kinds, labels = labels.unique(return_inverse=True)
    labels = labels.to(torch.uint8 if len(kinds) <= 256 else torch.int32)
    start = labels[:, None, :, None]
    free = torch.ones(height, height, width, width, dtype=torch.bool, device=labels.device)
    for index, t in enumerate(torch.linspace(0, 1, longest + 1).tolist()[1:], start=1):
        sample_y = _between(ys, t).flatten()  # (h * h,)
        sample_x = _between(xs, t).flatten()  # (w * w,)
        sample = labels[:, sample_x].index_select(0, sample_y).view_as(free)
        same = sample == start
        same |= (rows_apart < index)[:, :, None, None] & (columns_apart < index)
        free &= same
    return free.transpose(1, 2).reshape(height * width, height * width)


def _between(places: Tensor, t: float) -> Tensor:
    """Rounded points at the share t of the way from each place to each other, (n, n); in float32 as the reference."""
    share = torch.tensor(t, device=places.device)
    points = places.float()
    return ((1 - share) * points[:, None] + share * points).round().long()


def same_region(labels: Tensor) -> Tensor:
    """Whether patches i and j lie in one connected region (8 neighbours) of equal labels: (h, w) -> (h*w, h*w)."""
    height, width = labels.shape
    region = torch.arange(1, height * width + 1, device=labels.device).view(height, width).float()
    padded_labels = F.pad(labels, (1, 1, 1, 1), value=-1)
    views = [(slice(y, y + height), slice(x, x + width)) for y in range(3) for x in range(3)]
    joined = [padded_labels[view] == labels for view in views]
    while True:
        padded = F.pad(region, (1, 1, 1, 1))
        grown = region
        for view, equal in zip(views, joined, strict=True):
            grown = torch.maximum(grown, padded[view] * equal)
        if torch.equal(grown, region):
            break
        region = grown
    return region.flatten()[:, None] == region.flatten()


def _distance_decay(grid: tuple[int, int], device: torch.device) -> Tensor:
    """exp(-d / max d) of the Chebyshev distance d between patches (Eqs. 9, 10), (N, N)."""
    rows, columns = (
        torch.exp(-(places[:, None] - places).abs() / max(1, max(grid) - 1))
        for places in (torch.arange(extent, device=device) for extent in grid)
    )
    return torch.minimum(rows[:, None, :, None], columns[:, None, :]).flatten(2).flatten(0, 1)


def _gaussian(length: int, std: float, device: torch.device) -> Tensor:
    offsets = torch.arange(length, device=device) - length // 2
    kernel = torch.exp(-(offsets.float() ** 2) / (2 * std**2))
    return kernel / kernel.sum()


def _odd_length(limit: int, std: float) -> int:
    return min(limit, int(6 * std + 1)) // 2 * 2 + 1  # an even length grows by one


def smooth(matrix: Tensor, grid: tuple[int, int], std: float, smoothing: str) -> Tensor:
    """Smooth the rows of an (N, N) matrix with a Gaussian of `std` patches, zeros outside.

    "raster" runs along the flattened grid, from the end of one row of patches into the next (the code); "map" smooths
    in two dimensions; "none" does nothing.

    Args:
        matrix: (N, N).
        grid: Patches per column and row, (h, w).
        std: In patches.
        smoothing: "raster" along the flattened rows, "map" in two dimensions, or "none".
    """
    if smoothing == "none":
        return matrix
    if smoothing == "raster":
        length = _odd_length(matrix.shape[1], std)
        kernel = _gaussian(length, std, matrix.device).view(1, 1, -1)
        return F.conv1d(matrix[:, None], kernel, padding=length // 2)[:, 0]
    maps = matrix.unflatten(1, grid)[:, None]  # (N, 1, h, w)
    for axis, extent in enumerate(grid):
        length = _odd_length(extent, std)
        shape, padding = ((length, 1), (length // 2, 0)) if axis == 0 else ((1, length), (0, length // 2))
        maps = F.conv2d(maps, _gaussian(length, std, matrix.device).view(1, 1, *shape), padding=padding)
    return maps.flatten(1)


def feedback_matrix(
    labels: Tensor, std: float = 5.0, path: str = "segment", smoothing: str = "raster", normalize: bool = True
) -> Tensor:
    """The SFR matrix of one image before the division by its maximum (Eqs. 7 to 11), with CLS as zero row and column.

    Args:
        labels: Labels of the patches, (h, w).
        std: Of the smoothing, in patches.
        path: When patches of one label count in full: see `ResclipSettings.path`.
        smoothing: See `smooth`.
        normalize: Divide the rows by their sums, as the code does.

    Returns:
        (L, L) with L = h*w + 1.
    """
    grid = (labels.shape[0], labels.shape[1])
    flat = labels.flatten()
    matrix = (flat[:, None] == flat).float()
    if path != "any":
        joined = segment_is_free(labels) if path == "segment" else same_region(labels)
        matrix = torch.where(joined, matrix, matrix * _distance_decay(grid, labels.device))
    matrix = smooth(matrix, grid, std, smoothing)
    if normalize:
        matrix = matrix.clamp_min(0)
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + 1e-8)
    return F.pad(matrix, (1, 0, 1, 0))
