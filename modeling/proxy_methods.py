"""Methods that let another vision model say which patches belong together: ProxyCLIP and CorrCLIP.

Both replace the attention of CLIP's last block by the cosines S between the patch features of a vision foundation
model (DINO for example), one map for all heads, on that model's own grid; CLIP's values are resized to it and CLS is
left out.

| method | attention |
|---|---|
| proxyclip | softmax(gamma S) over the pairs with S >= beta mean(S) |
| corrclip | softmax(4 S) over the pairs inside one region |

They read what other models give from `outside` (see `outside.py`): both need `"proxy_features"`, CorrCLIP `"regions"`
too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, merge_heads, project_heads
from .block import add_projection, feed_forward
from .method import Method, MethodContext, MethodSettings, register_method, setting
from .outside import proxy_features, region_maps
from .regions import merge_regions, resize_nearest
from .trunk import TrunkRequest

PROXY_METHODS = ("proxyclip", "corrclip")

CHUNK_VALUES = 2**22  # similarities held at once: 16 MiB, and as much for the weights

Keep = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class ProxyClipSettings(MethodSettings):
    """ProxyCLIP as its code has it."""

    logit_scale: float | None = setting(40.0, "factor on the cosines; 40 in the ProxyCLIP code")
    beta: float = setting(1.2, "share of the mean similarity below which a pair of patches is left out")
    gamma: float = setting(3.0, "factor on the similarities before the softmax")

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")


@dataclass(frozen=True)
class CorrClipSettings(MethodSettings):
    """CorrCLIP, version 1, as its code has it."""

    logit_scale: float | None = setting(40.0, "factor on the cosines; 40 in the CorrCLIP code")
    attention_scale: float = setting(4.0, "factor on the similarities before the softmax")
    merge_distance: float | None = setting(
        0.2, "regions whose mean features are closer than this become one; None leaves them as they are"
    )
    unsegmented: int | None = setting(
        None, "id of pixels outside of all regions; None takes the lowest id of each window, as the code does"
    )
    unsegmented_scope: str = setting(
        "similar",
        'with whom patches outside of all regions interact: "similar" (any patch with more than the mean similarity, '
        'as the code has it) or "unsegmented" (only with each other)',
    )
    spatial_weight: float = setting(1.0, "weight of the spatial branch (mean of middle blocks); 0 leaves it out")
    spatial_blocks: tuple[int, ...] | None = setting(
        None, "blocks whose outputs it averages, from 0; None takes 5-9 of 12, 10-21 of 24, 2-29 of 32, as the code"
    )
    semantic_weight: float = setting(0.5, "weight of the semantic branch (a CLS token per region); 0 leaves it out")

    def __post_init__(self) -> None:
        if self.attention_scale <= 0:
            raise ValueError(f"attention_scale must be positive, got {self.attention_scale}")
        if self.unsegmented_scope not in ("similar", "unsegmented"):
            raise ValueError(f'unsegmented_scope must be "similar" or "unsegmented", got {self.unsegmented_scope!r}')
        if self.spatial_blocks is not None and not self.spatial_blocks:
            raise ValueError("spatial_blocks is empty; name a block, or set spatial_weight to 0")

    def middle_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The spatial branch's blocks in a tower of `num_blocks`; depths that the code has not follow its 5 of 12."""
        if self.spatial_blocks is not None:
            return tuple(self.spatial_blocks)
        start = 2 if num_blocks == 32 else 5 * num_blocks // 12
        return tuple(range(start, max(num_blocks - 2, start + 1)))


def mean_similarity(features: Tensor) -> Tensor:
    """Mean over all pairs of the cosines of unit features (B, N, C), (B, 1, 1); no map is made."""
    return features.mean(dim=1).square().sum(dim=-1)[:, None, None]


def values_on_grid(context: MethodContext, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of the last block after its output projection, (B, N', W), resized from CLIP's grid to another.

    The projection comes before attention and resizing: both are weighted means with weights that sum to 1 and that all
    heads share, so the order does not matter, and CLIP's grid is mostly the smaller one.

    Args:
        context: Supplies the block.
        hidden: Input of the block, (B, 1 + N, W); CLS is dropped.
        grid: Height and width of the other grid.
    """
    block, own = context.tower.last_block, context.trunk.grid
    attention = block.self_attn
    values = attention.out_proj(attention.v_proj(block.layer_norm1(hidden[:, 1:])))
    if grid == own:
        return values
    maps = values.transpose(1, 2).unflatten(2, own)
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def correlate(features: Tensor, values: Tensor, scale: float, keep: Keep) -> Tensor:
    """Softmax(scale * S) values over the pairs that `keep` allows, S the cosines of the features; rows in chunks.

    Args:
        features: Unit features, (B, N, C).
        values: (B, N, W).
        scale: Factor on the cosines.
        keep: From cosines (B, n, N) and the slice of rows they belong to, a boolean mask. A row without any pair
            attends everywhere, which happens where all features are alike.
    """
    step = max(1, CHUNK_VALUES // (features.shape[0] * features.shape[1]))
    parts = []
    for start in range(0, features.shape[1], step):
        rows = slice(start, start + step)
        similarity = features[:, rows] @ features.transpose(1, 2)  # (B, n, N)
        left_out = ~keep(similarity, rows)
        left_out &= ~left_out.all(dim=-1, keepdim=True)
        weights = similarity.mul_(scale).masked_fill_(left_out, -torch.inf).softmax(dim=-1)
        parts.append(weights.to(values.dtype) @ values)
    return torch.cat(parts, dim=1)


@register_method(
    "proxyclip",
    settings=ProxyClipSettings,
    paper="Lan et al., ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation, ECCV 2024",
    reference="ProxyCLIP code e7b767f, with its transposed token grid of non-square images put right",
    summary='attention from the patch similarities of another vision model; needs outside["proxy_features"]',
    cost="about 1.0 of a plain image pass (1.15 on a grid twice as fine), and one pass of the other model",
)
def proxyclip(context: MethodContext, settings: ProxyClipSettings) -> Tensor:
    """Proxy attention instead of the last block's own; no residual, no feed-forward layer, no CLS.

    The code takes gamma (S - beta mean(S)), leaves out what is negative and applies the softmax; the subtraction
    cancels there. The result lies on the other model's grid, (B, h, w, D).
    """
    features, grid = proxy_features(context, "proxyclip", "tokens")
    lowest = settings.beta * mean_similarity(features)
    values = values_on_grid(context, context.trunk.last_input, grid)
    attended = correlate(features, values, settings.gamma, lambda similarity, rows: similarity >= lowest)
    return context.tower.project(attended).unflatten(1, grid)


def merged_regions(settings: CorrClipSettings, regions: Tensor, grid: tuple[int, int], features: Tensor) -> Tensor:
    """Regions above 0 with close ones joined, and 0 outside of all regions; (B, H, W) as `regions`.

    Args:
        settings: Its `merge_distance` and `unsegmented`.
        regions: (B, H, W).
        grid: Patches per column and row.
        features: Unit features of the other model, (B, N, C).
    """
    free: Any = settings.unsegmented
    if free is None:
        free = resize_nearest(regions, grid).amin(dim=(1, 2), keepdim=True)
    regions = (regions - regions.min() + 1).masked_fill(regions == free, 0)
    if settings.merge_distance is None:
        return regions
    pairs = zip(regions, features, strict=True)
    return torch.stack([merge_regions(image, grid, known, settings.merge_distance) for image, known in pairs])


def scope(settings: CorrClipSettings, features: Tensor, regions: Tensor) -> Keep:
    """Which patches interact, from the region of each, (B, N), with 0 outside of all regions.

    Args:
        settings: Its `unsegmented_scope`.
        features: Unit features of the patches, (B, N, C).
        regions: Region of each patch, (B, N).
    """
    mean, free = mean_similarity(features), regions == 0

    def keep(similarity: Tensor, rows: slice) -> Tensor:
        same = regions[:, rows, None] == regions[:, None]
        if settings.unsegmented_scope == "unsegmented":
            return same
        return torch.where(free[:, rows, None] | free[:, None], similarity > mean, same)

    return keep


def region_tokens(context: MethodContext, regions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Post-normed CLS copy of each patch's region, (B, N', W) on another grid.

    The copies start as CLS and pass all blocks beside the ordinary tokens, which never see them; a copy attends to CLS
    and to the patches of its region, not to itself.

    Args:
        context: Supplies the blocks and their keys and values.
        regions: Region of each pixel, (B, H, W).
        grid: Height and width of the other grid.
    """
    tower, trunk = context.tower, context.trunk
    regions = resize_nearest(regions, trunk.grid)
    regions = torch.stack([image.unique(return_inverse=True)[1] for image in regions])  # (B, h, w), dense ids
    count = int(regions.max()) + 1  # images with fewer regions have copies that see CLS alone and are not used
    seen = regions.flatten(1)[:, None] == torch.arange(count, device=regions.device)[:, None]  # (B, R, N)
    seen = F.pad(seen, (1, 0), value=True)[:, None]
    bias = trunk.last_input.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)  # (B, 1, R, L)
    copies = trunk.hidden_states[0][:, :1].expand(-1, count, -1)
    for index, block in enumerate(tower.blocks):
        if index in trunk.heads:
            _, key, value = trunk.heads[index]
        else:
            key, value = project_heads(block, trunk.last_input, "kv")
        (query,) = project_heads(block, copies, "q")
        attended = attend(query, key, value, block.self_attn.scale, bias)
        copies = feed_forward(block, add_projection(copies, block.self_attn.out_proj, merge_heads(attended)))
    places = resize_nearest(regions, grid).flatten(1)
    return tower.post_norm(copies).gather(1, places[..., None].expand(-1, -1, copies.shape[-1]))


@register_method(
    "corrclip",
    settings=CorrClipSettings,
    paper="Zhang et al., CorrCLIP: Reconstructing Patch Correlations in CLIP for Open-Vocabulary Semantic "
    "Segmentation, ICCV 2025",
    reference="CorrCLIP code 103bc18, folder CorrCLIPv1, for any batch and shape",
    summary='attention inside merged regions; needs outside["proxy_features"] and outside["regions"]',
    cost="about 1.0 of a plain image pass (1.2 on a grid twice as fine), and the other model and the regions",
)
class CorrClip(Method):
    """CorrCLIP. The result lies on the other model's grid, (B, h, w, D).

    Scope: patches interact inside their region; patches outside of all regions as `unsegmented_scope` says. Three
    branches are normalised by the post-norm and summed before the projection: the last block's input, the mean of
    middle blocks (spatial), and CLS copies that see one region each (semantic). The map correction of the method is
    `correct_labels`, for the label map at the end.
    """

    def request(self, settings: CorrClipSettings, num_blocks: int) -> TrunkRequest:
        states = [block + 1 for block in settings.middle_blocks(num_blocks)] if settings.spatial_weight else []
        heads = tuple(range(num_blocks - 1)) if settings.semantic_weight else ()
        states += [0] if settings.semantic_weight else []
        return TrunkRequest(tuple(states), heads=heads, position_rule=settings.position_rule)

    def patch_features(self, context: MethodContext, settings: CorrClipSettings) -> Tensor:
        tower, trunk = context.tower, context.trunk
        features, grid = proxy_features(context, "corrclip", "q+k")
        pixels = region_maps(context, "corrclip")

        values = [values_on_grid(context, trunk.last_input, grid)]
        weights = [1.0]
        if settings.spatial_weight:
            states = [trunk.hidden_states[block + 1] for block in settings.middle_blocks(tower.num_blocks)]
            values.append(values_on_grid(context, torch.stack(states).mean(dim=0), grid))
            weights.append(settings.spatial_weight)
        regions = merged_regions(settings, pixels, grid, features)  # (B, H, W)
        keep = scope(settings, features, resize_nearest(regions, grid).flatten(1))
        attended = correlate(features, torch.cat(values, dim=-1), settings.attention_scale, keep)
        branches = attended.chunk(len(values), dim=-1)
        total = sum(weight * tower.post_norm(branch) for weight, branch in zip(weights, branches, strict=True))
        if settings.semantic_weight:
            total = total + settings.semantic_weight * region_tokens(context, regions, grid)
        return tower.projection(total).unflatten(1, grid)
