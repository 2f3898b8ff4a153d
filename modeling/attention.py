"""Multi-head attention pieces of one CLIP block, usable without calling the block itself.

The dense methods replace the attention of the last block, or read the attention maps of earlier ones. Both need the
projections of a block (`q_proj`, `k_proj`, `v_proj`, `out_proj`) but not its forward pass, so nothing of transformers
is patched and two methods can run on one model in one process.

A map of all heads of a 21 x 28 grid has 17 MB; written, read and changed as a whole it costs more than the products
around it. Rows of a map do not depend on each other, so on the CPU they are computed, used and forgotten in blocks that
stay in the processor's cache (`row_blocks`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens are ordered CLS first, then the h*w patches row by row: L = h*w + 1.

BLOCK_VALUES = 2**18  # 1 MiB of float32, half of a present core's own cache


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


def row_blocks(maps: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cut `maps` square maps of side `length` into blocks of about `BLOCK_VALUES` values: which maps, which rows.

    Args:
        maps: Number of maps.
        length: Their side.
    """
    together = max(1, BLOCK_VALUES // length**2)
    rows = -(-length // -(-(length**2) // BLOCK_VALUES))
    for first in range(0, maps, together):
        for top in range(0, length, rows):
            yield slice(first, first + together), slice(top, top + rows)


def attend_and_add(query: Tensor, key: Tensor, value: Tensor, scale: float, totals: Sequence[Tensor]) -> Tensor:
    """Softmax(scale * query key^T) value, block by block; the maps are added to `totals`. Without gradients.

    Args:
        query, key, value: (B, heads, L, d).
        scale: Factor on the products.
        totals: Sums of maps so far, each (B, heads, L, L) float32 and contiguous; they are changed.

    Returns:
        (B, heads, L, d).
    """
    shape = query.shape
    query, key, value = (states.flatten(0, 1).contiguous() for states in (query * scale, key, value))
    sums = [total.view(-1, shape[2], shape[2]) for total in totals]
    attended = torch.empty_like(value)
    for maps, rows in row_blocks(*query.shape[:2]):
        weights = torch.bmm(query[maps, rows], key[maps].transpose(1, 2)).softmax(dim=-1, dtype=torch.float32)
        for total in sums:
            total[maps, rows] += weights
        attended[maps, rows] = torch.bmm(weights.to(value.dtype), value[maps])
    return attended.unflatten(0, shape[:2])


def run_block(
    block: Any, hidden: Tensor, return_map: bool = False, return_heads: bool = False, totals: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Run one unchanged CLIP block, with its attention map and its q, k, v if asked.

    The map is computed explicitly for this block alone; without it the attention is fused (SDPA).

    Args:
        block: A CLIP encoder layer.
        hidden: Block input, (B, L, W).
        return_map: Whether the softmaxed map is needed.
        return_heads: Whether the projections are needed.
        totals: Sums of maps to which this block's is added in place, where no map is returned (see `attend_and_add`).

    Returns:
        Block output (B, L, W); the map (B, heads, L, L) or None; q, k, v, each (B, heads, L, d), or None.
    """
    if not (return_map or return_heads or totals):
        return block(hidden, attention_mask=None), None, None
    query, key, value = project_heads(block, hidden, "qkv")
    scale = block.self_attn.scale
    weights = attention_map(query, key, scale) if return_map else None
    if weights is not None:
        attended = weights @ value
    elif totals:
        attended = attend_and_add(query, key, value, scale, totals)
    else:
        attended = attend(query, key, value, scale)
    hidden = hidden + block.self_attn.out_proj(merge_heads(attended))
    hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return hidden, weights, (query, key, value) if return_heads else None
