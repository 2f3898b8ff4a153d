"""A second mini tower that never sees a pixel label: the fair base on which ARM's gain is measured.

CLIP learns from captions, so its dense maps are coarse. The tower of `arm-clip-mini` has learnt from label maps, which
leaves ARM little to correct. Here all blocks but the last stay as the encoder's author trained them; last block,
post-LayerNorm and projection learn from tags alone: which classes are in a view, never where. As in CLIP, words meet
the CLS token and nothing else; scores pooled over patches (`TagStage.pooling`) make finer maps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPVisionModelWithProjection

from .common import RateMeter, cosine_factor, load_tensors, logger, save_atomic
from .crops import CropOptions, draw_batch
from .data import IGNORE, BalancedSampler, Photo
from .targets import ConceptWords, RuleTable, words_nll
from .train_vision import DensePath

POOLINGS = ("patches", "cls", "both")


@dataclass(frozen=True)
class TagStage:
    """Options of the training from tags.

    Attributes:
        pooling: one of `POOLINGS`, what gives a view's score of a word: the log-sum-exp over its patches, CLS as in
            CLIP, or both, each with a loss.
        num_layers: blocks of the tower; the encoder's last two know less of what things are than those before them.
        views: views in the pool, whose tokens before the last block are computed once.
        size: side of the views in pixels.
        min_share: share of a view that a class must cover to be one of its tags.
        steps: optimiser steps.
        batch_size: views a step.
        lr: learning rate of the last block and the norm.
        lr_projection: of the projection and the scale.
        weight_decay: AdamW's.
        warmup: steps of linear increase.
        seed: of views, batches and words.
    """

    pooling: str = "cls"
    num_layers: int = 10
    views: int = 2000
    size: int = 224
    min_share: float = 0.005
    steps: int = 1200
    batch_size: int = 16
    lr: float = 4e-4
    lr_projection: float = 9e-4
    weight_decay: float = 0.05
    warmup: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")


def view_tags(labels: Tensor, first_rule: Tensor, table: RuleTable, min_share: float) -> tuple[Tensor, Tensor]:
    """Which labels a view shows, without their places.

    Args:
        labels: (B, g, g) label samples, 255 where unlabelled.
        first_rule: (B,) row of the rule of label 0 of each view's set.
        table: rules of all sets.
        min_share: least share of the view.

    Returns:
        View (T,) and rule (T,) of every tag; "background" is no tag.
    """
    rules = torch.where(labels == IGNORE, len(table.is_object), labels + first_rule[:, None, None]).flatten(1)
    counts = torch.zeros(len(rules), len(table.is_object) + 1).scatter_add_(1, rules, torch.ones(rules.shape))
    shown = (counts[:, :-1] >= min_share * rules.shape[1]) & table.is_object
    view, rule = shown.nonzero(as_tuple=True)
    return view, rule


def tag_loss(features: Tensor, view: Tensor, rule: Tensor, table: RuleTable, words: Tensor, scale: Tensor) -> Tensor:
    """Mean loss of the tags: a tag's word against the open word list without the view's other tags.

    Args:
        features: (B, N, D) features of the patches, whose scores are pooled, or (B, 1, D) of the whole views.
        view: (T,) from `view_tags`.
        rule: (T,) from `view_tags`.
        table: rules.
        words: (C, D) unit vectors of the concepts.
        scale: factor of the cosines.
    """
    logits = scale * F.normalize(features, dim=-1) @ words.T  # (B, N, C)
    pooled = logits.logsumexp(dim=1) - torch.tensor(float(logits.shape[1])).log()  # (B, C)
    present = torch.zeros_like(pooled, dtype=torch.bool)
    present[view, table.main_concept[rule]] = True
    right = table.permitted[1, rule]
    allowed = (table.allowed[1, rule] & ~present[view]) | right
    return words_nll(pooled[view], right, allowed).mean()


@torch.no_grad()
def encode_tokens(
    path: DensePath, photos: list[Photo], sampler: BalancedSampler, table: RuleTable, stage: TagStage, patch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pool: tokens before the last block (V, 1 + N, W) in float16, and view and rule of every tag."""
    options, chunk = CropOptions(size=stage.size), 16
    tokens, views, rules = [], [], []
    for start in tqdm(range(0, stage.views, chunk), desc="tag_views", unit="batch", mininterval=10):
        count = min(chunk, stage.views - start)
        batch = draw_batch(photos, sampler, options, count, patch, stage.seed * 1_000_003 + 700_000 + start)
        first = torch.tensor([table.first_rule[name] for name in batch.datasets])
        view, rule = view_tags(batch.labels, first, table, stage.min_share)
        tokens.append(path.lower(batch.pixels).half())
        views.append(view + start)
        rules.append(rule)
    return torch.cat(tokens), torch.cat(views), torch.cat(rules)


def train_from_tags(
    tower: CLIPVisionModelWithProjection,
    photos: list[Photo],
    sampler: BalancedSampler,
    table: RuleTable,
    words: ConceptWords,
    stage: TagStage,
    work_dir: Path,
) -> tuple[dict[str, Tensor], float]:
    """Train the last block from tags.

    Args:
        tower: the converted encoder, changed in place.
        photos: training photos.
        sampler: how views are drawn.
        table: permitted and allowed words.
        words: vectors of the concepts' words.
        stage: options.
        work_dir: where `fair_base.pt` is kept; a finished one of the same options is read.

    Returns:
        State dict of the tower and the learnt logarithm of the scale.
    """
    result = work_dir / "fair_base.pt"
    if result.exists():
        saved = load_tensors(result)
        if saved["options"] != asdict(stage):
            raise ValueError(f"{result} was made with other options: remove it or use another work folder.")
        return saved["tower"], saved["logit_scale"]
    path = DensePath(tower, len(tower.vision_model.encoder.layers) - 1)
    tokens, views, rules = encode_tokens(path, photos, sampler, table, stage, tower.config.patch_size)
    vision = tower.vision_model
    scale = nn.Parameter(torch.tensor(2.64))
    slow = [*vision.encoder.layers[-1].parameters(), *vision.post_layernorm.parameters()]
    fast = [*tower.visual_projection.parameters(), scale]
    groups = [{"params": slow, "initial_lr": stage.lr}, {"params": fast, "initial_lr": stage.lr_projection}]
    optimizer = torch.optim.AdamW(groups, weight_decay=stage.weight_decay, betas=(0.9, 0.98), fused=True)
    meter = RateMeter()
    for step in tqdm(range(stage.steps), desc="fair_base", unit="step", mininterval=10):
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        chosen = torch.randperm(stage.views, generator=generator)[: stage.batch_size]
        place = torch.full((stage.views,), -1).index_put_((chosen,), torch.arange(len(chosen)))
        member = place[views] >= 0
        dense, image = path.upper(tokens[chosen].float())
        read = {"patches": (dense,), "cls": (image[:, None],), "both": (dense, image[:, None])}[stage.pooling]
        drawn, heat = words.draw(generator), scale.exp().clamp(max=100.0)
        tags = place[views[member]], rules[member], table, drawn, heat
        loss = torch.stack([tag_loss(features, *tags) for features in read]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*slow, *fast], 1.0)
        factor = cosine_factor(step, stage.steps, stage.warmup, floor=0.02)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        meter.add(loss=loss.item())
        if (step + 1) % 20 == 0:
            numbers = " ".join(f"{key} {value:.3f}" for key, value in meter.flush().items())
            logger.info("fair_base %d/%d %s scale %.1f", step + 1, stage.steps, numbers, scale.exp().item())
    state = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    save_atomic({"tower": state, "logit_scale": float(scale), "options": asdict(stage)}, result)
    return state, float(scale)
