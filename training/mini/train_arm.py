"""Train the Attention Refinement Module on the finished mini CLIP, whose features are computed once and kept.

CLIP is frozen, so everything ARM reads (two hidden states and the host's patch features) is a function of the view
alone: a pool of augmented views is encoded once, and ARM, which is small, is trained on the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .common import RateMeter, cosine_factor, load_tensors, logger, save_atomic
from .crops import CropOptions, draw_batch
from .data import IGNORE, BalancedSampler, Photo
from .targets import ConceptWords, Regions, RuleTable, words_nll


@dataclass(frozen=True)
class ArmStage:
    """Options of ARM's training.

    Attributes:
        views: number of views in the pool.
        size: side of the views in pixels; a multiple of the patch.
        steps: optimiser steps.
        batch_size: views a step.
        pixels: share of the label samples used per step.
        lr: learning rate.
        lr_gain: learning rate of the output gain, if there is one.
        weight_decay: AdamW's.
        warmup: steps of linear increase.
        ema: decay of the averaged weights, which are the result.
        open_probability: share of views with the open word list.
        background_weight: factor on the weights of "background" pixels.
        save_every: steps between checkpoints.
        seed: of views and batches.
    """

    views: int = 400
    size: int = 280
    steps: int = 450
    batch_size: int = 6
    pixels: float = 0.3
    lr: float = 1e-3
    lr_gain: float = 5e-3
    weight_decay: float = 1e-2
    warmup: int = 30
    ema: float = 0.98
    open_probability: float = 0.4
    background_weight: float = 1.5
    save_every: int = 50
    seed: int = 0


@torch.inference_mode()
def encode_views(
    model: Any,
    photos: list[Photo],
    sampler: BalancedSampler,
    table: RuleTable,
    stage: ArmStage,
    work_dir: Path,
    chunk: int = 8,
) -> dict[str, Tensor]:
    """Draw the pool of views and run the frozen CLIP on it; kept in `arm_views.pt`.

    Args:
        model: an `ARMModel` (its ARM is not used).
        photos: training photos.
        sampler: how views are drawn.
        table: gives every (set, label) its rule.
        stage: options.
        work_dir: folder of the pool.
        chunk: views a forward pass.

    Returns:
        float16 hidden states (V, layers, N, W) and patch features (V, N, D), and rules (V, g*k, g*k) int16, -1 where
        unlabelled.
    """
    path = work_dir / "arm_views.pt"
    if path.exists():
        return load_tensors(path)
    patch = model.config.clip_config.vision_config.patch_size
    options = CropOptions(size=stage.size)
    hidden, deep, rules = [], [], []
    for start in tqdm(range(0, stage.views, chunk), desc="arm_views", unit="batch", mininterval=10):
        count = min(chunk, stage.views - start)
        batch = draw_batch(photos, sampler, options, count, patch, stage.seed * 1_000_003 + 500_000 + start)
        features = model.features(batch.pixels, "clearclip")
        states = features.hidden_patches(model.config.fusion_layers)
        hidden.append(torch.stack(states, dim=1).half())
        deep.append(features.patch_features.flatten(1, 2).half())
        first = torch.tensor([table.first_rule[name] for name in batch.datasets])[:, None, None]
        rules.append(torch.where(batch.labels == IGNORE, -1, batch.labels + first).short())
    pool = {"hidden": torch.cat(hidden), "deep": torch.cat(deep), "rules": torch.cat(rules)}
    save_atomic(pool, path)
    return pool


def fused_logits(
    arm: nn.Module, hidden: Tensor, deep: Tensor, words: Tensor, scale: float, samples: int, pick: Tensor
) -> Tensor:
    """Fused logits at some label samples.

    Args:
        arm: the module.
        hidden: (B, layers, N, W).
        deep: (B, N, D) host features.
        words: (C, D) unit vectors.
        scale: tau of the coarse map.
        samples: side of the square grid of label samples.
        pick: (B, P) indices into the flattened grid of samples.

    Returns:
        (B, P, C): tau cos, resampled bilinearly, plus E_t R_v, resampled bilinearly.
    """
    side = int(deep.shape[1] ** 0.5)
    refined = arm(list(hidden.unbind(1)), deep, (side, side))  # (B, D, H', W')
    refined = F.interpolate(refined, size=(samples, samples), mode="bilinear", align_corners=False)
    coarse = (scale * F.normalize(deep, dim=-1) @ words.T).transpose(1, 2).unflatten(2, (side, side))
    coarse = F.interpolate(coarse, size=refined.shape[-2:], mode="bilinear", align_corners=False)
    width = words.shape[1]
    chosen = refined.flatten(2).transpose(1, 2).gather(1, pick[..., None].expand(-1, -1, width))  # (B, P, D)
    coarse = coarse.flatten(2).transpose(1, 2).gather(1, pick[..., None].expand(-1, -1, len(words)))
    return coarse + chosen @ words.T


def train_arm(
    arm: nn.Module,
    pool: dict[str, Tensor],
    table: RuleTable,
    words: ConceptWords,
    scale: float,
    stage: ArmStage,
    work_dir: Path,
    stop_after: int | None = None,
) -> dict[str, Tensor]:
    """Train on the pool, resuming from `arm.pt` in the work folder.

    Args:
        arm: the product's `AttentionRefinementModule`, changed in place.
        pool: of `encode_views`.
        table: permitted and allowed words.
        words: vectors of the concepts' words.
        scale: tau of the coarse map.
        stage: options.
        work_dir: folder of the checkpoint.
        stop_after: end after this step without finishing (for tests of resuming).

    Returns:
        State dict of the averaged weights.
    """
    checkpoint = work_dir / "arm.pt"
    named = dict(arm.named_parameters())
    gain = [p for name, p in named.items() if name == "output_gain"]
    matrices = [p for name, p in named.items() if p.ndim >= 2]
    vectors = [p for name, p in named.items() if p.ndim < 2 and name != "output_gain"]
    groups: Sequence[dict] = [
        {"params": matrices, "initial_lr": stage.lr, "weight_decay": stage.weight_decay},
        {"params": vectors, "initial_lr": stage.lr, "weight_decay": 0.0},
        {"params": gain, "initial_lr": stage.lr_gain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), fused=True)
    average = {name: p.detach().clone() for name, p in named.items()}
    start = 0
    if checkpoint.exists():
        saved = load_tensors(checkpoint)
        if saved["options"] != asdict(stage):
            raise ValueError(f"{checkpoint} was made with other options: remove it or use another work folder.")
        start, average = saved["step"], saved["average"]
        arm.load_state_dict(saved["arm"])
        optimizer.load_state_dict(saved["optimizer"])
    arm.train()
    samples = pool["rules"].shape[-1]
    count = round(stage.pixels * samples * samples)
    meter = RateMeter()
    end = stage.steps if stop_after is None else min(stage.steps, stop_after)
    bar = tqdm(range(start, end), initial=start, total=stage.steps, desc="arm", unit="step", mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        views = torch.randperm(len(pool["deep"]), generator=generator)[: stage.batch_size]
        hidden, deep = pool["hidden"][views].float(), pool["deep"][views].float()
        if torch.rand((), generator=generator) < 0.5:  # mirrored views come for free
            side = int(deep.shape[1] ** 0.5)
            hidden = hidden.unflatten(2, (side, side)).flip(3).flatten(2, 3)
            deep = deep.unflatten(1, (side, side)).flip(2).flatten(1, 2)
            rules = pool["rules"][views].flip(2)
        else:
            rules = pool["rules"][views]
        pick = torch.rand(len(views), samples * samples, generator=generator).argsort(1)[:, :count]
        rule = rules.flatten(1).long().gather(1, pick)
        logits = fused_logits(arm, hidden, deep, words.draw(generator), scale, samples, pick)
        form = (torch.rand(len(views), 1, generator=generator) < stage.open_probability).long().expand_as(rule)
        valid = rule >= 0
        rule, form, logits = rule[valid], form[valid], logits[valid]
        is_background = ~table.is_object[rule]
        # in the closed form "background" is decided by its best word, as the finished model does
        nll = words_nll(logits, table.permitted[form, rule], table.allowed[form, rule], is_background & (form == 0))
        # every label of a view counts by the root of its area; evenly weighted pixels would unlearn small classes
        view = torch.arange(len(views))[:, None].expand_as(valid)[valid]
        regions = Regions.group(view, rule, len(table.is_object))
        weight = regions.area.float().rsqrt()[regions.of_sample]
        weight = weight * torch.where(is_background, stage.background_weight, 1.0)
        loss = (nll * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(arm.parameters(), 1.0)
        factor = cosine_factor(step, stage.steps, stage.warmup, floor=0.01)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        decay = min(stage.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in named.values()], 1 - decay)
        meter.add(loss=loss.item(), norm=norm.item())
        if (step + 1) % 20 == 0:
            numbers = " ".join(f"{key} {value:.3f}" for key, value in meter.flush().items())
            logger.info("arm %d/%d %s", step + 1, stage.steps, numbers)
        if (step + 1) % stage.save_every == 0 or step + 1 == end:
            state = {"options": asdict(stage), "step": step + 1, "arm": arm.state_dict(), "average": average}
            save_atomic({**state, "optimizer": optimizer.state_dict()}, checkpoint)
    arm.eval()
    return average
