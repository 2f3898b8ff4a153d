"""GEM and CLIP Surgery against the authors' numbers and against plain restatements."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.modeling import attention, dual_path_methods
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.dual_path_methods import gem_attention
from arm_hf.modeling.method import get_method

SIZES = ("sq64", "sq96", "ns80x128")
GEM_VARIANTS = {
    "default": {},
    "iter0": {"iterations": 0},
    "iter2": {"iterations": 2},
    "temp10": {"temperature": 10.0},
    "depth4": {"depth": 4},
}


@pytest.fixture(scope="module")
def goldens(shared):
    """Inputs, the CLIP they were made with, and a reader of the authors' arrays by method and size."""
    folder = shared / "goldens" / "fusion_and_proxies"
    inputs, core = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "core2"))

    def read(method, size):
        if (folder / f"{method}_{size}.npz").exists():
            return dict(np.load(folder / f"{method}_{size}.npz"))
        prefix = f"{size}/{method}."
        return {key[len(prefix) :]: value for key, value in core.items() if key.startswith(prefix)}

    clip = CLIPModel.from_pretrained(shared / "goldens" / "tiny_clip_hf_b").eval()
    return SimpleNamespace(inputs={k: torch.from_numpy(v) for k, v in inputs.items()}, read=read, dense=DenseCLIP(clip))


@torch.no_grad()
def run(goldens, size, method, words=None, outside=None, **options):
    """Features and score map of a method on a golden input."""
    words = goldens.inputs["text"] if words is None else words
    pixels = goldens.inputs[f"pixel_{size}"]
    features = goldens.dense.features(pixels, method, options, class_embeddings=words, outside=outside)
    return features, goldens.dense.score_map(features, words)


def upsampled(maps, size):
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)[0].numpy()


def close(found, expected, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(found), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", GEM_VARIANTS)
def test_gem_is_the_authors(goldens, size, variant):
    expected = goldens.read("gem", size)
    if f"{variant}_feat_gem" not in expected:
        pytest.skip(f"no numbers for {variant} at {size}")
    features, scores = run(goldens, size, "gem", **GEM_VARIANTS[variant])
    close(features.patch_features.flatten(1, 2)[0], expected[f"{variant}_feat_gem"][1:])
    if f"{variant}_logits_raw" in expected:
        shape = goldens.inputs[f"pixel_{size}"].shape[-2:]
        close(upsampled(scores.values, shape), expected[f"{variant}_logits_raw"], 1e-6)
        _, heat = run(goldens, size, "gem", min_max=True, **GEM_VARIANTS[variant])
        close(upsampled(heat.values, shape), expected[f"{variant}_logits_minmax"], 1e-5)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_gem_temperature_is_the_authors(goldens, size):
    features, _ = run(goldens, size, "gem")
    method, blocks = get_method("gem"), features.settings.blocks(12)
    found = [float(method.temperature(features.context, features.settings, index)) for index in blocks]
    close(found, goldens.read("gem", size)["default_inv_temp"], 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_clip_surgery_is_the_authors(goldens, size):
    expected = goldens.read("clipsurgery", size)
    features, scores = run(goldens, size, "clip_surgery")
    close(features.patch_features.flatten(1, 2)[0], expected["features_raw"][1:])
    close(features.context.scratch["image"][0], expected["features_raw"][0])
    close(scores.values[0].flatten(1).T, expected["similarity"][1:], 1e-6)
    words, redundant = goldens.inputs["text"][:1], {"redundant_text": goldens.inputs["redundant_text"]}
    _, single = run(goldens, size, "clip_surgery", words, redundant, surgery="redundant_text")
    close(single.values[0].flatten(1).T, expected["similarity_redundant"][1:], 1e-6)
    if "cos" in expected:
        _, plain = run(goldens, size, "clip_surgery", surgery="none")
        close(plain.values[0].flatten(1).T, expected["cos"][1:], 1e-6)
        _, heat = run(goldens, size, "clip_surgery", min_max=True)
        shape = expected["map_similarity"].shape[:2]
        close(upsampled(heat.values, shape).transpose(1, 2, 0), expected["map_similarity"], 1e-5)
        _, heat = run(goldens, size, "clip_surgery", words, redundant, surgery="redundant_text", min_max=True)
        close(upsampled(heat.values, shape).transpose(1, 2, 0), expected["map_redundant"], 1e-5)


def test_clip_surgery_carries_nothing_from_one_size_to_the_next(goldens):
    order = [run(goldens, size, "clip_surgery")[0].patch_features for size in ("sq64", "sq96", "ns80x128", "sq64")]
    assert torch.equal(order[0], order[-1])
    leaked = goldens.read("clipsurgery", "sq96")["sq64_features_after_sq96_call"][1:]
    assert np.abs(order[-1].flatten(1, 2)[0].numpy() - leaked).max() > 0.5


# Plain restatements on transformers' own hidden states, with loops and without the package's helpers.
def plain_states(clip, pixels):
    with torch.no_grad():
        return clip.vision_model(pixels, output_hidden_states=True).hidden_states


def roles_by_hand(block, state):
    normed = block.layer_norm1(state)[0]
    attention = block.self_attn
    names = ("q_proj", "k_proj", "v_proj")
    return normed, [getattr(attention, name)(normed).view(len(normed), attention.num_heads, -1) for name in names]


def head_by_hand(clip, tokens):
    return clip.visual_projection(clip.vision_model.post_layernorm(tokens))


@torch.no_grad()
def gem_by_hand(clip, pixels, iterations=1):
    layers, states = clip.vision_model.encoder.layers, plain_states(clip, pixels)
    path = states[len(layers) - 6][0]
    for index in range(len(layers) - 6, len(layers)):
        normed, roles = roles_by_hand(layers[index], states[index])
        tau = normed.norm(dim=-1).mean() / 8
        total = torch.zeros_like(roles[2])
        for role in roles:
            for head in range(role.shape[1]):
                z = role[:, head]
                for _ in range(iterations):
                    z = z / z.norm(dim=-1, keepdim=True)
                    z = (tau * z @ z.T).softmax(dim=-1) @ z
                z = z / z.norm(dim=-1, keepdim=True)
                total[:, head] += (tau * z @ z.T).softmax(dim=-1) @ roles[2][:, head] / 3
        path = path + layers[index].self_attn.out_proj(total.flatten(1))
    return head_by_hand(clip, path)


@torch.no_grad()
def surgery_by_hand(clip, pixels):
    layers, states = clip.vision_model.encoder.layers, plain_states(clip, pixels)
    path = states[len(layers) - 6][0].clone()
    for index in range(len(layers) - 6, len(layers)):
        _, (_, _, value) = roles_by_hand(layers[index], states[index])
        attended = [(value[:, h] @ value[:, h].T / 8).softmax(dim=-1) @ value[:, h] for h in range(value.shape[1])]
        path = path + layers[index].self_attn.out_proj(torch.cat(attended, dim=-1))
    path[0] = states[-1][0, 0]
    return head_by_hand(clip, path)


@pytest.fixture
def square():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("iterations", [0, 1, 2])
@torch.no_grad()
def test_gem_is_a_plain_restatement_on_any_clip(tiny_clip, square, iterations):
    found = DenseCLIP(tiny_clip).features(square, "gem", {"iterations": iterations}).patch_features.flatten(1, 2)
    torch.testing.assert_close(found[0], gem_by_hand(tiny_clip, square, iterations)[1:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_clip_surgery_is_a_plain_restatement_on_any_clip(tiny_clip, square, words):
    dense = DenseCLIP(tiny_clip)
    features = dense.features(square, "clip_surgery", class_embeddings=words)
    expected = surgery_by_hand(tiny_clip, square)
    torch.testing.assert_close(features.patch_features.flatten(1, 2)[0], expected[1:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(features.context.scratch["image"][0], expected[0], atol=2e-5, rtol=1e-4)
    unit = F.normalize(expected, dim=-1)
    weights = (2 * unit[:1] @ words.T).softmax(dim=-1)
    weights = weights / weights.mean()
    products = unit[1:, None] * words * weights[0, :, None]  # (N, Q, D)
    similarity = (products - products.mean(dim=1, keepdim=True)).sum(dim=-1)
    found = dense.score_map(features, words).values[0].flatten(1).T
    torch.testing.assert_close(found, similarity, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["gem", "clip_surgery"])
@pytest.mark.parametrize("size", [(64, 96), (50, 71)])
def test_heat_maps_reach_from_zero_to_one(tiny_clip, words, method, size):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    dense = DenseCLIP(tiny_clip)
    options = {"method": method, "method_options": {"min_max": True}, "return_class_scores": True}
    for decision in dense.segment(pixels, words, **options):
        low, high = decision.class_scores.amin((1, 2)), decision.class_scores.amax((1, 2))
        assert (low > -1e-5).all() and (high < 1 + 1e-5).all()
        if method == "gem":  # stretched after upsampling, over the pixels of the image alone
            torch.testing.assert_close(low, torch.zeros(5), atol=1e-5, rtol=0)
            torch.testing.assert_close(high, torch.ones(5), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_range_of_heat_maps_needs_no_more_than_a_chunk(monkeypatch, tiny_clip, words, pixels):
    dense = DenseCLIP(tiny_clip)
    whole = dense.query_maps(pixels, words, "gem", {"min_max": True}).coarse
    monkeypatch.setattr(dual_path_methods, "MAX_CHUNK_VALUES", 1)
    torch.testing.assert_close(dense.query_maps(pixels, words, "gem", {"min_max": True}).coarse, whole)


@torch.no_grad()
def test_a_single_word_needs_a_redundant_text(tiny_clip, pixels, words):
    dense = DenseCLIP(tiny_clip)
    maps = dense.query_maps(pixels, words[:1], "clip_surgery")
    assert maps.coarse.abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"needs outside=\{\"redundant_text\": tensor of 64 values\}.*got nothing"):
        dense.query_maps(pixels, words[:1], "clip_surgery", {"surgery": "redundant_text"})
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        dense.query_maps(
            pixels, words, "clip_surgery", {"surgery": "redundant_text"}, outside={"redundant_text": torch.ones(3)}
        )


@pytest.mark.parametrize("method", ["gem", "clip_surgery"])
@torch.no_grad()
def test_a_shallow_tower_and_every_depth_work(tiny_clip, pixels, words, method):
    dense = DenseCLIP(tiny_clip)
    results = [
        dense.features(pixels, method, {"depth": depth}, class_embeddings=words).patch_features
        for depth in (2, 7, 13, 50)
    ]
    assert torch.equal(results[2], results[3])  # no more than all blocks
    assert not torch.allclose(results[0], results[1])


def test_gem_temperature_of_each_image_is_its_own():
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    together = gem_attention(query, key, value, torch.tensor([1.0, 6.0]))
    for index, tau in enumerate((1.0, 6.0)):
        alone = gem_attention(query[index : index + 1], key[index : index + 1], value[index : index + 1], tau)
        torch.testing.assert_close(together[index : index + 1], alone)


@pytest.mark.parametrize("highest", [29.0, 300.0])
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_gem_attention_is_the_same_with_and_without_gradients(iterations, highest, monkeypatch):
    """Without them it runs in blocks of rows on the CPU, as long as the temperature lets it."""
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    tau = torch.tensor([1.0, highest])
    expected = gem_attention(query, key, value, tau, iterations)
    for block_values in (30, 10_000):  # a few rows, all heads at a time
        monkeypatch.setattr(attention, "BLOCK_VALUES", block_values)
        with torch.no_grad():
            found = gem_attention(query, key, value, tau, iterations)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gem", {"depth": 1}, "depth must be at least 2"),
        ("gem", {"iterations": -1}, "iterations must not be negative"),
        ("gem", {"temperature": 0.0}, "temperature must be positive or None"),
        ("clip_surgery", {"surgery": "brain"}, "surgery must be one of features, redundant_text, none"),
    ],
)
def test_impossible_settings_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        get_method(method).settings(options)
