"""ResCLIP: the last block's attention mixed with that of middle layers, and refined by a first segmentation.

Yang et al., "ResCLIP: Residual Attention for Training-free Dense Vision-language Inference", CVPR 2025. Two independent
parts work on a base method (SCLIP, ClearCLIP or NACLIP) with scaled scores S and attention A = softmax(S):

* RCS, residual cross-correlation self-attention (Eqs. 5, 6): A' = tau ((1 - lam) A + lam C), C the mean q-k attention
  of layers 6 to 9, head by head.
* SFR, semantic feedback refinement (Eqs. 7 to 12): a first pass labels every patch; the matrix M of same-label patches
  (see `semantic_feedback.py`) enters the scores of a second pass: S' = tau ((1 - lam) S + lam M).

The numbers follow the authors' code (0e085f7), which differs from the paper: factors tau; a first pass refined by PAMR;
a label threshold; a path test along a part of the straight line; smoothing across row ends; rows of M normalised. The
preset "paper" takes the paper's form where it says one. In both, CLS keeps its row and column (zero in M), and NACLIP's
Gaussian is added after the mixture. The code's switches for RCS and SFR have no effect (they are tuples); ours have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, project_heads
from .last_block_methods import finish_block, gaussian_bias
from .method import Method, MethodContext, MethodSettings, register_method, setting
from .semantic_feedback import PATHS, SMOOTHINGS, feedback_matrix, first_pass_labels
from .trunk import TrunkOutput, TrunkRequest

RESCLIP_METHODS = ("resclip",)

BASES = ("naclip", "clearclip", "sclip")


def _preset(label_threshold: float, rcs: tuple[float, float], sfr: tuple[float, float], **others: Any) -> dict:
    code = {"path": "segment", "smoothing": "raster", "normalize_feedback": True, "pamr_iterations": 10}
    return {
        "label_threshold": label_threshold,
        **dict(zip(("rcs_tau", "rcs_weight", "sfr_tau", "sfr_weight"), (*rcs, *sfr), strict=True)),
        **code,
        **others,
    }


RESCLIP_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "demo": _preset(0.10, (2.0, 0.6), (2.1, 0.6)),
    "voc20": _preset(0.10, (2.0, 0.6), (2.1, 0.6)),
    "voc21": _preset(0.50, (2.0, 0.3), (2.2, 0.7)),
    "context59": _preset(0.25, (2.0, 0.4), (1.8, 0.7)),
    "context60": _preset(0.30, (2.0, 0.3), (1.8, 0.7)),
    "coco_object": _preset(0.11, (2.0, 0.4), (1.8, 0.7)),
    "coco_stuff164k": _preset(0.11, (2.0, 0.4), (1.8, 0.7)),
    "ade20k": _preset(0.25, (2.0, 0.3), (2.1, 0.7)),
    "cityscapes": _preset(0.10, (2.0, 0.2), (2.1, 0.6)),
    "paper": _preset(0.0, (1.0, 0.5), (1.0, 0.7), path="region", normalize_feedback=False, pamr_iterations=0),
}
"""Settings of the authors' configuration for each data set, of their demo, and of the paper's text."""


@dataclass(frozen=True)
class ResclipSettings(MethodSettings):
    """Settings of ResCLIP. What is None takes the value of `preset`."""

    logit_scale: float | None = setting(40.0, "factor on the cosines, in the first pass too; 40 in the ResCLIP code")
    base: str = setting("naclip", f"method whose last block is changed, one of {', '.join(BASES)}")
    preset: str = setting("demo", f"where unset values come from, one of {', '.join(RESCLIP_SETTINGS)}")
    rcs: bool = setting(True, "mix the attention of middle layers in (RCS)")
    sfr: bool = setting(True, "let the labels of a first pass refine the scores (SFR)")
    rcs_tau: float | None = setting(None, "factor on the mixed attention; 1 in the paper")
    rcs_weight: float | None = setting(None, "share of the middle layers' attention, lambda_rcs")
    rcs_layers: tuple[int, int] | None = setting(
        None, "first and last middle layer, counted from 1; None is 6 to 9, or the last four a shallower tower allows"
    )
    sfr_tau: float | None = setting(None, "factor on the mixed scores; 1 in the paper")
    sfr_weight: float | None = setting(None, "share of the feedback in the scores, lambda_sfr")
    label_threshold: float | None = setting(
        None, "first-pass probability below which a pixel is labelled with the first word; 0 in the paper"
    )
    path: str | None = setting(
        None,
        'patches of one label are joined by: a free "segment" of the line between them (code), a connected "region" of '
        'that label (paper), or "any" always',
    )
    smoothing: str | None = setting(
        None, 'Gaussian over a patch\'s feedback: "raster" along the flattened rows, "map" in two dimensions, or "none"'
    )
    normalize_feedback: bool | None = setting(None, "divide the feedback by its row sums, then by its maximum (code)")
    pamr_iterations: int | None = setting(None, "rounds of PAMR on the first pass; 0 in the paper")
    gaussian_std: float = setting(5.0, "standard deviation in patches, of the smoothing and of NACLIP's neighbourhood")
    half_sfr: bool = setting(False, "round the feedback to float16 as the code does")
    residual: bool | None = setting(None, "keep the last block's residual connection; None only for the base sclip")
    mlp: bool | None = setting(None, "keep the last block's feed-forward layer; None only for the base sclip")

    def __post_init__(self) -> None:
        _check_choice("preset", self.preset, RESCLIP_SETTINGS)
        _check_choice("base", self.base, BASES)
        for name, value in RESCLIP_SETTINGS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("residual", "mlp"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.base == "sclip")
        _check_choice("path", self.path, PATHS)
        _check_choice("smoothing", self.smoothing, SMOOTHINGS)
        for name in ("rcs_weight", "sfr_weight", "label_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("rcs_tau", "sfr_tau", "gaussian_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.pamr_iterations is None or self.pamr_iterations < 0:
            raise ValueError(f"pamr_iterations must be 0 or more, got {self.pamr_iterations}")
        if self.rcs_layers is not None and not 1 <= self.rcs_layers[0] <= self.rcs_layers[1]:
            raise ValueError(f"rcs_layers must be two layers in order, counted from 1, got {self.rcs_layers}")


def _check_choice(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _middle_blocks(settings: ResclipSettings, num_blocks: int) -> tuple[int, ...]:
    """Indices of the blocks whose maps RCS averages; none without RCS."""
    if not settings.rcs:
        return ()
    highest = min(9, num_blocks - 1)
    first, last = settings.rcs_layers or (max(1, highest - 3), highest)
    return tuple(range(first - 1, last))


@register_method(
    "resclip",
    settings=ResclipSettings,
    paper="Yang et al., ResCLIP: Residual Attention for Training-free Dense Vision-language Inference, CVPR 2025",
    reference="ResCLIP code 0e085f7, on the bases sclip, clearclip and naclip",
    summary="last-block attention mixed with layers 6 to 9 (RCS) and fed back with a first segmentation (SFR)",
    cost="about 1.05 of a plain image pass with RCS, 1.3 with RCS and SFR",
    variants={f"resclip on {base}": f"--method-option base={base}" for base in BASES},
)
class Resclip(Method):
    """ResCLIP on one of its bases; features depend on the words only with SFR. `settings` are a `ResclipSettings`."""

    def request(self, settings: Any, num_blocks: int) -> TrunkRequest:
        return TrunkRequest(attention_maps=_middle_blocks(settings, num_blocks), position_rule=settings.position_rule)

    def needs_words(self, settings: Any) -> bool:
        return settings.sfr

    def patch_features(self, context: MethodContext, settings: Any) -> Tensor:
        trunk, block = context.trunk, context.tower.last_block
        roles = {"naclip": "k", "clearclip": "q", "sclip": "qk"}[settings.base]
        *sources, value = project_heads(block, trunk.last_input, roles + "v")
        neighbours = None
        if settings.base == "naclip":
            neighbours = gaussian_bias(trunk.grid, settings.gaussian_std, value.device)
        middle = _middle_blocks(settings, context.tower.num_blocks)
        crossed = self._middle_attention(trunk, middle, value) if middle else None

        def run(factor: float, bias: Tensor | None) -> Tensor:
            scale = factor * block.self_attn.scale
            attended = attend(sources[0], sources[0], value, scale, bias)
            for source in sources[1:]:
                attended = attended + attend(source, source, value, scale, bias)
            if crossed is not None:
                attended = settings.rcs_tau * torch.lerp(attended, crossed, settings.rcs_weight)
            return finish_block(context, attended, settings.residual, settings.mlp)

        features = run(1.0, neighbours)
        if not settings.sfr:
            return features
        labels = self._first_labels(context, settings, features)
        context.scratch["labels"] = labels
        feedback = self._feedback(labels, settings)[:, None]  # (B, 1, L, L)
        bias = feedback if neighbours is None else feedback + neighbours
        return run(settings.sfr_tau * (1 - settings.sfr_weight), bias)

    @staticmethod
    def _middle_attention(trunk: TrunkOutput, blocks: Sequence[int], value: Tensor) -> Tensor:
        """C v with C the mean map of the middle layers, (B, heads, L, d)."""
        first, *others = (trunk.attention_maps[index] for index in blocks)
        total = first.clone()
        for weights in others:
            total += weights
        return (total @ value) / (1 + len(others))

    @staticmethod
    def _first_labels(context: MethodContext, settings: Any, features: Tensor) -> Tensor:
        words: Any = context.class_embeddings  # present: see needs_words
        words = F.normalize(words.to(features.dtype), dim=-1)
        cosines = (F.normalize(features, dim=-1) @ words.T).transpose(1, 2)
        return first_pass_labels(
            cosines.unflatten(2, context.trunk.grid),
            context.trunk.pixel_values,
            context.tower.patch_size,
            context.logit_scale if settings.logit_scale is None else settings.logit_scale,
            settings.label_threshold,
            settings.pamr_iterations,
        )

    @staticmethod
    def _feedback(labels: Tensor, settings: Any) -> Tensor:
        """tau lam M of a batch, (B, L, L)."""
        matrices = []
        for image in labels:
            matrix = feedback_matrix(
                image, settings.gaussian_std, settings.path, settings.smoothing, settings.normalize_feedback
            )
            matrices.append(matrix / matrix.amax() if settings.normalize_feedback else matrix)
        feedback = torch.stack(matrices)
        if settings.half_sfr:
            return settings.sfr_tau * (settings.sfr_weight * feedback.half()).float()
        return settings.sfr_tau * settings.sfr_weight * feedback
