"""Methods that read several layers of the image tower: CLIPer's early-layer fusion.

CLIPer (Sun et al., "CLIPer: Hierarchically Improving Spatial Representation of CLIP for Open-Vocabulary Semantic
Segmentation", ICCV 2025), section 3.2. The numbers follow the authors' code (c05fa41), which differs from Eq. 8 of the
paper: attention maps are summed and normalised alternately over columns and rows, once more for every stream;
streams are layer-normalised inputs of the blocks; probabilities, not cosines, are averaged; and a thresholded map of
one stream is propagated along the attention and added.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attention_map, block_space, merge_heads, plain_cpu, row_blocks, split_heads
from .cliper_windows import run_windows, window_probabilities
from .method import Method, MethodContext, MethodSettings, ScoreGate, ScoreMap, register_method, setting
from .trunk import TrunkRequest

LAYER_FUSION_METHODS = ("cliper",)

ATTENTION_TYPES = ("fused", "q-q", "k-k", "v-v", "vanilla", "identity")


def _options(
    scale: float, threshold: float, stream: int, score: float, background: float, normalise: bool = False
) -> dict[str, Any]:
    return {
        "logit_scale": float(scale),
        "attention_threshold": threshold,
        "select_stream": stream,
        "score_threshold": score,
        "background_threshold": background,
        "normalise_scores": normalise,
    }


# The method_options of the authors' configurations (CLIPer code c05fa41), by data set and backbone. Their templates
# ("cliper15" or "imagenet80"), sizes and background words are part of the protocol, not of the method.
CLIPER_OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("voc21", "B/16"): _options(100, 0.1, -1, 0.7, 0.6, True),
    ("context60", "B/16"): _options(100, 0.2, -1, 0.45, 0.45),
    ("coco_object", "B/16"): _options(50, 0.2, -1, 0.3, 0.3),
    ("voc20", "B/16"): _options(100, 0.1, -1, 0.0, 0.001),
    ("context59", "B/16"): _options(100, 0.2, -1, 0.3, 0.3),
    ("coco_stuff171", "B/16"): _options(50, 0.2, -1, 0.1, 0.1),
    ("ade150", "B/16"): _options(100, 0.2, -1, 0.3, 0.3),
    ("cityscapes19", "B/16"): _options(100, 0.35, -1, 0.0, 0.0001),
    ("voc21", "L/14"): _options(50, 0.1, -2, 0.5, 0.4, True),
    ("context60", "L/14"): _options(50, 0.2, -2, 0.3, 0.3),
    ("coco_object", "L/14"): _options(50, 0.1, -2, 0.5, 0.5),
    ("voc20", "L/14"): _options(70, 0.2, -1, 0.1, 0.0001),
    ("context59", "L/14"): _options(100, 0.2, -2, 0.45, 0.45),
    ("coco_stuff171", "L/14"): _options(50, 0.2, -2, 0.2, 0.2),
    ("ade150", "L/14"): _options(50, 0.2, -1, 0.2, 0.2),
    ("cityscapes19", "L/14"): _options(100, 0.35, -1, 0.0, 0.0001),
}


@dataclass(frozen=True)
class CliperSettings(MethodSettings):
    """Settings of CLIPer; the defaults are those of its code for VOC21 with ViT-B/16."""

    logit_scale: float | None = setting(100.0, "factor on the cosines of every stream; 50 to 100 in the code's configs")
    position_rule: str = setting(
        "bilinear", 'resizing of the position table: "bilinear" in the CLIPer code, or "reference", "transformers"'
    )
    attention: str = setting("fused", f"attention of the last block, one of {', '.join(ATTENTION_TYPES)}")
    attention_threshold: float = setting(
        0.1, "share of a class's maximum below which the propagated map is cut to zero; 0.1 to 0.35 in the configs"
    )
    select_stream: int = setting(
        -1, "stream whose map is propagated, counted from the end: -1, or -2 for some L/14 sets"
    )
    fuse_streams: bool = setting(True, "average the probabilities of all streams; False keeps the selected one alone")
    score_threshold: float = setting(0.0, "with background_threshold: least peak of a class that is kept")
    background_threshold: float | None = setting(
        None, "least value of a pixel that is not background (the code's bkg_thre); None leaves the gate out"
    )
    normalise_scores: bool = setting(False, "with background_threshold: stretch every class to 0..1 before it")
    window: int | None = setting(
        None, "side in pixels of windows whose scores are mixed in; 224 or 336 in some configs, None for none"
    )
    window_stride: int = setting(112, "step of these windows in pixels; at most the window's side")
    mean_row: bool = setting(True, "add the mean of the foreground words to the softmax, as the code does")

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION_TYPES:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_TYPES)}, got {self.attention!r}")
        if not 0 <= self.attention_threshold < 1:
            raise ValueError(f"attention_threshold must be in [0, 1), got {self.attention_threshold}")
        if self.select_stream >= 0:
            raise ValueError(f"select_stream counts from the end and must be negative, got {self.select_stream}")
        if self.window_stride < 1 or (self.window is not None and self.window < 1):
            raise ValueError(
                f"window and window_stride must be positive, got window={self.window}, stride={self.window_stride}"
            )


def balance(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One column and one row normalisation (a Sinkhorn pass) of diag(rows) W, kept as factors beside W.

    Args:
        weights: W, (heads, L, L).
        rows: Row factors so far, (heads, 1, L).

    Returns:
        Factors r and c of the normalised diag(r) W diag(c), each (heads, 1, L).
    """
    columns = 1 / (rows @ weights)
    return 1 / (columns @ weights.transpose(-2, -1)), columns


def fused_attention(
    total: Tensor, values: Sequence[Tensor], out: Sequence[Tensor] | None = None
) -> tuple[Sequence[Tensor], Tensor]:
    """CLIPer's attention of one image: summed maps, normalised once more for every stream, applied to its values.

    The map of a stream is relu(S - column mean of S) with rows divided by their sums, S the symmetric half of the
    balanced map B = diag(r) W diag(c). Factors of rows cancel, so with the columns divided by r it is computed as
    relu((c_j / r_j) W_ij + (c_i / r_i) W_ji - m_j / (r_i r_j)), m_j = (1 + sum_i B_ij) / L being twice the column mean,
    applied to r_j v_j, and divided by the same product with r_j.

    Args:
        total: W, (heads, L, L) float32.
        values: Of every stream, (heads, L, d).
        out: Where the result goes, of the same shapes; may be the values themselves. By default new memory.

    Returns:
        Attended values of every stream, (heads, L, d), and the map of the last averaged over heads, (L, L).
    """
    num_streams, num_heads, length = len(values), *values[0].shape[:2]
    dtype = values[0].dtype
    attended, mean = out or [torch.empty_like(value) for value in values], torch.zeros_like(total[0])
    groups, parts = row_blocks(num_heads, length)
    space = block_space(values[0])[0].float() if plain_cpu(values[0]) else None
    for maps in groups:
        weights = total[maps]  # (h, L, L), read again for every stream: few maps stay in the cache
        factors = [balance(weights, torch.ones_like(weights[:, :1]))]
        for _ in range(num_streams - 1):
            factors.append(balance(weights, factors[-1][0]))
        rows, columns = (torch.stack(each) for each in zip(*factors, strict=True))  # (S, h, 1, L)
        following = torch.cat([1 / columns[1:], (rows[-1] @ weights)[None]])  # column sums of diag(r) W
        ratio, means = columns / rows, (1 + columns * following) / (-length * rows)
        upright_ratio, inverse = ratio.transpose(-2, -1), (1 / rows).transpose(-2, -1)  # (S, h, L, 1)
        own = rows.transpose(-2, -1)
        weighted = [(factor * value[maps]).to(dtype) for factor, value in zip(own, values, strict=True)]  # r_j v_j
        for part in parts:
            upright = weights[:, part]
            place = None if space is None else space[: upright.numel()].view(upright.shape)
            turned = weights[:, :, part].transpose(1, 2).contiguous()  # W_ji
            for stream in range(num_streams):
                sharp = torch.mul(upright, ratio[stream], out=place)
                sharp.addcmul_(turned, upright_ratio[stream, :, part])
                sharp.addcmul_(means[stream], inverse[stream, :, part]).relu_()
                sums = sharp @ own[stream]  # (h, n, 1)
                attended[stream][maps, part] = torch.bmm(sharp.to(dtype), weighted[stream]).div_(sums.to(dtype))
            for head, shares in zip(sharp, rows[-1] / (sums * num_heads), strict=True):
                mean[part].addcmul_(head, shares)
    return attended, mean


@register_method(
    "cliper",
    settings=CliperSettings,
    paper="Sun et al., CLIPer: Hierarchically Improving Spatial Representation of CLIP, ICCV 2025",
    reference="CLIPer code c05fa41; its Stable-Diffusion step is `compensation=`",
    summary="fused attention of all early blocks over the embeddings of all blocks; probabilities averaged",
    cost="about 1.2 of a plain image pass, with windows about 3.2; keeps a sum of attention maps",
    variants={"cliper+sd": "--compensation stabilityai/stable-diffusion-2-1-base"},
)
class Cliper(Method):
    """CLIPer's early-layer fusion. The patch features (F_d) are those of the last stream."""

    def request(self, settings: CliperSettings, num_blocks: int) -> TrunkRequest:
        early = tuple(range(num_blocks - 1))
        return TrunkRequest(tuple(range(num_blocks)), position_rule=settings.position_rule, map_sums=(early,))

    def streams(self, context: MethodContext) -> Iterator[Tensor]:
        """Inputs of the last block, one per block: ln_1^i(F_i) for i < n-1, and the raw F_{n-1}, each (B, L, W)."""
        states, blocks = context.trunk.hidden_states, context.tower.blocks
        last = context.tower.num_blocks - 1
        for index in range(last):
            yield blocks[index].layer_norm1(states[index])
        yield states[last]

    def stream_features(self, context: MethodContext, settings: CliperSettings) -> tuple[Tensor, Tensor]:
        """Projected features of every stream, (S, B, L, D), and the attention used last, mean of heads, (B, L, L)."""
        block, tower = context.tower.last_block, context.tower
        attention = block.self_attn
        # Stream by stream: tensors of all of them at once would be new memory at every step.
        normed = (block.layer_norm1(stream) for stream in self.streams(context))  # each (B, L, W)
        attended, weights = [], context.trunk.last_input
        if settings.attention == "fused":
            values = [split_heads(attention.v_proj(stream), attention.num_heads) for stream in normed]
            total = context.trunk.map_sums[tuple(range(len(values) - 1))]
            attended = [torch.empty_like(value) for value in values] if torch.is_grad_enabled() else values
            images = [
                fused_attention(total[image], [each[image] for each in values], [each[image] for each in attended])
                for image in range(len(total))
            ]
            weights = torch.stack([mean for _, mean in images])
        else:
            for stream in normed:
                value = split_heads(attention.v_proj(stream), attention.num_heads)
                weights = self._own_attention(attention, stream, value, settings.attention)
                attended.append(weights.to(value.dtype) @ value)
            weights = weights.float().mean(dim=1)
        return torch.stack([tower.project(attention.out_proj(merge_heads(each))) for each in attended]), weights

    @staticmethod
    def _own_attention(attention: Any, normed: Tensor, value: Tensor, kind: str) -> Tensor:
        def heads(name: str) -> Tensor:
            return split_heads(getattr(attention, f"{name}_proj")(normed), attention.num_heads)

        if kind == "identity":
            return torch.eye(normed.shape[1], device=normed.device).expand(normed.shape[0], attention.num_heads, -1, -1)
        if kind == "vanilla":
            return attention_map(heads("q"), heads("k"), attention.scale)
        states = value if kind == "v-v" else heads(kind[0])
        return attention_map(states, states, attention.scale)

    def patch_features(self, context: MethodContext, settings: CliperSettings) -> Tensor:
        streams, propagation = self.patch_streams(context, settings)
        context.scratch.update(streams=streams, propagation=propagation)
        if settings.window is not None:
            tower, pixels = context.tower, context.trunk.pixel_values
            request = self.request(settings, tower.num_blocks)

            def run(crops: Tensor) -> tuple[Tensor, Tensor]:
                return self.patch_streams(MethodContext(tower, tower.run(crops, request)), settings)

            context.scratch["windows"] = run_windows(
                pixels, settings.window, settings.window_stride, tower.patch_size, run
            )
        return streams[-1]

    def patch_streams(self, context: MethodContext, settings: CliperSettings) -> tuple[Tensor, Tensor]:
        """Features of every stream, (S, B, N, D), and the attention used last, (B, N, N), both without CLS."""
        features, weights = self.stream_features(context, settings)
        return features[:, :, 1:], weights[:, 1:, 1:]

    def stream_probabilities(self, context: MethodContext, settings: CliperSettings) -> Tensor:
        """Softmax over words per stream, (S, B, Q, N), for all words but the mean row; windows are mixed in."""
        assert context.class_embeddings is not None  # score_map is only called with words
        words = F.normalize(context.class_embeddings.float(), dim=-1)  # (Q, D)
        rows = words
        if settings.mean_row:
            keep = [row for row in range(len(words)) if row not in context.background_queries] or range(len(words))
            rows = torch.cat([words, F.normalize(words[list(keep)].mean(dim=0, keepdim=True), dim=-1)])
        scale = context.logit_scale if settings.logit_scale is None else settings.logit_scale

        def logits(features: Tensor) -> Tensor:
            lengths = features.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
            return features.float() @ rows.T * (scale / lengths)  # (S, B, n, R)

        streams = context.scratch["streams"]
        probabilities = logits(streams).softmax(dim=-1)
        if "windows" in context.scratch:
            windows = window_probabilities(context.scratch["windows"], logits, streams.shape[2])
            probabilities = (probabilities + windows) / 2
        return probabilities[..., : len(words)].transpose(-2, -1)

    def score_map(self, context: MethodContext, settings: CliperSettings, patch_features: Tensor) -> ScoreMap:
        """CLIPer's map: propagated selected stream plus the mean over streams; values 0 to about 2, (B, Q, h, w)."""
        probabilities = self.stream_probabilities(context, settings).clone()
        selected = probabilities[settings.select_stream]  # (B, Q, N), a view: the cut also enters the mean
        cut = settings.attention_threshold * selected.amax(dim=-1, keepdim=True)
        selected.masked_fill_(selected < cut, 0)
        scores = selected @ context.scratch["propagation"]
        if settings.fuse_streams:
            scores = scores + probabilities.mean(dim=0)
        gate = None
        if settings.background_threshold is not None:
            gate = ScoreGate(settings.score_threshold, settings.background_threshold, settings.normalise_scores)
        return ScoreMap(scores.unflatten(-1, context.trunk.grid), "none", 0.5, gate)
