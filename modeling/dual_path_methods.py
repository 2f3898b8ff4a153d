"""Methods with a second path beside the ordinary one through the last blocks: GEM and CLIP Surgery.

The ordinary path runs unchanged (the trunk keeps q, k and v of its blocks). The second path starts as the input F_s of
the first block concerned and takes from every block only an attention of its own kind, no feed-forward layer:

    g = F_s + sum over the blocks i of out_proj_i(attention_i v_i)

Since q, k and v come from the ordinary path, nothing of the last block's ordinary output is needed for the patches.

| method | attention of a block |
|---|---|
| gem | mean of softmax(tau z z^T) for z = v, k, q after one step of self-refinement; z of unit length |
| clip_surgery | softmax(s v v^T) |

GEM: Bousselham et al., "Grounding Everything: Emerging Localization Properties in Vision-Language Transformers", CVPR
2024; code 5fa677c. CLIP Surgery: Li et al., "A Closer Look at the Explainability of Contrastive Language-Image
Pre-training", Pattern Recognition 2025; code d4696d4, without its change of the model's position table at every new
image size and for images of any shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, block_space, merge_heads, plain_cpu, products, project_heads, row_blocks
from .block import add_projection, feed_forward
from .decision import MAX_CHUNK_VALUES
from .method import Method, MethodContext, MethodSettings, ScoreMap, register_method, setting
from .trunk import TrunkOutput, TrunkRequest

DUAL_PATH_METHODS = ("gem", "clip_surgery")

SURGERIES = ("features", "redundant_text", "none")

MAX_UNSHIFTED = 30.0  # up to this tau neither exp(tau) nor the square of a sum over tokens leaves float32


@dataclass(frozen=True)
class DualPathSettings(MethodSettings):
    """Settings shared by the methods of this file."""

    depth: int = setting(
        7, "the second path passes the last depth - 1 blocks; 7 in both codes, cut to what the tower has"
    )
    min_max: bool = setting(
        False, "stretch the map of every word to 0..1 as the code does for its heat maps, instead of a softmax"
    )

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2 (one block), got {self.depth}")

    def blocks(self, num_blocks: int) -> range:
        """Blocks that the second path passes, in a tower of `num_blocks`."""
        return range(max(0, num_blocks - self.depth + 1), num_blocks)


@dataclass(frozen=True)
class GemSettings(DualPathSettings):
    """GEM as its code has it for CLIP."""

    position_rule: str = setting(
        "antialias", 'resizing of the position table: "antialias" in the GEM code, or "reference", "bilinear", ...'
    )
    iterations: int = setting(1, "steps of self-refinement of q, k and v before the attention")
    temperature: float | None = setting(
        None, "factor tau on the cosines; None is the mean norm of an image's normalised tokens times d^-0.5"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, got {self.iterations}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be positive or None, got {self.temperature}")


@dataclass(frozen=True)
class ClipSurgerySettings(DualPathSettings):
    """Architecture surgery, with or without feature surgery."""

    position_rule: str = setting(
        "bilinear", 'resizing of the position table: "bilinear" in the CLIP Surgery code, or "reference", ...'
    )
    surgery: str = setting(
        "features",
        '"features" weighs words by the image and removes what they share; "redundant_text" removes '
        'outside["redundant_text"]; "none" keeps plain cosines',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surgery not in SURGERIES:
            raise ValueError(f"surgery must be one of {', '.join(SURGERIES)}, got {self.surgery!r}")


def block_heads(context: MethodContext, blocks: range, last: str) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Projections of the given blocks: q, k, v of all but the last block, of that one only the roles in `last`.

    Args:
        context: Tower and trunk.
        blocks: Indices from 0.
        last: Letters of the roles wanted of the last block.
    """
    for index in blocks:
        if index in context.trunk.heads:
            yield index, context.trunk.heads[index]
        else:
            yield index, project_heads(context.tower.last_block, context.trunk.last_input, last)


def cosines(patch_features: Tensor, words: Tensor) -> Tensor:
    """Cosine of patch features (B, h, w, D) and words (Q, D), (B, Q, h, w).

    Args:
        patch_features: (B, h, w, D).
        words: Unit vectors, (Q, D).
    """
    patches = F.normalize(patch_features, dim=-1)
    return (patches @ F.normalize(words.to(patches.dtype), dim=-1).T).permute(0, 3, 1, 2)


def stretch(values: Tensor, low: Tensor, high: Tensor) -> ScoreMap:
    """Map low..high, each (B, Q, 1, 1), to 0..1.

    Args:
        values: (B, Q, h, w).
        low: What becomes 0, (B, Q, 1, 1).
        high: What becomes 1, (B, Q, 1, 1).
    """
    return ScoreMap((values - low) / (high - low).clamp_min(1e-12), "none", 1.0)


def spatial_range(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every map, (B, Q, h, w) -> two of (B, Q, 1, 1)."""
    return maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)


def upsampled_range(values: Tensor, trunk: TrunkOutput) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over pixels of bilinearly upsampled maps (B, Q, h, w), each (B, Q, 1, 1).

    Args:
        values: (B, Q, h, w).
        trunk: Says how large the image is.
    """
    height, width = trunk.padded_size
    step = max(1, MAX_CHUNK_VALUES // (height * width * len(values)))
    ranges = []
    for chunk in values.float().split(step, dim=1):
        pixels = F.interpolate(chunk, size=(height, width), mode="bilinear", align_corners=False)
        ranges.append(spatial_range(trunk.padding.crop(pixels)))
    low, high = zip(*ranges, strict=True)
    return torch.cat(low, dim=1), torch.cat(high, dim=1)


def gem_attention(
    query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | float, iterations: int = 1
) -> Tensor:
    """GEM's self-self attention applied to the values.

    For each z of v, k, q: `iterations` times {unit length; z <- softmax(tau z z^T) z}; unit length; then
    softmax(tau z z^T) v. The result is the mean of the three.

    Args:
        query, key, value: (B, heads, L, d).
        temperature: tau, a number or one per image, (B,).
        iterations: Steps of self-refinement.

    Returns:
        (B, heads, L, d).
    """
    tau = torch.as_tensor(temperature, dtype=torch.float32, device=value.device).expand(len(value))
    length = tau.sqrt()[:, None, None, None]
    if plain_cpu(value) and value.dtype == torch.float32 and tau.max() <= MAX_UNSHIFTED:
        return _gem_by_blocks(query, key, value, length, iterations)
    states = torch.cat((value, key, query))  # (3B, heads, L, d): one fused call for the three
    length = length.repeat(3, 1, 1, 1).to(states.dtype)
    for _ in range(iterations):
        states = _of_length(states, length)
        states = attend(states, states, states, 1.0)
    states = _of_length(states, length)
    attended = attend(states, states, value.repeat(3, 1, 1, 1), 1.0)
    return attended.unflatten(0, (3, -1)).mean(dim=0)


def _of_length(states: Tensor, length: Tensor) -> Tensor:
    """Vectors of the same direction; with the length sqrt(tau) their products are tau cos."""
    return states * (length / states.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def _gem_by_blocks(query: Tensor, key: Tensor, value: Tensor, length: Tensor, iterations: int) -> Tensor:
    """`gem_attention` on the CPU with fewer products: the three maps are added before they meet the values.

    tau cos is at most tau, so exp needs no search for the largest of a row.

    Args:
        query, key, value: (B, heads, L, d).
        length: sqrt(tau), (B, 1, 1, 1).
        iterations: Steps of self-refinement.
    """
    states = [_of_length(z, length) for z in (value, key, query)]
    attended, spaces = torch.empty_like(value), block_space(value, 2)
    groups, parts = row_blocks(*value.shape[1:3])
    for image, factor in enumerate(length):  # of an image all heads are views, of a batch they would have to be copied
        for maps in groups:
            chosen = [z[image, maps] for z in states]  # (heads, L, d)
            for _ in range(iterations):
                chosen = [_of_length(_refined(z, parts, spaces[0]), factor) for z in chosen]
            for rows in parts:
                mean: Tensor | None = None
                for z in chosen:
                    weights = products(z[:, rows], z, spaces[0 if mean is None else 1]).exp_()
                    share = weights.sum(dim=-1, keepdim=True).mul_(3).reciprocal_()
                    mean = weights.mul_(share) if mean is None else mean.addcmul_(weights, share)
                assert mean is not None  # there are three states
                attended[image, maps, rows] = torch.bmm(mean, value[image, maps])
    return attended


def _refined(states: Tensor, parts: list[slice], space: Tensor) -> Tensor:
    """exp(z z^T) z: the softmax would divide rows by their sums, which changes lengths that are set anew anyway.

    The map is symmetric: a part of its rows is computed from the diagonal on, and serves as columns of the rest.

    Args:
        states: z, (heads, L, d).
        parts: All rows, part by part.
        space: Room for the map of a part.
    """
    refined = torch.zeros(states.shape, dtype=states.dtype)
    for rows in parts:
        own, rest = states[:, rows], states[:, rows.start :]
        weights = products(own, rest, space).exp_()
        refined[:, rows].baddbmm_(weights, rest)
        if rows is not parts[-1]:
            refined[:, rows.stop :].baddbmm_(weights[:, :, own.shape[1] :].transpose(1, 2), own)
    return refined


@register_method(
    "gem",
    settings=GemSettings,
    paper="Bousselham et al., Grounding Everything: Emerging Localization Properties in VL Transformers, CVPR 2024",
    reference="GEM code 5fa677c",
    summary="second path of refined v-v, k-k and q-q attention through the last six blocks",
    cost="about 1.3 of a plain image pass",
)
class Gem(Method):
    """GEM. The code shows heat maps (`min_max=True`); segmentation by default takes the softmax over words."""

    def request(self, settings: GemSettings, num_blocks: int) -> TrunkRequest:
        blocks = settings.blocks(num_blocks)
        kept = tuple(blocks) if settings.temperature is None else (blocks[0],)
        return TrunkRequest(kept, heads=tuple(blocks[:-1]), position_rule=settings.position_rule)

    def temperature(self, context: MethodContext, settings: GemSettings, index: int) -> Tensor | float:
        """tau of a block: the setting, or the mean norm of ln_1(x) over an image's tokens times d^-0.5, (B,).

        Args:
            context: Tower and trunk.
            settings: Its `temperature`.
            index: Of the block, from 0.
        """
        if settings.temperature is not None:
            return settings.temperature
        block = context.tower.blocks[index]
        norms = block.layer_norm1(context.trunk.hidden_states[index]).float().norm(dim=-1)  # (B, L)
        return norms.mean(dim=-1) * block.self_attn.scale

    def patch_features(self, context: MethodContext, settings: GemSettings) -> Tensor:
        blocks = settings.blocks(context.tower.num_blocks)
        path = context.trunk.hidden_states[blocks[0]]  # (B, L, W)
        for index, (query, key, value) in block_heads(context, blocks, "qkv"):
            tau = self.temperature(context, settings, index)
            attended = gem_attention(query, key, value, tau, settings.iterations)
            path = add_projection(path, context.tower.blocks[index].self_attn.out_proj, merge_heads(attended))
        return context.tower.project(path[:, 1:])

    def score_map(self, context: MethodContext, settings: GemSettings, patch_features: Tensor) -> ScoreMap | None:
        """Cosines; with `min_max` stretched so that each word's upsampled map reaches from 0 to 1."""
        if not settings.min_max or context.class_embeddings is None:
            return None
        values = cosines(patch_features, context.class_embeddings)
        return stretch(values, *upsampled_range(values, context.trunk))


@register_method(
    "clip_surgery",
    settings=ClipSurgerySettings,
    paper="Li et al., A Closer Look at the Explainability of Contrastive Language-Image Pre-training, PR 2025",
    reference="CLIP_Surgery code d4696d4",
    summary="second path of v-v attention through the last six blocks; scores weighted by the image",
    cost="about 1.05 of a plain image pass",
)
class ClipSurgery(Method):
    """CLIP Surgery. The code shows heat maps (`min_max=True`); segmentation by default takes the softmax over words."""

    def request(self, settings: ClipSurgerySettings, num_blocks: int) -> TrunkRequest:
        blocks = settings.blocks(num_blocks)
        return TrunkRequest((blocks[0],), heads=tuple(blocks[:-1]), position_rule=settings.position_rule)

    def patch_features(self, context: MethodContext, settings: ClipSurgerySettings) -> Tensor:
        blocks = settings.blocks(context.tower.num_blocks)
        # With feature surgery the keys of the last block are needed too, for the CLS token alone.
        last = "kv" if settings.surgery == "features" else "v"
        path = context.trunk.hidden_states[blocks[0]]  # (B, L, W)
        heads: tuple[Tensor, ...] = ()
        for index, heads in block_heads(context, blocks, last):
            attention, value = context.tower.blocks[index].self_attn, heads[-1]
            attended = attend(value, value, value, attention.scale)
            path = add_projection(path, attention.out_proj, merge_heads(attended))
        if settings.surgery == "features":
            context.scratch["image"] = self.image_embedding(context, heads[0], heads[1])
        return context.tower.project(path[:, 1:])

    @staticmethod
    def image_embedding(context: MethodContext, key: Tensor, value: Tensor) -> Tensor:
        """CLIP's own image vector from the last block run for the CLS token alone, (B, D).

        Args:
            context: Tower and trunk.
            key: Of the last block, (B, heads, L, d).
            value: Of the last block, (B, heads, L, d).
        """
        block, cls = context.tower.last_block, context.trunk.last_input[:, :1]
        (query,) = project_heads(block, cls, "q")
        attended = attend(query, key, value, block.self_attn.scale)
        cls = feed_forward(block, add_projection(cls, block.self_attn.out_proj, merge_heads(attended)))
        return context.tower.project(cls)[:, 0]

    def score_map(self, context: MethodContext, settings: ClipSurgerySettings, patch_features: Tensor) -> ScoreMap:
        """Feature surgery.

        Per word c and channel the code multiplies patch f, word t_c and weight w_c, subtracts the mean over words and
        sums the channels. The sum goes through both steps: w_c cos(f, t_c) minus its mean over words. w is the softmax
        over words of 2 cos(image, t), divided by its mean. A single word gives zero everywhere, as in the code, which
        therefore takes a redundant text r ("" in all templates) there: f . (t - r).
        """
        assert context.class_embeddings is not None  # score_map is only called with words
        words = context.class_embeddings
        values = cosines(patch_features, words)
        if settings.surgery == "features":
            weights = (2 * cosines(context.scratch["image"][:, None, None], words)).softmax(dim=1)  # (B, Q, 1, 1)
            values = values * (weights / weights.mean(dim=1, keepdim=True))
            values = values - values.mean(dim=1, keepdim=True)
        elif settings.surgery == "redundant_text":
            values = values - self.redundant_cosine(context, patch_features)
        if settings.min_max:
            return stretch(values, *spatial_range(values))
        scale = context.logit_scale if settings.logit_scale is None else settings.logit_scale
        return ScoreMap(values, "softmax", scale)

    @staticmethod
    def redundant_cosine(context: MethodContext, patch_features: Tensor) -> Tensor:
        """f . r, (B, 1, h, w); r is used as it is given, as in the code, which does not normalise the mean.

        Args:
            context: Supplies `outside["redundant_text"]`.
            patch_features: (B, h, w, D).
        """
        redundant = context.outside.get("redundant_text")
        width = patch_features.shape[-1]
        if redundant is None or redundant.numel() != width:
            got = "nothing" if redundant is None else f"shape {tuple(redundant.shape)}"
            raise ValueError(
                f'surgery="redundant_text" needs outside={{"redundant_text": tensor of {width} values}}, the mean '
                f"embedding of an empty text in all templates; got {got}"
            )
        patches = F.normalize(patch_features, dim=-1)
        return (patches @ redundant.reshape(width, 1).to(patches)).permute(0, 3, 1, 2)
