"""ResCLIP against the authors' numbers and against a plain restatement."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.modeling import semantic_feedback
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.method import get_method
from arm_hf.modeling.resclip import RESCLIP_SETTINGS
from arm_hf.modeling.semantic_feedback import (
    feedback_matrix,
    first_pass_labels,
    same_region,
    segment_is_free,
    smooth,
)
from arm_hf.modeling.trunk import Padding, TrunkOutput
from tests.goldens.make_resclip import GRIDS, RESCLIP, VARIANTS
from tests.goldens.parity import CORE, TOLERANCES, cosines, last_block_clip, worst

from .conftest import noise
from .test_pamr import plain_pamr

BASES = ("naclip", "clearclip", "sclip")
PRESET_OF = {"voc20": "voc20", "voc21": "voc21", "city": "cityscapes"}


def options_of(variant: str, **more) -> dict:
    _, base, preset, parts = variant.split(".")
    path = {"path": "any"} if "nodecay" in parts else {}
    return {"base": base, "preset": PRESET_OF[preset], "rcs": "rcs" in parts, "sfr": "sfr" in parts, **path, **more}


@pytest.fixture(scope="module")
def committed():
    with np.load(CORE) as core, np.load(RESCLIP) as own:
        return last_block_clip(core), {**core, **own}


@pytest.fixture(scope="module", params=["sq64", "sq96"])
def golden(request, shared):
    with np.load(shared / f"goldens/self_attention/dense_{request.param}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden_clip(shared):
    return CLIPModel.from_pretrained(shared / "goldens/tiny_clip_hf").eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_last_block_equals_the_committed_numbers(committed, variant):
    clip, arrays = committed
    pixels, text = torch.from_numpy(arrays["pixel_values"]), torch.from_numpy(arrays["text_features"])
    hidden, attention = torch.from_numpy(arrays["sq64/penultimate"])[None], torch.from_numpy(arrays["rcs.attn"])[None]
    trunk = TrunkOutput(hidden, (4, 4), Padding(), pixels, attention_maps={0: attention})
    dense, method = DenseCLIP(clip), get_method("resclip")
    for half, kind in ((False, "cos_fp32sfr"), (True, "cos")):
        settings = method.settings(options_of(variant, half_sfr=half, rcs_layers=(1, 1)))
        if not settings.sfr:
            kind = "cos"
        features = dense.apply(method, settings, trunk, text)
        found = cosines(features.patch_features[0].flatten(0, 1), arrays["text_features"])
        assert worst(found, arrays[f"{variant}.{kind}"]) < TOLERANCES["cos"]
        if settings.sfr:
            assert np.array_equal(features.context.scratch["labels"][0].numpy(), arrays[f"{variant}.labels"])


@pytest.mark.parametrize("grid", GRIDS)
def test_feedback_equals_the_committed_numbers(committed, grid):
    arrays = committed[1]
    labels = torch.from_numpy(arrays[f"sfr.{grid}.labels"]).long()
    assert np.array_equal(segment_is_free(labels).numpy(), arrays[f"sfr.{grid}.path_ok"])
    assert worst(feedback_matrix(labels), arrays[f"sfr.{grid}.std5"]) < 1e-6


def test_committed_file_is_what_the_script_builds(shared, committed):
    from tests.goldens.make_resclip import build

    rebuilt = build(shared)
    assert all(np.array_equal(rebuilt[key], committed[1][key]) for key in rebuilt)
    assert RESCLIP.stat().st_size < 200_000


@torch.no_grad()
def test_every_variant_equals_the_reference_numbers(golden_clip, golden):
    dense, text = DenseCLIP(golden_clip), torch.from_numpy(golden["text_features"])
    pixels = torch.from_numpy(golden["pixel_values"])
    pixels = torch.cat([pixels, noise(*pixels.shape)])  # ours takes batches
    compared = 0
    for variant in sorted({key.rsplit(".", 1)[0] for key in golden if key.startswith("resclip.")}):
        for half in (False, True):
            options = options_of(variant, half_sfr=half)
            found = dense.features(pixels, "resclip", options, class_embeddings=text)
            features = found.patch_features[0].flatten(0, 1)
            suffix = "_fp32sfr" if options["sfr"] and not half else ""
            for kind, ours in (("feat", features), ("cos", cosines(features, golden["text_features"]))):
                if f"{variant}.{kind}{suffix}" in golden:
                    assert worst(ours, golden[f"{variant}.{kind}{suffix}"]) < TOLERANCES[kind], (variant, kind, half)
                    compared += 1
            if options["sfr"]:
                labels = found.context.scratch["labels"][0]
                if f"{variant}.labels" in golden:
                    assert np.array_equal(labels.numpy(), golden[f"{variant}.labels"])
                matrix = feedback_matrix(labels, path=found.settings.path)
                assert worst(matrix, golden[f"{variant}.sfr"]) < 1e-6
    assert compared == 2 * (9 * 2 + 12 * 2) + 1


@pytest.mark.parametrize("grid", ["4x4", "6x6", "5x8", "7x11"])
def test_feedback_equals_the_reference_units(shared, grid):
    with np.load(shared / "goldens/self_attention/units.npz") as units:
        labels = torch.from_numpy(units[f"sfr.{grid}.labels"])
        assert np.array_equal(segment_is_free(labels).numpy(), units[f"sfr.{grid}.path_ok"])
        assert worst(feedback_matrix(labels, 5.0), units[f"sfr.{grid}.std5"]) < 1e-6
        assert worst(feedback_matrix(labels, 1.0), units[f"sfr.{grid}.std1"]) < 1e-6
        assert worst(feedback_matrix(labels, 5.0, "any"), units[f"sfr.{grid}.std5.nodecay"]) < 1e-6


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("values_at_once", [2**24, 64 * 64])
def test_patch_labels_equal_the_reference_units(shared, monkeypatch, threshold, values_at_once):
    monkeypatch.setattr(semantic_feedback, "MAX_CHUNK_VALUES", values_at_once)  # one query at a time
    with np.load(shared / "goldens/self_attention/units.npz") as units:
        scores = torch.from_numpy(units["patchlabels.prob"]).log()
        found = first_pass_labels(scores, torch.zeros(1, 3, 64, 64), 16, 1.0, threshold, 0)[0]
        assert np.array_equal(found.numpy(), units[f"patchlabels.thd{threshold}"])


# A restatement in float64 with loops, from transformers' own hidden states and attention maps.
def plain_matrix(labels: np.ndarray, std: float) -> np.ndarray:
    height, width = labels.shape
    places = list(product(range(height), range(width)))
    longest = max(height, width) - 1
    matrix = np.zeros((len(places), len(places)))
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            if labels[p] != labels[q]:
                continue
            distance = max(abs(p[0] - q[0]), abs(p[1] - q[1]))
            line = []
            for k in range(distance + 1):
                t = np.float32(k) / np.float32(longest)
                line.append(tuple(int(np.round((np.float32(1) - t) * a + t * b)) for a, b in zip(p, q, strict=True)))
            free = all(labels[place] == labels[p] for place in line)
            matrix[i, j] = 1 if free else math.exp(-distance / longest)
    length = min(len(places), int(6 * std + 1))
    half = length // 2
    kernel = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * std**2))
    padded = np.pad(matrix, ((0, 0), (half, half)))
    smoothed = sum(w * padded[:, k : k + len(places)] for k, w in enumerate(kernel / kernel.sum()))
    normal = smoothed / (smoothed.sum(axis=1, keepdims=True) + 1e-8)
    return np.pad(normal, ((1, 0), (1, 0)))


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_resclip_is_a_plain_restatement_on_any_clip(tiny_clip, words, base):
    clip, pixels = tiny_clip.double(), noise(2, 3, 48, 64).double()
    words = words.double()
    found = DenseCLIP(clip).features(
        pixels, "resclip", {"base": base, "preset": "voc21", "position_rule": "transformers"}, class_embeddings=words
    )
    clip.set_attn_implementation("eager")
    block, tau_r, lam_r, tau_s, lam_s, low = clip.vision_model.encoder.layers[-1], 2.0, 0.3, 2.2, 0.7, 0.5
    for index, image in enumerate(pixels):
        output = clip.vision_model(
            image[None], output_hidden_states=True, output_attentions=True, interpolate_pos_encoding=True
        )
        hidden = output.hidden_states[-2]
        crossed = sum(output.attentions[i][0] for i in (5, 6, 7, 8)) / 4
        normed = block.layer_norm1(hidden)[0]
        q, k, v = (
            getattr(block.self_attn, f"{n}_proj")(normed).view(13, 2, 64).transpose(0, 1) for n in ("q", "k", "v")
        )
        near = torch.zeros(13, 13, dtype=torch.float64)
        for i, j in product(range(12), range(12)):
            gap = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
            near[i + 1, j + 1] = math.exp(-gap / 50) if base == "naclip" else 0.0

        def last(matrix, q=q, k=k, v=v, near=near, crossed=crossed, hidden=hidden):
            sources = {"naclip": (k,), "clearclip": (q,), "sclip": (q, k)}[base]
            attention = 0
            for source in sources:
                scores = source @ source.mT / 8
                if matrix is not None:
                    scores = tau_s * ((1 - lam_s) * scores + lam_s * matrix)
                attention = attention + (scores + near).softmax(-1)
            mixed = tau_r * ((1 - lam_r) * attention + lam_r * crossed)
            x = block.self_attn.out_proj((mixed @ v).transpose(0, 1).reshape(1, 13, 128))
            if base == "sclip":
                x = x + hidden
                x = x + block.mlp(block.layer_norm2(x))
            return clip.visual_projection(clip.vision_model.post_layernorm(x))[0, 1:]

        cos = F.normalize(last(None), dim=-1) @ words.T
        maps = F.interpolate(cos.T.reshape(1, 5, 3, 4), size=(48, 64), mode="bilinear", align_corners=False)[0]
        refined = torch.from_numpy(plain_pamr(image.numpy(), maps.numpy(), (8, 16), 10))
        best, label = (40 * refined).softmax(0).max(0)
        label[best < low] = 0
        patches = label.reshape(3, 16, 4, 16).permute(0, 2, 1, 3).reshape(3, 4, 256)
        labels = np.array([[np.bincount(patch).argmax() for patch in row] for row in patches.numpy()])
        assert np.array_equal(found.context.scratch["labels"][index].numpy(), labels)
        matrix = torch.from_numpy(plain_matrix(labels, 5.0))
        expected = last(matrix / matrix.max()).reshape(3, 4, -1)
        torch.testing.assert_close(found.patch_features[index], expected, atol=2e-6, rtol=1e-5)


def test_path_and_matrix_are_the_plain_loops():
    for seed, (height, width) in enumerate([(2, 9), (6, 6), (9, 4), (1, 7), (8, 13)]):
        labels = torch.randint(0, 2 + seed % 2, (height, width), generator=torch.Generator().manual_seed(seed))
        found = feedback_matrix(labels, 1.5).double()
        np.testing.assert_allclose(found.numpy(), plain_matrix(labels.numpy(), 1.5), atol=1e-6)


def test_many_labels_and_a_single_patch():
    labels = torch.arange(20 * 20).view(20, 20)  # more kinds than a byte holds
    assert torch.equal(segment_is_free(labels).diagonal(), torch.ones(400, dtype=torch.bool))
    assert torch.equal(feedback_matrix(labels, smoothing="none")[1:, 1:].round(decimals=4), torch.eye(400))
    assert feedback_matrix(torch.zeros(1, 1, dtype=torch.long))[1, 1] == pytest.approx(1)


def test_regions_are_connected_components():
    labels = torch.tensor([[1, 1, 2, 1], [2, 2, 2, 1], [1, 0, 2, 2], [0, 1, 1, 0]])
    regions = torch.tensor([[1, 1, 2, 3], [2, 2, 2, 3], [4, 5, 2, 2], [5, 4, 4, 6]]).flatten()
    assert torch.equal(same_region(labels), regions[:, None] == regions)
    snake = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    zeros = (snake == 0).flatten()
    assert same_region(snake)[zeros][:, zeros].all()
    far = feedback_matrix(torch.tensor([[0, 1, 0]]), path="region", smoothing="none", normalize=False)
    assert far[1, 3] == pytest.approx(math.exp(-1))


def test_smoothing_in_two_dimensions():
    matrix = noise(1, 30).abs()
    spread = smooth(matrix, (5, 6), 0.4, "map")[0]
    kernel = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0]) ** 2) / (2 * 0.4**2))
    kernel /= kernel.sum()
    padded = F.pad(matrix.view(5, 6), (1, 1, 1, 1))
    expected = sum(
        kernel[a] * kernel[b] * padded[a : a + 5, b : b + 6] for a, b in product(range(3), range(3))
    ).flatten()
    torch.testing.assert_close(spread, expected)
    assert smooth(matrix, (5, 6), 0.4, "none") is matrix


@torch.no_grad()
def test_parts_can_be_switched_off(tiny_clip, pixels, words):
    dense = DenseCLIP(tiny_clip)
    for base in BASES:
        found = dense.features(pixels, "resclip", {"base": base, "rcs": False, "sfr": False})
        assert found.trunk.attention_maps == {}
        torch.testing.assert_close(found.patch_features, dense.features(pixels, base).patch_features)
    assert dense.features(pixels, "resclip", {"sfr": False}).trunk.attention_maps.keys() == {5, 6, 7, 8}
    with pytest.raises(ValueError, match="'resclip' needs class_embeddings"):
        dense.features(pixels, "resclip", {"rcs": False})


@pytest.mark.parametrize("preset", RESCLIP_SETTINGS)
@torch.no_grad()
def test_presets_fill_what_is_unset(tiny_clip, pixels, words, preset):
    settings = get_method("resclip").settings({"preset": preset, "sfr_weight": 0.25})
    assert settings.sfr_weight == 0.25
    for name, value in RESCLIP_SETTINGS[preset].items():
        assert getattr(settings, name) == (0.25 if name == "sfr_weight" else value)
    assert DenseCLIP(tiny_clip).query_maps(pixels, words, "resclip", {"preset": preset}).coarse.isfinite().all()


def test_settings_of_the_data_sets_are_the_authors():
    rows = {
        name: tuple(RESCLIP_SETTINGS[name][key] for key in ("label_threshold", "rcs_weight", "sfr_tau", "sfr_weight"))
        for name in RESCLIP_SETTINGS
    }
    assert rows == {
        "demo": (0.1, 0.6, 2.1, 0.6),
        "voc20": (0.1, 0.6, 2.1, 0.6),
        "voc21": (0.5, 0.3, 2.2, 0.7),
        "context59": (0.25, 0.4, 1.8, 0.7),
        "context60": (0.3, 0.3, 1.8, 0.7),
        "coco_object": (0.11, 0.4, 1.8, 0.7),
        "coco_stuff164k": (0.11, 0.4, 1.8, 0.7),
        "ade20k": (0.25, 0.3, 2.1, 0.7),
        "cityscapes": (0.1, 0.2, 2.1, 0.6),
        "paper": (0.0, 0.5, 1.0, 0.7),
    }


def test_middle_layers_of_other_towers():
    method = get_method("resclip")
    for depth, expected in ((24, (5, 6, 7, 8)), (12, (5, 6, 7, 8)), (8, (3, 4, 5, 6)), (3, (0, 1)), (1, ())):
        assert method.request(method.settings(), depth).attention_maps == expected
    assert method.request(method.settings({"rcs_layers": [2, 3]}), 12).attention_maps == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "clip"}, "base must be one of naclip, clearclip, sclip, got 'clip'"),
        ({"preset": "voc"}, "preset must be one of demo, voc20"),
        ({"path": "line"}, "path must be one of segment, region, any"),
        ({"smoothing": "2d"}, "smoothing must be one of raster, map, none"),
        ({"rcs_weight": 1.5}, r"rcs_weight must be in \[0, 1\], got 1.5"),
        ({"sfr_tau": 0.0}, "sfr_tau must be positive"),
        ({"pamr_iterations": -1}, "pamr_iterations must be 0 or more"),
        ({"rcs_layers": (9, 6)}, "rcs_layers must be two layers in order"),
    ],
)
def test_wrong_settings_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        get_method("resclip").settings(options)
