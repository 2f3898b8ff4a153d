"""Which method with which settings a golden stands for, and how far our numbers are from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from arm_hf.modeling.block import run_block
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.method import get_method
from arm_hf.modeling.trunk import Padding, TrunkOutput

HERE = Path(__file__).parent
CORE = HERE / "last_block.npz"

PLAIN = {"residual": False, "mlp": False}
FULL = {"residual": True, "mlp": True}

# Name in the golden files -> our method and its settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("clip", {}),
    "vanilla_nores": ("clip", PLAIN),
    "maskclip": ("maskclip", {}),
    "maskclip_res": ("maskclip", FULL),
    "sclip": ("sclip", {}),
    "sclip_nores": ("sclip", PLAIN),
    "clearclip": ("clearclip", {}),
    "clearclip_res": ("clearclip", FULL),
    "naclip": ("naclip", {}),
    "naclip_std1": ("naclip", {"gaussian_std": 1.0}),
    "naclip_res": ("naclip", FULL),
    "naclip_kk": ("naclip", {"attention": "kk"}),
    "naclip_nonly": ("naclip", {"attention": "neighbour_only"}),
}

# Largest absolute difference that counts as the same number.
TOLERANCES = {"feat": 2e-5, "cos": 2e-6, "penultimate": 5e-5, "pos_embed": 1e-6, "cls_embed": 2e-5, "gauss": 1e-6}


@dataclass(frozen=True)
class Difference:
    """Worst difference between one of our arrays and the golden of that name."""

    where: str
    variant: str
    kind: str
    error: float

    @property
    def tolerance(self) -> float:
        """What is allowed for this kind of array."""
        return TOLERANCES[self.kind]


def worst(ours: torch.Tensor, golden: np.ndarray) -> float:
    """Largest absolute difference; raises when shapes differ."""
    if tuple(ours.shape) != golden.shape:
        raise ValueError(f"shape {tuple(ours.shape)} against a golden of {golden.shape}")
    return float((ours.detach().double() - torch.from_numpy(golden).double()).abs().max())


def cosines(features: torch.Tensor, text: np.ndarray) -> torch.Tensor:
    """Cosine of features (..., D) with unit vectors (K, D)."""
    return F.normalize(features, dim=-1) @ torch.from_numpy(text).to(features.dtype).T


@torch.no_grad()
def compare_whole_tower(clip: CLIPModel, golden: Mapping[str, np.ndarray], where: str) -> Iterator[Difference]:
    """Differences of a full pass over an input's arrays (`dense_*.npz` of the reference numbers)."""
    dense = DenseCLIP(clip)
    pixels = torch.from_numpy(golden["pixel_values"])
    trunk = dense.run_trunk(pixels)
    yield Difference(where, "trunk", "penultimate", worst(trunk.last_input[0], golden["penultimate"]))
    yield Difference(where, "trunk", "pos_embed", worst(dense.tower.position_table(trunk.grid), golden["pos_embed"]))
    cls = dense.tower.project(run_block(dense.tower.last_block, trunk.last_input)[0])[:, 0]
    yield Difference(where, "trunk", "cls_embed", worst(cls, golden["cls_embed"]))
    for variant, (method, options) in VARIANTS.items():
        features = dense.features(pixels, method, options).patch_features[0].flatten(0, 1)  # (N, D)
        yield Difference(where, variant, "feat", worst(features, golden[f"{variant}.feat"]))
        cos = cosines(features, golden["text_features"])
        yield Difference(where, variant, "cos", worst(cos, golden[f"{variant}.cos"]))


def last_block_clip(core: Mapping[str, np.ndarray]) -> CLIPModel:
    """A CLIP whose image tower is the golden model's last block alone, with its head and its position table."""
    config = CLIPConfig(
        projection_dim=64,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "projection_dim": 64,
        },
        text_config={
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "projection_dim": 64,
        },
    )
    clip = CLIPModel(config).eval()
    weights = {key.removeprefix("weights/"): core[key] for key in core if key.startswith("weights/")}
    state = {key: torch.from_numpy(value).float() for key, value in weights.items()}
    unexpected = clip.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"the golden file holds weights that the model has not: {unexpected}")
    return clip


@torch.no_grad()
def compare_last_block(clip: CLIPModel, core: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    """Differences of the last block alone, from the golden input of the last block (`last_block.npz`)."""
    dense = DenseCLIP(clip)
    for where, grid in {"sq64": (4, 4), "sq96": (6, 6)}.items():
        hidden = torch.from_numpy(core[f"{where}/penultimate"])[None]
        pixels = torch.zeros(1, 3, grid[0] * 16, grid[1] * 16)
        trunk = TrunkOutput(hidden, grid, Padding(), pixels)
        for variant, (name, options) in VARIANTS.items():
            method = get_method(name)
            features = dense.apply(method, method.settings(options), trunk).patch_features[0].flatten(0, 1)
            yield Difference(where, variant, "feat", worst(features, core[f"{where}/{variant}.feat"]))
            cos = cosines(features, core["text_features"])
            yield Difference(where, variant, "cos", worst(cos, core[f"{where}/{variant}.cos"]))
    for where, grid in {"sq64": (4, 4), "ns80x128": (5, 8)}.items():
        table = dense.tower.position_table(grid)
        yield Difference(where, "trunk", "pos_embed", worst(table, core[f"{where}/pos_embed"]))
