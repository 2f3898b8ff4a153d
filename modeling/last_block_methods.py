"""Methods that change only the last block of the image tower: CLIP, MaskCLIP, SCLIP, ClearCLIP, NACLIP.

Each runs the last block by hand: layer norm, its own attention over the values, output projection, and, where the
method keeps them, the residual and the feed-forward layer; then post-norm and projection on every token; the CLS token
takes part in the attention and is dropped at the end. With q, k, v of (B, heads, L, d) and s = d^-0.5:

| method | attention |
|---|---|
| clip | softmax(s q k^T) |
| maskclip | identity (each token keeps its own value) |
| sclip | softmax(s q q^T) + softmax(s k k^T), rows sum to 2 |
| clearclip | softmax(s q q^T) |
| naclip | softmax(s k k^T + G), G a Gaussian of the patch distance |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import attend, merge_heads, project_heads
from .block import add_projection, feed_forward
from .method import MethodContext, MethodSettings, register_method, setting

LAST_BLOCK_METHODS = ("clip", "maskclip", "sclip", "clearclip", "naclip")


@dataclass(frozen=True)
class LastBlockSettings(MethodSettings):
    """Settings shared by the methods of this file."""

    residual: bool = setting(False, "keep the residual connection around the attention of the last block")
    mlp: bool = setting(False, "keep the feed-forward layer (with its own residual) of the last block")


@dataclass(frozen=True)
class ClipSettings(LastBlockSettings):
    """Plain CLIP keeps everything."""

    residual: bool = setting(True, "keep the residual connection around the attention of the last block")
    mlp: bool = setting(True, "keep the feed-forward layer (with its own residual) of the last block")
    logit_scale: float | None = setting(40.0, "factor on the cosines; 40 in the SCLIP and NACLIP code")


@dataclass(frozen=True)
class MaskClipSettings(LastBlockSettings):
    """MaskCLIP as re-implemented in the ClearCLIP code."""

    logit_scale: float | None = setting(50.0, "factor on the cosines; 50 in the ClearCLIP code")


@dataclass(frozen=True)
class SclipSettings(ClipSettings):
    """SCLIP keeps residual and feed-forward layer; both False gives the variant of the ClearCLIP code."""


@dataclass(frozen=True)
class ClearClipSettings(LastBlockSettings):
    """ClearCLIP drops residual and feed-forward layer."""

    logit_scale: float | None = setting(50.0, "factor on the cosines; 50 in the ClearCLIP code")


@dataclass(frozen=True)
class NaclipSettings(LastBlockSettings):
    """NACLIP's "reduced" architecture with neighbourhood attention."""

    logit_scale: float | None = setting(40.0, "factor on the cosines; 40 in the NACLIP code")
    gaussian_std: float = setting(5.0, "standard deviation of the neighbourhood Gaussian, in patches")
    attention: str = setting(
        "neighbour", '"neighbour" adds the Gaussian to k-k scores, "kk" leaves it out, "neighbour_only" is the Gaussian'
    )

    def __post_init__(self) -> None:
        if self.gaussian_std <= 0:
            raise ValueError(f"gaussian_std must be positive, got {self.gaussian_std}")
        if self.attention not in ("neighbour", "kk", "neighbour_only"):
            raise ValueError(f'attention must be "neighbour", "kk" or "neighbour_only", got {self.attention!r}')


def finish_block(context: MethodContext, attended: Tensor, residual: bool, mlp: bool) -> Tensor:
    """From attended values to projected patch features.

    Args:
        context: Supplies the last block, its input and the head.
        attended: Attention applied to the values, (B, heads, L, d).
        residual: Add the block's input.
        mlp: Apply the feed-forward layer with its residual.

    Returns:
        Patch features (B, N, D): CLS dropped, after post-norm and projection, not normalised.
    """
    block = context.tower.last_block
    project, merged = block.self_attn.out_proj, merge_heads(attended)  # (B, L, W)
    tokens = add_projection(context.trunk.last_input, project, merged) if residual else project(merged)
    if mlp:
        tokens = feed_forward(block, tokens)
    return context.tower.project(tokens[:, 1:])


def gaussian_bias(grid: tuple[int, int], std: float, device: torch.device | None = None) -> Tensor:
    """NACLIP's additive neighbourhood term with zero rows and columns for CLS, (L, L), peak 1, not normalised.

    G[i, j] = exp(-((y_i - y_j)^2 + (x_i - x_j)^2) / (2 std^2)) over the whole grid, distances in patches.

    Args:
        grid: Patches per column and row, (h, w).
        std: In patches.
        device: Of the result.
    """
    height, width = grid
    rows, columns = torch.arange(height, device=device).float(), torch.arange(width, device=device).float()
    along_y = torch.exp(-((rows[:, None] - rows) ** 2) / (2 * std**2))  # (h, h)
    along_x = torch.exp(-((columns[:, None] - columns) ** 2) / (2 * std**2))  # (w, w)
    return torch.nn.functional.pad(torch.kron(along_y, along_x), (1, 0, 1, 0))


@register_method(
    "clip",
    settings=ClipSettings,
    paper="Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021",
    reference="the vanilla setting of the SCLIP and NACLIP code",
    summary="q-k attention, residual and feed-forward kept: CLIP's own patch features",
    cost="1.0 of a plain image pass",
)
def clip(context: MethodContext, settings: ClipSettings) -> Tensor:
    """CLIP's unchanged last block, read at every patch."""
    query, key, value = project_heads(context.tower.last_block, context.trunk.last_input, "qkv")
    attended = attend(query, key, value, context.tower.last_block.self_attn.scale)
    return finish_block(context, attended, settings.residual, settings.mlp)


@register_method(
    "maskclip",
    settings=MaskClipSettings,
    paper="Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022",
    reference="re-implementation in the ClearCLIP code ad68a40 (the original code was not at hand)",
    summary="no attention: every patch keeps its own value vector",
    cost="below 1.0 of a plain image pass",
)
def maskclip(context: MethodContext, settings: MaskClipSettings) -> Tensor:
    """Values projected without mixing them over positions."""
    (value,) = project_heads(context.tower.last_block, context.trunk.last_input, "v")
    return finish_block(context, value, settings.residual, settings.mlp)


@register_method(
    "sclip",
    settings=SclipSettings,
    paper="Wang, Mei and Yuille, SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference, ECCV 2024",
    reference="SCLIP code b56bd30",
    summary="correlative self-attention: q-q plus k-k softmax, summed",
    cost="1.0 of a plain image pass",
)
def sclip(context: MethodContext, settings: SclipSettings) -> Tensor:
    """Softmax(q q^T) + softmax(k k^T), not halved: the rows sum to 2, as in the reference code."""
    block = context.tower.last_block
    query, key, value = project_heads(block, context.trunk.last_input, "qkv")
    scale = block.self_attn.scale
    attended = attend(query, query, value, scale) + attend(key, key, value, scale)
    return finish_block(context, attended, settings.residual, settings.mlp)


@register_method(
    "clearclip",
    settings=ClearClipSettings,
    paper="Lan et al., ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference, ECCV 2024",
    reference="ClearCLIP code ad68a40 with model_type ClearCLIP",
    summary="q-q attention without residual and feed-forward; the host that ARM is trained on",
    cost="below 1.0 of a plain image pass",
)
def clearclip(context: MethodContext, settings: ClearClipSettings) -> Tensor:
    """Softmax(q q^T) over the values, output projection only."""
    block = context.tower.last_block
    query, value = project_heads(block, context.trunk.last_input, "qv")
    attended = attend(query, query, value, block.self_attn.scale)
    return finish_block(context, attended, settings.residual, settings.mlp)


@register_method(
    "naclip",
    settings=NaclipSettings,
    paper="Hajimiri, Ben Ayed and Dolz, Pay Attention to Your Neighbours, WACV 2025",
    reference="NACLIP code 0cac3a6 without its PAMR post-step",
    summary="k-k attention plus a Gaussian of the patch distance, no residual, no feed-forward",
    cost="below 1.0 of a plain image pass",
    variants={"naclip with PAMR": "--pamr 10"},
)
def naclip(context: MethodContext, settings: NaclipSettings) -> Tensor:
    """Softmax(k k^T + G); G is added to the scaled scores of every head and leaves CLS alone."""
    block, hidden = context.tower.last_block, context.trunk.last_input
    scale = block.self_attn.scale
    if settings.attention == "kk":
        key, value = project_heads(block, hidden, "kv")
        attended = attend(key, key, value, scale)
        return finish_block(context, attended, settings.residual, settings.mlp)
    bias = gaussian_bias(context.trunk.grid, settings.gaussian_std, hidden.device)
    if settings.attention == "neighbour":
        key, value = project_heads(block, hidden, "kv")
        attended = attend(key, key, value, scale, bias)
    else:
        query, key, value = project_heads(block, hidden, "qkv")
        # The reference scales G by the mean product of token norms, one number per image.
        norms = query.norm(dim=-1).mean(dim=-1) * key.norm(dim=-1).mean(dim=-1)  # (B, heads)
        strength = scale * norms.mean(dim=-1)
        weights = (strength[:, None, None, None] * bias).softmax(dim=-1).to(value.dtype)  # (B, 1, L, L)
        attended = weights @ value
    return finish_block(context, attended, settings.residual, settings.mlp)
