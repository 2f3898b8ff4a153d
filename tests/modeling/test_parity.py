"""Our numbers against the numbers of the authors' own code. The committed part needs nothing but the repository."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.last_block_methods import gaussian_bias
from arm_hf.modeling.text import encode_prompts
from arm_hf.modeling.trunk import TrunkRequest, VisionTower
from tests.goldens.parity import (
    CORE,
    VARIANTS,
    compare_last_block,
    compare_whole_tower,
    cosines,
    last_block_clip,
    worst,
)
from tests.goldens.report import table

SIZES = ("sq64", "sq96")


@pytest.fixture(scope="module")
def core() -> Iterator[dict[str, np.ndarray]]:
    with np.load(CORE) as file:
        yield dict(file)


@pytest.fixture(scope="module")
def golden_clip(shared: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(shared / "goldens/tiny_clip_hf").eval()


@pytest.fixture(scope="module", params=SIZES)
def golden(request: pytest.FixtureRequest, shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / f"goldens/self_attention/dense_{request.param}.npz") as file:
        return {"where": request.param, **file}


def test_last_block_equals_the_committed_numbers(core):
    differences = list(compare_last_block(last_block_clip(core), core))
    assert len(differences) == 2 * 2 * len(VARIANTS) + 2
    assert not [found for found in differences if found.error > found.tolerance], table(differences)


def test_variants_differ_so_that_a_swapped_name_would_show(core):
    for where in SIZES:
        features = np.stack([core[f"{where}/{variant}.feat"] for variant in VARIANTS])
        gaps = np.abs(features[:, None] - features[None]).max(axis=(2, 3)) + np.eye(len(VARIANTS))
        assert gaps.min() > 1e-3


def test_committed_file_is_what_the_script_builds(shared, core):
    from tests.goldens.make_core import build

    rebuilt = build(shared)
    assert rebuilt.keys() == core.keys()
    assert all(np.array_equal(rebuilt[key], core[key]) for key in core)
    assert CORE.stat().st_size < 700_000


def test_whole_tower_equals_the_reference_numbers(golden_clip, golden):
    differences = list(compare_whole_tower(golden_clip, golden, golden["where"]))
    print(f"\n{golden['where']}\n{table(differences)}")
    assert not [found for found in differences if found.error > found.tolerance], table(differences)


@torch.no_grad()
def test_first_of_a_batch_of_three_equals_the_reference_numbers(golden_clip, golden):
    dense = DenseCLIP(golden_clip)
    pixels = torch.from_numpy(golden["pixel_values"])
    noise = torch.randn((2, *pixels.shape[1:]), generator=torch.Generator().manual_seed(0))
    batch = torch.cat([pixels, noise])
    for variant, (method, options) in VARIANTS.items():
        features = dense.features(batch, method, options).patch_features[0].flatten(0, 1)
        assert worst(features, golden[f"{variant}.feat"]) < 2e-5, variant
        assert worst(cosines(features, golden["text_features"]), golden[f"{variant}.cos"]) < 2e-6, variant


@torch.no_grad()
def test_labels_equal_those_of_the_reference_cosines(golden_clip, golden):
    text = torch.from_numpy(golden["text_features"])
    dense = DenseCLIP(golden_clip)
    for variant, (method, options) in VARIANTS.items():
        features = dense.features(torch.from_numpy(golden["pixel_values"]), method, options)
        labels = dense.score_map(features, text).values[0].argmax(dim=0).flatten()
        assert np.array_equal(labels.numpy(), golden[f"{variant}.cos"].argmax(axis=1)), variant


@torch.no_grad()
def test_attention_maps_of_middle_blocks_equal_the_reference_mean(golden_clip, golden):
    request = TrunkRequest(attention_maps=(5, 6, 7, 8))
    trunk = DenseCLIP(golden_clip).run_trunk(torch.from_numpy(golden["pixel_values"]), request)
    mean = torch.stack(list(trunk.attention_maps.values())).mean(dim=0)[0]
    assert worst(mean, golden["rcs.attn"]) < 1e-6


def test_position_table_of_a_non_square_grid(golden_clip, shared):
    with np.load(shared / "goldens/self_attention/core.npz") as file:
        assert worst(VisionTower(golden_clip).position_table((5, 8)), file["ns80x128/pos_embed"]) < 1e-6


@pytest.mark.parametrize("std", [1, 5])
@pytest.mark.parametrize("grid", [(4, 4), (5, 8), (6, 6)])
def test_gaussian_equals_the_reference_addition(shared, grid, std):
    with np.load(shared / "goldens/self_attention/units.npz") as file:
        expected = file[f"gauss.{grid[0]}x{grid[1]}.std{std}"]
    assert worst(gaussian_bias(grid, std), expected) < 1e-6


@torch.no_grad()
def test_text_tower_equals_the_reference_class_vectors(golden_clip, shared):
    with np.load(shared / "goldens/self_attention/text_tower.npz") as file:
        ids = torch.from_numpy(file["token_ids"])
        assert worst(encode_prompts(golden_clip, ids), file["class_vectors"]) < 2e-6
        one_by_one = encode_prompts(golden_clip, ids.flatten(0, 1))
        expected = F.normalize(torch.from_numpy(file["per_prompt"]), dim=-1).flatten(0, 1)
        assert worst(one_by_one, expected.numpy()) < 2e-6


@torch.no_grad()
def test_bfloat16_stays_close(golden_clip, golden):
    text = torch.from_numpy(golden["text_features"])
    clip = CLIPModel(golden_clip.config).to(torch.bfloat16).eval()
    clip.load_state_dict(golden_clip.state_dict())
    dense = DenseCLIP(clip)
    agreeing = []
    for variant, (method, options) in VARIANTS.items():
        features = dense.features(torch.from_numpy(golden["pixel_values"]), method, options)
        assert features.patch_features.dtype == torch.bfloat16
        ours = features.patch_features[0].flatten(0, 1).float()
        direction = F.cosine_similarity(ours, torch.from_numpy(golden[f"{variant}.feat"]), dim=-1)
        assert direction.min() > 0.99, variant
        labels = (F.normalize(ours, dim=-1) @ text.T).argmax(dim=1).numpy()
        agreeing.append((labels == golden[f"{variant}.cos"].argmax(axis=1)).mean())
    assert np.mean(agreeing) > 0.95
