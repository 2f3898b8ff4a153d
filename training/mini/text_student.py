"""A small CLIP text tower that learns the teacher's word vectors in any prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .common import RateMeter, cosine_factor, load_tensors, logger, save_atomic

ADJECTIVES = (
    "red", "green", "blue", "yellow", "white", "black", "brown", "grey", "orange", "pink", "wooden", "metal", "glass",
    "plastic", "stone", "big", "small", "old", "new", "tall", "round", "empty", "wet", "dirty", "clean", "broken",
    "parked", "flying", "young", "wild", "toy", "dark", "bright", "striped", "two", "several", "open", "closed",
)  # fmt: skip


@dataclass(frozen=True)
class TextStage:
    """Options of the distillation.

    Attributes:
        width: hidden width; at most the projection width, so that token rows can start from the targets.
        layers: transformer blocks.
        heads: attention heads.
        max_length: longest prompt in tokens.
        steps: optimiser steps.
        batch_size: prompts a step.
        named_share: share of prompts about class names and synonyms.
        lr: learning rate of the blocks.
        lr_tokens: of the token table.
        weight_decay: AdamW's, on matrices other than tables.
        warmup: steps of linear increase.
        contrastive: weight of InfoNCE.
        scale: factor of the cosines in InfoNCE.
        save_every: steps between checkpoints.
        seed: of prompts and initial weights.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    max_length: int = 40
    steps: int = 1500
    batch_size: int = 192
    named_share: float = 0.4
    lr: float = 2e-3
    lr_tokens: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 50
    contrastive: float = 0.1
    scale: float = 20.0
    save_every: int = 100
    seed: int = 0


def build_student(
    tokenizer: CLIPTokenizer, stage: TextStage, words: Sequence[str], vectors: Tensor
) -> CLIPTextModelWithProjection:
    """A tower whose token rows start from the vectors of the words they spell.

    Tokens that are whole words of the list start at the word's vector, pieces of words at the mean over the words that
    contain them, both reduced to `stage.width` principal components; the projection starts as the way back.

    Args:
        tokenizer: of `train_tokenizer`.
        stage: options.
        words: word list.
        vectors: (n, D) its unit vectors.
    """
    torch.manual_seed(stage.seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=stage.width,
        intermediate_size=4 * stage.width,
        num_hidden_layers=stage.layers,
        num_attention_heads=stage.heads,
        max_position_embeddings=stage.max_length,
        hidden_act="gelu",
        projection_dim=vectors.shape[1],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    basis = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors[:, -stage.width :].float()  # (D, width)
    reduced = vectors @ basis
    total = torch.zeros(len(tokenizer), stage.width)
    count = torch.zeros(len(tokenizer))
    encoded = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    for ids, row in zip(encoded, reduced, strict=True):
        weight = 1.0 / len(ids) ** 2  # a word that is one token decides that token's row
        total.index_add_(0, torch.tensor(ids), row.expand(len(ids), -1) * weight)
        count.index_add_(0, torch.tensor(ids), torch.full((len(ids),), weight))
    known = count > 0
    rows = total[known] / count[known, None]
    with torch.no_grad():
        table = model.text_model.embeddings.token_embedding.weight
        table.normal_(0, 0.02)
        table[known] = rows / rows.norm(dim=1, keepdim=True).mean() * math.sqrt(stage.width) * 0.1
        model.text_projection.weight.copy_(basis)
    return model


def compound_words(nouns: Sequence[str], count: int, seed: int) -> list[str]:
    """Random "adjective noun" pairs, so that the tower learns what an adjective changes."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(ADJECTIVES), (count,), generator=generator).tolist()
    second = torch.randint(len(nouns), (count,), generator=generator).tolist()
    return list(dict.fromkeys(f"{ADJECTIVES[i]} {nouns[j]}" for i, j in zip(first, second, strict=True)))


@torch.inference_mode()
def embed_with_student(
    model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, words: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Prompt-ensembled unit vectors (n, D): mean of the normalised prompts, normalised."""
    prompts = [template.replace("{}", word) for word in words for template in templates]
    limit = model.config.max_position_embeddings
    parts = []
    for start in range(0, len(prompts), 512):
        batch = tokenizer(
            prompts[start : start + 512], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        parts.append(F.normalize(model(**batch).text_embeds, dim=-1))
    return F.normalize(torch.cat(parts).unflatten(0, (len(words), len(templates))).mean(1), dim=-1)


def retrieval_accuracy(predicted: Tensor, targets: Tensor) -> float:
    """Share of words whose own target is the nearest of all targets, in percent."""
    hits = (predicted @ targets.T).argmax(1) == torch.arange(len(targets))
    return 100.0 * hits.float().mean().item()


def train_student(
    model: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    named: tuple[Sequence[str], Tensor],
    everyday: tuple[Sequence[str], Tensor],
    templates: Sequence[str],
    stage: TextStage,
    work_dir: Path,
    stop_after: int | None = None,
) -> CLIPTextModelWithProjection:
    """Distil, resuming from `text_student.pt` in the work folder.

    Args:
        model: start weights, changed in place.
        tokenizer: its tokenizer.
        named: class names and synonyms with their targets (n, D).
        everyday: other words and compounds with their targets (m, D).
        templates: prompts with one ``{}``; besides, a quarter of the texts is the bare word.
        stage: options.
        work_dir: folder of the checkpoint.
        stop_after: end after this step without finishing (for tests of resuming).
    """
    checkpoint = work_dir / "text_student.pt"
    tables: list[torch.nn.Parameter] = []
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        kind = tables if "embedding" in name else matrices if parameter.ndim >= 2 else vectors
        kind.append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": tables, "initial_lr": stage.lr_tokens, "weight_decay": 0.0},
            {"params": matrices, "initial_lr": stage.lr, "weight_decay": stage.weight_decay},
            {"params": vectors, "initial_lr": stage.lr, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    start = 0
    if checkpoint.exists():
        saved = load_tensors(checkpoint)
        if saved["options"] != asdict(stage):
            raise ValueError(f"{checkpoint} was made with other options: remove it or use another work folder.")
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    words = [*named[0], *everyday[0]]
    targets = torch.cat([named[1], everyday[1]])
    model.train()
    meter = RateMeter()
    end = stage.steps if stop_after is None else min(stage.steps, stop_after)
    bar = tqdm(range(start, end), initial=start, total=stage.steps, desc="text_student", unit="step", mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        is_named = torch.rand(stage.batch_size, generator=generator) < stage.named_share
        pick = torch.rand(stage.batch_size, generator=generator)
        index = torch.where(is_named, pick * len(named[0]), len(named[0]) + pick * len(everyday[0])).long()
        form = torch.randint(len(templates) + len(templates) // 3, (stage.batch_size,), generator=generator).tolist()
        prompts = [
            templates[f].replace("{}", words[i]) if f < len(templates) else words[i]
            for f, i in zip(form, index.tolist(), strict=True)
        ]
        batch = tokenizer(prompts, padding=True, truncation=True, max_length=stage.max_length, return_tensors="pt")
        out = F.normalize(model(**batch).text_embeds, dim=-1)
        goal = targets[index]
        cosine = (out * goal).sum(1)
        logits = stage.scale * out @ goal.T
        # the same word twice in a batch is no wrong answer for itself
        same = (index[:, None] == index[None]) & ~torch.eye(len(index), dtype=torch.bool)
        contrast = F.cross_entropy(logits.masked_fill(same, -1e4), torch.arange(len(index)))
        loss = (1 - cosine).mean() + stage.contrastive * contrast
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = cosine_factor(step, stage.steps, stage.warmup, floor=0.01)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        meter.add(cos=cosine.mean().item(), contrast=contrast.item(), cos_named=cosine[is_named].mean().item())
        if (step + 1) % 50 == 0:
            numbers = " ".join(f"{key} {value:.3f}" for key, value in meter.flush().items())
            logger.info("text_student %d/%d %s", step + 1, stage.steps, numbers)
        if (step + 1) % stage.save_every == 0 or step + 1 == end:
            state = {"options": asdict(stage), "step": step + 1, "model": model.state_dict()}
            save_atomic({**state, "optimizer": optimizer.state_dict()}, checkpoint)
    return model.eval()
