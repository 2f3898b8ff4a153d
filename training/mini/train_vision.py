"""Train the vision tower on labelled photos: dense features through ClearCLIP's last block, image level through CLS."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPVisionModelWithProjection

from .common import RateMeter, cosine_factor, load_tensors, logger, save_atomic
from .crops import Batch, CropOptions, draw_batch
from .data import IGNORE, BalancedSampler, Photo
from .targets import ConceptWords, RuleTable, dense_and_image_loss


@dataclass(frozen=True)
class VisionStage:
    """Options of one training stage.

    Attributes:
        name: names the checkpoint.
        steps: optimiser steps.
        batch_size: views a step.
        size: side of the views in pixels.
        keep: share of patch tokens kept after the frozen blocks.
        frozen_blocks: the lowest blocks (and the embeddings) stay as they are.
        lr_last: learning rate of the last block.
        lr_blocks: of the block before it; every block below has `lr_decay` times the rate of the one above.
        lr_decay: see above.
        lr_projection: of the visual projection, the last norm and the scale.
        weight_decay: AdamW's.
        warmup: steps of linear increase.
        clip: gradient norm.
        ema: decay of the running average of the weights, which is the stage's result.
        region_weight: weight of the region term.
        image_weight: weight of the image-level term.
        open_probability: share of the views with the open word list.
        class_power: see `BalancedSampler`.
        min_zoom: see `CropOptions`.
        background_weight: see `dense_and_image_loss`.
        background_by_best: see `dense_and_image_loss`.
        negatives: random everyday words as further wrong answers in the open form.
        save_every: steps between checkpoints.
        seed: of views, tokens and words.
    """

    name: str = "vision_a"
    steps: int = 600
    batch_size: int = 16
    size: int = 224
    keep: float = 0.5
    frozen_blocks: int = 4
    lr_last: float = 3e-4
    lr_blocks: float = 1.5e-4
    lr_decay: float = 0.85
    lr_projection: float = 9e-4
    weight_decay: float = 0.05
    warmup: int = 30
    clip: float = 1.0
    ema: float = 0.99
    region_weight: float = 0.5
    image_weight: float = 0.3
    open_probability: float = 0.5
    class_power: float = 0.4
    min_zoom: float = 0.4
    background_weight: float = 1.0
    background_by_best: bool = False
    negatives: int = 128
    save_every: int = 25
    seed: int = 0


def position_rows(table: Tensor, grid: int) -> Tensor:
    """Position table for a square grid by the reference rule, see `arm_hf.modeling.trunk`: (1 + grid^2, W)."""
    side = int((len(table) - 1) ** 0.5)
    if grid == side:
        return table
    factor = (grid + 0.1) / side
    patches = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches[0].flatten(1).T])


class DensePath(nn.Module):
    """The tower as it is trained: frozen lower blocks, some of the tokens above, two readings of the last block.

    Args:
        tower: the vision tower; its parameters are trained in place.
        frozen_blocks: number of lowest blocks without gradient.
    """

    def __init__(self, tower: CLIPVisionModelWithProjection, frozen_blocks: int) -> None:
        super().__init__()
        self.tower = tower
        self.frozen_blocks = frozen_blocks
        vision = tower.vision_model
        for module in (vision.embeddings, vision.pre_layrnorm, *vision.encoder.layers[:frozen_blocks]):
            module.requires_grad_(False)

    @torch.no_grad()
    def lower(self, pixels: Tensor) -> Tensor:
        """Tokens after the frozen blocks: (B, 3, S, S) -> (B, 1 + N, W)."""
        vision = self.tower.vision_model
        patches = vision.embeddings.patch_embedding(pixels)  # (B, W, g, g)
        grid = patches.shape[-1]
        cls = vision.embeddings.class_embedding.expand(len(pixels), 1, -1)
        tokens = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = vision.pre_layrnorm(tokens + position_rows(vision.embeddings.position_embedding.weight, grid))
        for block in vision.encoder.layers[: self.frozen_blocks]:
            tokens = block(tokens, None)
        return tokens

    def upper(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks above the frozen ones.

        Args:
            tokens: (B, 1 + n, W), CLS first.

        Returns:
            Dense features (B, n, D) and image-level embeddings (B, D), neither normalised.
        """
        vision = self.tower.vision_model
        *blocks, last = vision.encoder.layers[self.frozen_blocks :]
        for block in blocks:
            tokens = block(tokens, None)
        attention = last.self_attn
        normed = last.layer_norm1(tokens)
        heads = attention.num_heads

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, L, d)

        query, value = split(attention.q_proj(normed)), split(attention.v_proj(normed))
        dense = F.scaled_dot_product_attention(query, query, value).transpose(1, 2).flatten(2)
        dense = attention.out_proj(dense)[:, 1:]
        key = split(attention.k_proj(normed))
        cls = F.scaled_dot_product_attention(query[:, :, :1], key, value).transpose(1, 2).flatten(2)
        cls = tokens[:, :1] + attention.out_proj(cls)
        cls = cls + last.mlp(last.layer_norm2(cls))
        project = self.tower.visual_projection
        return project(vision.post_layernorm(dense)), project(vision.post_layernorm(cls))[:, 0]


def parameter_groups(path: DensePath, scale: nn.Parameter, stage: VisionStage) -> list[dict]:
    """AdamW groups with a rate per depth; no decay for vectors."""
    vision = path.tower.vision_model
    layers = vision.encoder.layers
    rates: list[tuple[float, list[nn.Parameter]]] = [
        (stage.lr_projection, [*path.tower.visual_projection.parameters()]),
        (stage.lr_last, [*vision.post_layernorm.parameters(), *layers[-1].parameters()]),
    ]
    for above, block in enumerate(reversed(layers[path.frozen_blocks : -1])):
        rates.append((stage.lr_blocks * stage.lr_decay**above, [*block.parameters()]))
    groups = []
    for rate, parameters in rates:
        for matrix in (True, False):
            chosen = [p for p in parameters if (p.ndim >= 2) == matrix]
            if chosen:
                decay = stage.weight_decay if matrix else 0.0
                groups.append({"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    rate = stage.lr_projection
    groups.append({"params": [scale], "lr": rate, "initial_lr": rate, "weight_decay": 0.0})
    return groups


def sample_patches(
    labels: Tensor, size: int, patch: int, keep: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose patches and one label sample inside each.

    Args:
        labels: (B, g*k, g*k) label samples.
        size: side of the views in pixels.
        patch: patch side.
        keep: share of patches.
        generator: random numbers.

    Returns:
        Indices of the chosen patches (B, n) and their labels (B, n).
    """
    grid = size // patch
    fine = labels.shape[-1] // grid
    cells = labels.unflatten(2, (grid, fine)).unflatten(1, (grid, fine))  # (B, g, k, g, k)
    cells = cells.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # (B, N, k*k)
    count = max(1, round(keep * grid * grid))
    index = torch.rand(cells.shape[:2], generator=generator).argsort(dim=1)[:, :count]
    inside = torch.randint(cells.shape[-1], index.shape, generator=generator)
    chosen = cells.gather(1, index[..., None].expand(-1, -1, cells.shape[-1]))
    return index, chosen.gather(2, inside[..., None])[..., 0]


def train_vision(
    tower: CLIPVisionModelWithProjection,
    logit_scale: float,
    photos: list[Photo],
    sampler: BalancedSampler,
    table: RuleTable,
    words: ConceptWords,
    negatives: Tensor,
    stage: VisionStage,
    work_dir: Path,
    stop_after: int | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Run one stage, resuming from its checkpoint if there is one.

    Args:
        tower: start weights; changed in place.
        logit_scale: natural logarithm of the factor of the cosines at the start.
        photos: training photos.
        sampler: how views are drawn.
        table: permitted and allowed words.
        words: vectors of the concepts' words.
        negatives: (n, D) vectors of everyday words that name nothing in the sets.
        stage: options.
        work_dir: where the checkpoint `<stage.name>.pt` is written.
        stop_after: end after this step without finishing (for tests of resuming).

    Returns:
        State dict of the averaged tower and the learnt logarithm of the factor.
    """
    checkpoint = work_dir / f"{stage.name}.pt"
    path = DensePath(tower, stage.frozen_blocks)
    tower.train()
    scale = nn.Parameter(torch.tensor(float(logit_scale)))
    groups = parameter_groups(path, scale, stage)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    trained = [p for group in groups for p in group["params"]]
    average = [p.detach().clone() for p in trained]
    start = 0
    if checkpoint.exists():
        saved = load_tensors(checkpoint)
        if saved["options"] != asdict(stage):
            raise ValueError(f"{checkpoint} was made with other options: remove it or use another work folder.")
        start = saved["step"]
        for parameter, value in zip(trained, saved["trained"], strict=True):
            parameter.data.copy_(value)
        average = [value.clone() for value in saved["average"]]
        optimizer.load_state_dict(saved["optimizer"])
    names = {id(p): name for name, p in tower.named_parameters()}
    options = CropOptions(size=stage.size, min_zoom=stage.min_zoom)
    patch = tower.config.patch_size
    meter = RateMeter()
    end = stage.steps if stop_after is None else min(stage.steps, stop_after)
    bar = tqdm(range(start, end), initial=start, total=stage.steps, desc=stage.name, unit="step", mininterval=10)

    def save(step: int) -> None:
        save_atomic(
            {
                "options": asdict(stage),
                "step": step,
                "trained": [p.detach() for p in trained],
                "average": average,
                "optimizer": optimizer.state_dict(),
            },
            checkpoint,
        )

    def draw(step: int) -> Future[Batch]:
        seed = stage.seed * 1_000_003 + step
        return ahead.submit(draw_batch, photos, sampler, options, stage.batch_size, patch, seed)

    ahead = ThreadPoolExecutor(1)  # the next batch is drawn while this one is computed
    coming = draw(start)
    for step in bar:
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        batch, coming = coming.result(), draw(step + 1)
        tokens = path.lower(batch.pixels)
        index, labels = sample_patches(batch.labels, stage.size, patch, stage.keep, generator)
        gathered = tokens[:, 1:].gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        dense, cls = path.upper(torch.cat([tokens[:, :1], gathered], dim=1))
        valid = labels != IGNORE
        first = torch.tensor([table.first_rule[name] for name in batch.datasets])
        form = (torch.rand(len(first), generator=generator) < stage.open_probability).long()
        chosen = torch.randint(len(negatives), (stage.negatives,), generator=generator)
        parts = dense_and_image_loss(
            dense[valid],
            cls,
            torch.arange(len(first))[:, None].expand_as(labels)[valid],
            (first[:, None] + labels)[valid],
            form,
            table,
            words.draw(generator),
            negatives[chosen],
            scale.exp().clamp(max=100.0),
            labels.shape[1],
            stage.background_weight,
            stage.background_by_best,
        )
        loss = parts.patch + stage.region_weight * parts.region + stage.image_weight * parts.image
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, stage.clip)
        factor = cosine_factor(step, stage.steps, stage.warmup, floor=0.02)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        decay = min(stage.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - decay)
        meter.add(patch=parts.patch.item(), region=parts.region.item(), image=parts.image.item(), norm=norm.item())
        if (step + 1) % 10 == 0:
            numbers = " ".join(f"{key} {value:.3f}" for key, value in meter.flush().items())
            logger.info("%s %d/%d %s scale %.1f", stage.name, step + 1, stage.steps, numbers, scale.exp().item())
        if (step + 1) % stage.save_every == 0 or step + 1 == end:
            save(step + 1)
    ahead.shutdown(cancel_futures=True)
    state = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    for parameter, value in zip(trained, average, strict=True):
        if id(parameter) in names:
            state[names[id(parameter)]] = value.clone()
    return state, float(average[-1])
