"""One unchanged CLIP block: attention and feed-forward layer, each added to its input.

On the CPU without gradients the residual is what the last product of each part is added to, and the activation writes
to the place of its input, where transformers' block takes further passes over new memory (measured: 0.96 of its time).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation

from .attention import attend, attend_and_add, attention_map, merge_heads, plain_cpu, project_heads

QUICK_GELU = 1.702  # x sigmoid(1.702 x), of CLIP's authors


def add_projection(residual: Tensor, linear: nn.Module, states: Tensor) -> Tensor:
    """residual + linear(states).

    Args:
        residual: (B, L, W).
        linear: A linear layer, or what an adapter put in its place.
        states: (B, L, V).
    """
    if not (plain_cpu(states) and is_plain(linear)):
        return residual + linear(states)
    return _add_product(residual, linear, states)


def feed_forward(block: Any, hidden: Tensor) -> Tensor:
    """hidden + MLP(layer_norm2(hidden)), (B, L, W).

    Args:
        block: A CLIP encoder layer.
        hidden: Its state after the attention, (B, L, W).
    """
    mlp, normed = block.mlp, block.layer_norm2(hidden)
    quick = isinstance(mlp.activation_fn, QuickGELUActivation) and not has_hooks(mlp)
    if not (quick and plain_cpu(normed) and is_plain(mlp.fc1) and is_plain(mlp.fc2)):
        return hidden + mlp(normed)
    # With y = 1.702 fc1(x) the activation is silu(y) / 1.702; both factors go into products that are done anyway.
    bias, rows = QUICK_GELU * mlp.fc1.bias, normed.flatten(0, -2)
    inner = F.silu(torch.addmm(bias, rows, mlp.fc1.weight.T, alpha=QUICK_GELU), inplace=True)
    return _add_product(hidden, mlp.fc2, inner, 1 / QUICK_GELU)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is nothing but weight and bias in float32: no adapter, quantisation, autocast or hook."""
    return (
        type(linear) is nn.Linear
        and linear.bias is not None
        and linear.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not has_hooks(linear)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see the calls of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _add_product(residual: Tensor, linear: Any, states: Tensor, factor: float = 1.0) -> Tensor:
    total = (residual + linear.bias).contiguous()
    rows = total.flatten(0, -2)  # a view
    torch.addmm(rows, states.reshape(-1, states.shape[-1]), linear.weight.T, alpha=factor, out=rows)
    return total


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
    own = not plain_cpu(hidden) or any(has_hooks(part) for part in (block, block.self_attn, block.mlp))
    if own and not (return_map or return_heads or totals):
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
    hidden = feed_forward(block, add_projection(hidden, block.self_attn.out_proj, merge_heads(attended)))
    return hidden, weights, (query, key, value) if return_heads else None
