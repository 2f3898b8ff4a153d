"""Multi-head attention pieces of one CLIP block, usable without calling the block itself.

The dense methods replace the attention of the last block, or read the attention maps of earlier ones. Both need the
projections of a block (`q_proj`, `k_proj`, `v_proj`, `out_proj`) but not its forward pass, so nothing of transformers
is patched and two methods can run on one model in one process.

A map of all heads of a 21 x 28 grid has 17 MB; written, read and changed as a whole it costs more than the products
around it. Rows of a map do not depend on each other, so on the CPU they are computed, used and forgotten in blocks that
stay in the processor's cache (`row_blocks`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens are ordered CLS first, then the h*w patches row by row: L = h*w + 1.

BLOCK_VALUES = 2**19  # 2 MiB of float32, what a present core has as a cache of its own


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """Split the channels into heads: (B, L, W) -> (B, heads, L, W / heads).

    Args:
        states: (B, L, W).
        num_heads: Must divide W.
    """
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """Undo `split_heads`: (B, heads, L, d) -> (B, L, heads * d)."""
    return states.transpose(1, 2).flatten(2)


def project_heads(block: Any, hidden: Tensor, names: str) -> tuple[Tensor, ...]:
    """Project the block's normalised input to the named roles.

    Args:
        block: A CLIP encoder layer.
        hidden: Block input, (B, L, W); `layer_norm1` is applied here.
        names: Any of the letters "q", "k", "v"; only these projections are computed.

    Returns:
        One (B, heads, L, d) tensor per letter, in the order of `names`.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    return tuple(split_heads(getattr(attention, f"{name}_proj")(normed), attention.num_heads) for name in names)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax(scale * query key^T + bias) value without materialising the map, (B, heads, L, d).

    Args:
        query: (B, heads, L, d).
        key: (B, heads, M, d).
        value: (B, heads, M, d).
        scale: Factor on the products.
        bias: Added to them, of a shape that broadcasts to (B, heads, L, M).
    """
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attention_map(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax(scale * query key^T + bias), (B, heads, L, L); the softmax runs in float32.

    Args:
        query: (B, heads, L, d).
        key: (B, heads, M, d).
        scale: Factor on the products.
        bias: Added to them.
    """
    scores = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


def plain_cpu(states: Tensor) -> bool:
    """Whether to take paths made for the CPU that know neither gradients nor the recording of a graph."""
    return states.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def row_blocks(maps: int, length: int) -> tuple[list[slice], list[slice]]:
    """Cut `maps` square maps of side `length` into blocks of about `BLOCK_VALUES` values a thread.

    Args:
        maps: Number of maps.
        length: Their side.

    Returns:
        The groups of maps that go together, and the parts of their rows; the first of each are the largest.
    """
    threads = torch.get_num_threads()
    together = max(1, BLOCK_VALUES // length**2 * threads)  # each thread works on maps of its own, or all on one
    rows = length if length**2 <= BLOCK_VALUES else -(-length // -(-(length**2) // (BLOCK_VALUES * threads)))
    groups = [slice(first, min(first + together, maps)) for first in range(0, maps, together)]
    return groups, [slice(top, min(top + rows, length)) for top in range(0, length, rows)]


def block_space(like: Tensor, count: int = 1) -> Tensor:
    """Memory for `count` blocks of the maps of (..., heads, L, d); the same for all, so that it stays in the cache.

    Args:
        like: Of the type and on the device wanted, (..., heads, L, d).
        count: Number of blocks.
    """
    groups, parts = row_blocks(*like.shape[-3:-1])
    return like.new_empty(count, groups[0].stop * parts[0].stop * like.shape[-2])


def products(left: Tensor, right: Tensor, space: Tensor) -> Tensor:
    """left right^T in memory that is there already, (n, L, M).

    Args:
        left: (n, L, d).
        right: (n, M, d).
        space: Flat, with room for the result.
    """
    shape = (len(left), left.shape[1], right.shape[1])
    return torch.bmm(left, right.transpose(1, 2), out=space[: math.prod(shape)].view(shape))


def exponentials(query: Tensor, key: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators of softmax(query key^T), and what they are to be multiplied with: one over the sums of rows.

    Softmax does not change when a row is shifted. The search for the largest of each row and the subtraction are two
    more passes over the map, so they are left to maps whose sums leave the safe range of float32.

    Args:
        query: (n, L, d).
        key: (n, M, d).
        space: See `products`.

    Returns:
        (n, L, M) and (n, L, 1), float32.
    """
    weights = products(query, key, space).float().exp_()
    sums = weights.sum(dim=-1, keepdim=True)
    least, most = sums.aminmax()
    if not (least > 1e-20 and most < 1e30):
        weights = products(query, key, space).float()
        weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
        sums = weights.sum(dim=-1, keepdim=True)
    return weights, sums.reciprocal_()


def attend_and_add(query: Tensor, key: Tensor, value: Tensor, scale: float, totals: Sequence[Tensor]) -> Tensor:
    """Softmax(scale * query key^T) value, block by block; the maps are added to `totals`. Without gradients.

    Args:
        query, key, value: (B, heads, L, d).
        scale: Factor on the products.
        totals: Sums of maps so far, each (B, heads, L, L) float32; they are changed.

    Returns:
        (B, heads, L, d).
    """
    query, attended, space = query * scale, torch.empty_like(value), block_space(value)[0]
    groups, parts = row_blocks(*value.shape[1:3])
    for image in range(len(value)):  # of an image all heads are views, of a batch they would have to be copied
        for maps in groups:
            own, memory = key[image, maps], value[image, maps]
            for rows in parts:
                weights, share = exponentials(query[image, maps, rows], own, space)
                for total in totals:
                    total[image, maps, rows].addcmul_(weights, share)
                if value.dtype == torch.float32:
                    attended[image, maps, rows] = torch.bmm(weights, memory).mul_(share)
                else:
                    attended[image, maps, rows] = torch.bmm(weights.mul_(share).to(value.dtype), memory)
    return attended
