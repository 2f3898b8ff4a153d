"""The Attention Refinement Module itself (Liu, Zhu and Shi, 2026, section 3.2), as plain modules without CLIP.

    F_m = MLP([F_i; F_j])                              hidden states of two blocks, to D channels
    F'  = cross-attention(query F_m, key = value F_d)  Eq. 2
    F'' = self-attention(F')                           Eq. 3
    R_v = scale blocks(F''), (D, H', W')               transposed convolutions
    M_r = E_t R_v                                      Eq. 4

The equations are the generic single-head form; here the blocks have projections, heads, pre-LayerNorm, a residual on
the query path and a feed-forward layer, as a stack of "blocks" needs to be trainable.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import attention_map, plain_cpu, split_heads
from .block import add_projection, has_hooks

BAND_VALUES = 3 * 2**18  # 3 MiB of float32, which stay in the cache
PRODUCT_BANDS = 2  # that share a product, for whose weights to be packed less often


def _eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
):
    weights = attention_map(query, key, scaling)
    return (weights @ value).transpose(1, 2), weights


class RefinementAttention(nn.Module):
    """Multi-head attention of queries over a memory; the implementation follows `config._attn_implementation`."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor, memory: Tensor, residual: Tensor, dropout: nn.Dropout) -> Tensor:
        """Attend from `states` (B, N, D) over `memory` (B, M, D), added to a residual.

        Args:
            states: Queries, (B, N, D).
            memory: Keys and values, (B, M, D).
            residual: (B, N, D).
            dropout: Applied to what is added.
        """
        query = split_heads(self.q_proj(states), self.num_heads)
        key = split_heads(self.k_proj(memory), self.num_heads)
        value = split_heads(self.v_proj(memory), self.num_heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        attended, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return _add_layer(residual, self.out_proj, attended.flatten(2), dropout)  # (B, N, heads, d) -> (B, N, D)


class FeedForward(nn.Sequential):
    """Linear - GELU - Linear, added to a residual."""

    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, states: Tensor, residual: Tensor, dropout: nn.Dropout) -> Tensor:  # type: ignore[override]
        return _add_layer(residual, self[2], self[1](self[0](states)), dropout)


def _add_layer(residual: Tensor, linear: nn.Module, states: Tensor, dropout: nn.Dropout) -> Tensor:
    """residual + dropout(linear(states)); without dropout the sum rides on the product where it can."""
    if dropout.training and dropout.p:
        return residual + dropout(linear(states))
    return add_projection(residual, linear, states)


class RefinementBlock(GradientCheckpointingLayer):
    """Pre-norm attention with residual, then an optional feed-forward layer with residual.

    With `memory` it is a cross-attention block (Eq. 2), without it a self-attention block (Eq. 3).
    """

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.attention_norm = nn.LayerNorm(width)
        self.attention = RefinementAttention(config)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn_norm: Any = nn.LayerNorm(width) if config.ffn_ratio else None
        self.ffn: Any = FeedForward(width, int(width * config.ffn_ratio)) if config.ffn_ratio else None

    def forward(self, states: Tensor, memory: Tensor | None = None) -> Tensor:
        """Refine `states` (B, N, D), looking at `memory` (B, M, D) or at themselves.

        Args:
            states: What is refined, (B, N, D).
            memory: What it looks at, (B, M, D); None is `states`.
        """
        normed = self.attention_norm(states)
        states = self.attention(normed, normed if memory is None else memory, states, self.dropout)
        return states if self.ffn is None else self.ffn(self.ffn_norm(states), states, self.dropout)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, D, H, W) map, times a factor if one is given."""

    def forward(self, maps: Tensor, factor: Tensor | float | None = None) -> Tensor:
        maps = maps.permute(0, 2, 3, 1)
        if factor is None:
            normed = super().forward(maps)
        else:  # in the affine part it costs nothing
            normed = F.layer_norm(maps, self.normalized_shape, self.weight * factor, self.bias * factor, self.eps)
        return normed.permute(0, 3, 1, 2)


class ScaleBlock(nn.Module):
    """Double the resolution of a map: (B, D, h, w) -> (B, D, 2h, 2w), times a factor if one is given.

    With class embeddings (Q, D) the result is their product with that, (B, Q, 2h, 2w).

    "eomt" is the block of that name in EoMT (Kerssies et al., CVPR 2025), which the paper's wording matches; "plain" is
    a transposed convolution and GELU.
    """

    def __init__(self, width: int, kind: str = "eomt"):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.activation = nn.GELU()
        self.depthwise: Any = (
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False) if kind == "eomt" else None
        )
        self.norm: Any = ChannelNorm(width) if kind == "eomt" else None

    def forward(
        self, maps: Tensor, factor: Tensor | float | None = None, class_embeddings: Tensor | None = None
    ) -> Tensor:
        if plain_cpu(maps) and self._is_plain(maps.dtype):
            return self._by_bands(maps, factor, class_embeddings)
        if maps.device.type == "cpu":
            matrix, bias = self._matrix()
            tiles = self.activation(_tiles(maps.permute(0, 2, 3, 1), matrix).add_(bias))  # (B, h, 2, w, 2, D)
            maps = tiles.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        else:
            maps = self.activation(self.upsample(maps))
        if self.depthwise is not None:
            maps = self.norm(self.depthwise(maps), factor)
        elif factor is not None:
            maps = maps * factor
        return maps if class_embeddings is None else refinement_map(maps, class_embeddings)

    def train(self, mode: bool = True) -> "ScaleBlock":
        """As every module's; it is called after loading, and puts the channels of the kernel last in memory.

        There `_matrix` is a view. Values and saved files do not change.
        """
        if not torch.is_inference_mode_enabled():
            self.upsample.to(memory_format=torch.channels_last)
        return super().train(mode)

    def _is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the parts are what this class made of them: no adapter, autocast or hook, and of the maps' type."""
        kinds = (nn.ConvTranspose2d, nn.Conv2d, nn.GELU, ChannelNorm)
        parts = all(type(part) in kinds and not has_hooks(part) for part in self.children())
        return parts and self.upsample.weight.dtype == dtype and not torch.is_autocast_enabled("cpu")

    def _matrix(self) -> tuple[Tensor, Tensor]:
        """Weight of the transposed convolution as that of a linear layer, (D, 2*2*D), and its bias, (D,)."""
        assert self.upsample.bias is not None
        return self.upsample.weight.permute(0, 2, 3, 1).flatten(1), self.upsample.bias

    def _by_bands(self, maps: Tensor, factor: Tensor | float | None, class_embeddings: Tensor | None) -> Tensor:
        """The same on the CPU without gradients, band by band: what is not yet the result stays in the cache.

        The depthwise convolution sees one row more on either side, so its rows follow one behind.
        """
        batch, width, height, columns = maps.shape
        words = None if class_embeddings is None else class_embeddings.to(maps.dtype).T  # (D, Q)
        pixels, (matrix, bias) = maps.permute(0, 2, 3, 1), self._matrix()  # (B, h, w, D)
        result = pixels.new_empty(batch, 2 * height, 2 * columns, width if words is None else words.shape[1])
        rows = -(-height // -(-4 * width * columns * height // BAND_VALUES))  # of equal bands
        many = min(height, PRODUCT_BANDS * rows)
        space = pixels.new_empty(many * columns, 4 * width)
        band = pixels.new_empty(2 * rows + 3, 2 * columns, width)  # two rows before, one behind

        def put(place: Tensor, found: Tensor) -> None:  # (n, 2w, D)
            if words is None:
                place.copy_(found)
            else:
                torch.matmul(found, words, out=place)

        for image, own in zip(result, pixels, strict=True):
            band[:2].zero_()  # the convolution's border
            for top in range(0, height, rows):
                bottom = min(top + rows, height)
                new, end = 2 * (bottom - top), bottom == height
                doubled = band[2 : 2 + new]
                if top % many == 0:
                    some = own[None, top : top + many]
                    tiles = _tiles(some, matrix, out=space[: some.shape[1] * columns])[0]  # (n, 2, w, 2, D)
                tile = tiles[top % many : top % many + bottom - top]
                place = torch.add(tile, bias, out=doubled.view(tile.shape))  # here faster than in the product
                torch.ops.aten.gelu.out(place, approximate=self.activation.approximate, out=place)
                if self.depthwise is None:
                    put(image[2 * top : 2 * bottom], doubled if factor is None else doubled * factor)
                    continue
                if end:
                    band[2 + new].zero_()
                seen = band[None, 1 if top == 0 else 0 : 2 + new + end].permute(0, 3, 1, 2)
                found = self.norm(F.conv2d(seen, self.depthwise.weight, padding=(0, 1), groups=width), factor)
                put(image[max(0, 2 * top - 1) : 2 * bottom - 1 + end], found[0].permute(1, 2, 0))
                band[:2] = band[new : 2 + new]
        return result.permute(0, 3, 1, 2)


def _tiles(pixels: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Transposed convolution without bias: (B, h, w, D) -> (B, h, 2, w, 2, D), a view; rows and columns lie doubled.

    With stride 2 its 2x2 kernel has no overlap, so it is one product per pixel, several times faster on the CPU than
    the general kernel.
    """
    products = torch.mm(pixels.reshape(-1, pixels.shape[-1]), weight, out=out)
    return products.view(*pixels.shape[:3], 2, 2, -1).transpose(2, 3)


class IntermediateFusion(nn.Module):
    """Concatenate hidden states of several blocks and map them to D channels: F_m, (B, N, D)."""

    def __init__(self, config: Any):
        super().__init__()
        width = len(config.fusion_layers) * config.clip_config.vision_config.hidden_size
        self.norm = nn.LayerNorm(width) if config.input_norm else None
        layers: list[nn.Module] = [nn.Linear(width, config.hidden_size)]
        if config.mlp_layers == 2:
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        states = torch.cat(tuple(hidden_states), dim=-1)
        return self.mlp(states if self.norm is None else self.norm(states))


class AttentionRefinementModule(nn.Module):
    """From hidden states and a host's patch features to R_v, the class-independent refinement features.

    Args:
        config: An `ARMConfig`; the fields read here are documented there.
    """

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.fusion = IntermediateFusion(config)
        self.deep_norm = nn.LayerNorm(width) if config.deep_norm else None
        self.cross_attention = nn.ModuleList(RefinementBlock(config) for _ in range(config.num_cross_attention_layers))
        self.self_attention = nn.ModuleList(RefinementBlock(config) for _ in range(config.num_self_attention_layers))
        self.scale_blocks = nn.ModuleList(
            ScaleBlock(width, config.scale_block) for _ in range(config.num_scale_blocks_for_patch)
        )
        self.output_gain = nn.Parameter(torch.zeros(())) if config.zero_init else None
        self.refinement_scale = config.refinement_scale

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        patch_features: Tensor,
        grid: tuple[int, int],
        class_embeddings: Tensor | None = None,
    ) -> Tensor:
        """Compute R_v, or M_r of given words.

        Args:
            hidden_states: Patch tokens (without CLS) of the fusion layers, each (B, N, W) on `grid`.
            patch_features: F_d of the host after projection, (B, M, D); M may differ from N.
            grid: Patches per column and row (h, w), N = h*w.
            class_embeddings: E_t, (Q, D). With fewer words than channels it saves memory to give them here.

        Returns:
            R_v, (B, D, H', W') with H' = h * 2^blocks; with words M_r = E_t R_v (Eq. 4), (B, Q, H', W').
        """
        states = self.fusion(hidden_states)  # F_m (B, N, D)
        memory = patch_features if self.deep_norm is None else self.deep_norm(patch_features)
        for block in self.cross_attention:
            states = block(states, memory)
        for block in self.self_attention:
            states = block(states)
        maps = states.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        factor = self._factor()
        last = len(self.scale_blocks) - 1
        for index, scale_block in enumerate(self.scale_blocks):
            maps = scale_block(maps, factor, class_embeddings) if index == last else scale_block(maps)
        if last >= 0:
            return maps
        maps = maps if factor is None else maps * factor
        return maps if class_embeddings is None else refinement_map(maps, class_embeddings)

    def _factor(self) -> Tensor | float | None:
        """What R_v is multiplied with."""
        if self.output_gain is None:
            return None if self.refinement_scale == 1.0 else self.refinement_scale
        return self.output_gain * self.refinement_scale


def refinement_map(refinement_features: Tensor, class_embeddings: Tensor) -> Tensor:
    """M_r = E_t R_v (Eq. 4): (B, D, H', W') and (Q, D) -> (B, Q, H', W').

    Args:
        refinement_features: R_v, (B, D, H', W').
        class_embeddings: E_t, (Q, D).
    """
    return torch.einsum("bdhw,qd->bqhw", refinement_features, class_embeddings.to(refinement_features.dtype))


def fuse(coarse: Tensor, refinement: Tensor) -> Tensor:
    """M_f = M_c + M_r (Eq. 5), M_c resized bilinearly to the resolution of M_r.

    Args:
        coarse: M_c, (B, Q, h, w).
        refinement: M_r, (B, Q, H', W').
    """
    if coarse.shape[-2:] != refinement.shape[-2:]:
        coarse = F.interpolate(coarse, size=refinement.shape[-2:], mode="bilinear", align_corners=False)
    return coarse + refinement
