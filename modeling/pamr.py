"""PAMR, pixel-adaptive mask refinement: scores flow between neighbouring pixels of similar colour.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, in the form that the SCLIP,
NACLIP and ResCLIP code uses: 8 neighbours at each dilation, the centre itself not among them. It refines scores of any
method after upsampling (NACLIP's published numbers contain it), and ResCLIP's first pass.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DILATIONS = (8, 16)
BLOCK_VALUES = 2**19  # 2 MiB of float32 at a time: fewer values mean more calls, more leave the processor's cache


def neighbour_offsets(dilations: Sequence[int] = DILATIONS) -> list[tuple[int, int]]:
    """Steps (dy, dx) in pixels to the 8 neighbours at each dilation.

    Raises:
        ValueError: There is no dilation, or one is not positive.
    """
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations must be one or more positive numbers, got {tuple(dilations)}")
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return [(step * y, step * x) for step in dilations for y, x in around]


@torch.no_grad()
def affinity(image: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Weights of the neighbours of every pixel: softmax of -|I(p) - I(n)| / (1e-8 + 0.1 std), averaged over channels.

    The standard deviation (unbiased, per channel) is that of the 3 x 3 neighbourhoods of all dilations together, in
    which the centre occurs once per dilation. Neighbours outside the image are its border pixels.

    Args:
        image: What guides the refinement, usually the normalised pixels, (B, C, H, W).
        dilations: Distances of the neighbours in pixels.

    Returns:
        (B, 8 * len(dilations), H, W) in at least float32; sums to 1 over the neighbours.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    offsets, border = neighbour_offsets(dilations), max(dilations)
    samples = 9 * len(dilations)
    height, width = image.shape[-2:]
    weights = image.new_empty(image.shape[0], len(offsets), height, width)
    for pixels, result in zip(image, weights, strict=True):
        padded = _pad(pixels, border)
        for top, bottom in _row_blocks(height, width * pixels.shape[0]):
            centre = pixels[:, top:bottom]
            total, squares = torch.zeros_like(centre), torch.zeros_like(centre)
            for offset in offsets:  # relative to the centre, so that flat areas have exactly no deviation
                step = _shifted(padded, border, offset, top, bottom, width) - centre
                total += step
                squares.addcmul_(step, step)
            variance = squares.addcmul_(total, total, value=-1 / samples).div_(samples - 1).clamp_(min=0)
            factor = variance.sqrt_().mul_(0.1).add_(1e-8).reciprocal_().div_(-pixels.shape[0])
            for index, offset in enumerate(offsets):
                step = _shifted(padded, border, offset, top, bottom, width) - centre
                torch.sum(step.abs_().mul_(factor), dim=0, out=result[index, top:bottom])
    return weights.softmax(dim=1)


@torch.no_grad()
def refine(maps: Tensor, weights: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Tensor:
    """Replace every value by the weighted sum of its neighbours, `iterations` times.

    Args:
        maps: Scores, (B, Q, h, w); resized to the weights' size (bilinear, corners aligned) where that differs.
        weights: From `affinity`, (B, 8 * len(dilations), H, W).
        dilations: The same as there.
        iterations: Number of rounds.

    Returns:
        (B, Q, H, W), in the dtype of `weights`. Maps do not influence each other, so they may come in parts.
    """
    offsets, border = neighbour_offsets(dilations), max(dilations)
    size = (weights.shape[-2], weights.shape[-1])
    expected = (maps.shape[0], len(offsets))
    if weights.shape[:2] != expected:
        raise ValueError(f"weights must be {expected} and height, width for these maps; got {tuple(weights.shape)}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    maps = maps.to(weights.dtype)
    if maps.shape[-2:] != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    if iterations == 0:
        return maps
    result = torch.empty(*maps.shape[:2], *size, dtype=maps.dtype, device=maps.device)
    step = max(1, (8 if maps.device.type == "cpu" else 32) * BLOCK_VALUES // (size[0] * size[1]))
    for image, around, output in zip(maps, weights, result, strict=True):
        for start in range(0, image.shape[0], step):
            source = _pad(image[start : start + step], border)
            target = torch.empty_like(source)
            for _ in range(iterations):
                _spread(source, target, around, offsets, border)
                source, target = target, source
            output[start : start + step] = source[:, border : border + size[0], border : border + size[1]]
    return result


class PAMR:
    """Refinement guided by one batch of images; the weights are computed once.

    Args:
        image: Normalised pixels, (B, 3, H, W), or one image (3, H, W).
        iterations: Number of rounds, 10 in the NACLIP and ResCLIP code.
        dilations: Distances of the neighbours in pixels.
        size: Height and width to which the image is resized first (bilinear), if not its own.
    """

    def __init__(
        self,
        image: Tensor,
        iterations: int = 10,
        dilations: Sequence[int] = DILATIONS,
        size: tuple[int, int] | None = None,
    ):
        check_iterations(iterations)
        image = image[None] if image.ndim == 3 else image
        if size is not None and tuple(image.shape[-2:]) != tuple(size):
            image = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False)
        self.iterations, self.dilations = iterations, tuple(dilations)
        self.weights = affinity(image, dilations)

    def __call__(self, maps: Tensor) -> Tensor:
        """Refine (B, Q, h, w), or (Q, h, w) of a single image, to the image's size."""
        if maps.ndim == 3:
            return refine(maps[None], self.weights, self.dilations, self.iterations)[0]
        return refine(maps, self.weights, self.dilations, self.iterations)


def check_iterations(iterations: int) -> None:
    """Raise ValueError unless the number of rounds is positive."""
    if iterations < 1:
        raise ValueError(f"the number of PAMR iterations must be at least 1, got {iterations}; None leaves PAMR out")


def _row_blocks(height: int, row_values: int) -> Iterator[tuple[int, int]]:
    """Split rows so that one block has about `BLOCK_VALUES` values."""
    rows = max(1, BLOCK_VALUES // max(1, row_values))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _pad(maps: Tensor, border: int) -> Tensor:
    """Repeat the outer pixels of (C, H, W) maps."""
    return F.pad(maps[None], (border, border, border, border), mode="replicate")[0]


def _shifted(padded: Tensor, border: int, offset: tuple[int, int], top: int, bottom: int, width: int) -> Tensor:
    """View of what lies `offset` away from rows top..bottom, (C, rows, W)."""
    row, column = border + offset[0], border + offset[1]
    return padded[:, row + top : row + bottom, column : column + width]


def _spread(source: Tensor, target: Tensor, weights: Tensor, offsets: Sequence[tuple[int, int]], border: int) -> None:
    """One round from one padded buffer to the other, both (C, H + 2 border, W + 2 border)."""
    height, width = weights.shape[-2:]
    blocks = _row_blocks(height, width * source.shape[0]) if source.device.type == "cpu" else [(0, height)]
    for top, bottom in blocks:
        rows = _shifted(target, border, (0, 0), top, bottom, width)
        for index, offset in enumerate(offsets):
            values = _shifted(source, border, offset, top, bottom, width)
            if index == 0:
                torch.mul(values, weights[index, top:bottom], out=rows)
            else:
                rows.addcmul_(values, weights[index, top:bottom])
    inner_rows = slice(border, border + height)
    target[:, inner_rows, :border] = target[:, inner_rows, border : border + 1]
    target[:, inner_rows, border + width :] = target[:, inner_rows, border + width - 1 : border + width]
    target[:, :border] = target[:, border : border + 1]
    target[:, border + height :] = target[:, border + height - 1 : border + height]
