"""Multi-head attention pieces of one CLIP block, usable without calling the block itself.

The dense methods replace the attention of the last block, or read the attention maps of earlier ones. Both need the
projections of a block (`q_proj`, `k_proj`, `v_proj`, `out_proj`) but not its forward pass, so nothing of transformers
is patched and two methods can run on one model in one process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens are ordered CLS first, then the h*w patches row by row: L = h*w + 1.


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


def run_block(
    block: Any, hidden: Tensor, return_map: bool = False, return_heads: bool = False
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Run one unchanged CLIP block, with its attention map and its q, k, v if asked.

    The map is computed explicitly for this block alone; without it the attention is fused (SDPA).

    Args:
        block: A CLIP encoder layer.
        hidden: Block input, (B, L, W).
        return_map: Whether the softmaxed map is needed.
        return_heads: Whether the projections are needed.

    Returns:
        Block output (B, L, W); the map (B, heads, L, L) or None; q, k, v, each (B, heads, L, d), or None.
    """
    if not (return_map or return_heads):
        return block(hidden, attention_mask=None), None, None
    query, key, value = project_heads(block, hidden, "qkv")
    scale = block.self_attn.scale
    weights = attention_map(query, key, scale) if return_map else None
    attended = attend(query, key, value, scale) if weights is None else weights @ value
    hidden = hidden + block.self_attn.out_proj(merge_heads(attended))
    hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return hidden, weights, (query, key, value) if return_heads else None
