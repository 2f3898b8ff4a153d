"""CLIPer's early-layer fusion against the authors' numbers and against a plain restatement."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.measuring import torch_threads
from arm_hf.modeling import attention
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.layer_fusion_methods import CLIPER_OPTIONS, balance, fused_attention
from arm_hf.modeling.method import get_method

# Data set -> logit scale and attention threshold of the authors' ViT-B/16 configurations.
CONFIGURATIONS = {
    "voc21": (100, 0.1),
    "voc20": (100, 0.1),
    "context": (100, 0.2),
    "context59": (100, 0.2),
    "coco5k": (50, 0.2),
    "stuff164": (50, 0.2),
    "ade150": (100, 0.2),
    "city": (100, 0.35),
}
# The stored maps are themselves up to 3.1e-6 away from the same computation in float64, and so is ours on other
# processors: with a logit scale of 100 the rounding of the features shows.
SEGMENTATION_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def goldens(shared):
    folder = shared / "goldens" / "fusion_and_proxies"
    inputs = np.load(folder / "inputs.npz")
    with torch_threads(1):  # with more, sums of products round otherwise, up to 1.1e-5 from the authors' maps
        yield folder, inputs, DenseCLIP(CLIPModel.from_pretrained(shared / "goldens" / "tiny_clip_hf_b").eval())


def arrays_of(folder, size):
    if size == "ns80x128":
        core = np.load(folder / "core2.npz")
        prefix = "ns80x128/cliper_fp32pos."
        return {key[len(prefix) :]: core[key] for key in core.files if key.startswith(prefix)}
    return dict(np.load(folder / f"cliper_{size}_fp32pos.npz"))


def run(dense, inputs, size, **options):
    words = torch.from_numpy(np.concatenate([inputs["text"], inputs["text_bg"]]))
    with torch.no_grad():
        pixels = torch.from_numpy(inputs[f"pixel_{size}"])
        features = dense.features(pixels, "cliper", options, class_embeddings=words, background_queries=(5, 6))
        return features, dense.score_map(features, words).values[0, :5].numpy()


@pytest.mark.parametrize("size", ["sq64", "sq96", "ns80x128"])
def test_features_and_attention_are_the_authors(goldens, size):
    folder, inputs, dense = goldens
    expected = arrays_of(folder, size)
    features, _ = run(dense, inputs, size)
    with torch.no_grad():
        streams, _ = get_method("cliper").stream_features(features.context, features.settings)
    np.testing.assert_allclose(streams[:, 0].numpy(), expected["features"], atol=2e-5, rtol=0)
    propagation = features.context.scratch["propagation"][0].numpy()
    np.testing.assert_allclose(propagation, expected["attn_mean"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "data_set"),
    [(size, name) for size in ("sq64", "sq96") for name in CONFIGURATIONS]
    + [("ns80x128", name) for name in ("voc21", "context59", "coco5k")],
)
def test_maps_of_every_configuration_are_the_authors(goldens, size, data_set):
    folder, inputs, dense = goldens
    expected = arrays_of(folder, size)
    scale, threshold = CONFIGURATIONS[data_set]
    _, scores = run(dense, inputs, size, logit_scale=scale, attention_threshold=threshold)
    np.testing.assert_allclose(scores, expected[f"seg_{data_set}"], atol=SEGMENTATION_TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["fused", "q-q", "k-k", "v-v", "vanilla", "identity"])
@pytest.mark.parametrize("fuse", [True, False])
def test_ablations_are_the_authors(goldens, attention, fuse):
    folder, inputs, dense = goldens
    name = "fused-attn" if attention == "fused" else attention
    for size in ("sq64", "sq96"):
        expected = arrays_of(folder, size)[f"seg_voc21_{name}_{'fuse' if fuse else 'nofuse'}"]
        _, scores = run(dense, inputs, size, attention=attention, fuse_streams=fuse)
        np.testing.assert_allclose(scores, expected, atol=SEGMENTATION_TOLERANCE, rtol=0)


def test_the_second_last_stream_can_be_propagated(goldens):
    folder, inputs, dense = goldens
    for size in ("sq64", "sq96", "ns80x128"):
        _, scores = run(dense, inputs, size, select_stream=-2, logit_scale=50)
        expected = arrays_of(folder, size)["seg_select_m2"]
        np.testing.assert_allclose(scores, expected, atol=SEGMENTATION_TOLERANCE, rtol=0)


def test_windows_are_the_authors(goldens):
    folder, inputs, dense = goldens
    expected = arrays_of(folder, "sq96")["seg_voc21_slide64"]
    _, scores = run(dense, inputs, "sq96", window=64)
    np.testing.assert_allclose(scores, expected, atol=SEGMENTATION_TOLERANCE, rtol=0)
    _, whole = run(dense, inputs, "sq96")
    assert np.abs(whole - expected).max() > 1e-2


def test_windows_of_a_batch_are_those_of_its_images(tiny_clip):
    clip = tiny_clip.eval()
    patch = clip.config.vision_config.patch_size
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 5 * patch, 6 * patch, generator=generator)
    words = torch.randn(3, clip.config.projection_dim, generator=generator)
    options = {"window": 3 * patch, "window_stride": 2 * patch}
    dense = DenseCLIP(clip)

    def scores(images):
        return dense.score_map(dense.features(images, "cliper", options, class_embeddings=words), words).values

    with torch.no_grad():
        both, alone = scores(pixels), [scores(pixels[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(both, torch.stack(alone), atol=1e-5, rtol=1e-4)


def test_a_window_over_the_whole_image_changes_only_what_its_propagation_does(tiny_clip):
    """One window of the image's size: attention and cosines are the whole image's own."""
    clip = tiny_clip.eval()
    size = clip.config.vision_config.image_size
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(1, 3, size, size, generator=generator)
    words = F.normalize(torch.randn(3, clip.config.projection_dim, generator=generator), dim=-1)
    dense = DenseCLIP(clip)
    with torch.no_grad():
        options = {"window": size, "window_stride": size, "attention_threshold": 0.0, "mean_row": False}
        features = dense.features(pixels, "cliper", options, class_embeddings=words)
        scores = dense.score_map(features, words).values[0].flatten(1)
        cosines = 100 * F.normalize(features.context.scratch["streams"], dim=-1)[:, 0] @ words.T  # (S, N, K)
        attention = features.context.scratch["propagation"][0]
        joined = attention / attention.sum(-1, keepdim=True)
        mixed = (cosines.softmax(-1) + (joined.T @ cosines).softmax(-1)) / 2
        expected = mixed[-1].T @ attention + mixed.mean(0).T
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_windows_must_fit_the_patches(tiny_clip):
    size = tiny_clip.config.vision_config.image_size
    words = torch.randn(2, tiny_clip.config.projection_dim)
    with pytest.raises(ValueError, match="multiples of this model's patch"):
        DenseCLIP(tiny_clip.eval()).query_maps(torch.zeros(1, 3, size, size), words, "cliper", {"window": 17})


def test_fused_attention_is_normalised_as_the_formula_says(monkeypatch):
    weights = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    rows = torch.ones(3, 1, 7)
    expected = weights
    for _ in range(3):
        rows, columns = balance(weights, rows)
        expected = expected / expected.sum(dim=-2, keepdim=True)
        expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(rows.transpose(-2, -1) * weights * columns, expected)
    symmetric = (expected + expected.transpose(-2, -1)) / 2
    sharp = (symmetric - symmetric.mean(dim=-2, keepdim=True)).clamp_min(0)
    sharp = sharp / sharp.sum(dim=-1, keepdim=True)
    values = torch.randn(3, 3, 7, 4, generator=torch.Generator().manual_seed(1))
    for block_values in (8, 60, 10_000):  # a row, some rows, all heads at a time
        monkeypatch.setattr(attention, "BLOCK_VALUES", block_values)
        found, mean = fused_attention(weights, values)
        torch.testing.assert_close(found[-1], sharp @ values[-1], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(mean, sharp.mean(dim=0), atol=1e-6, rtol=1e-4)


def test_cliper_is_a_plain_restatement_on_any_clip(tiny_clip):
    """Independent of the goldens: the text of docs and paper written out with loops on transformers' own outputs."""
    clip = tiny_clip.eval()
    generator = torch.Generator().manual_seed(1)
    size = clip.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    words = F.normalize(torch.randn(4, clip.config.projection_dim, generator=generator), dim=-1)
    clip.set_attn_implementation("eager")
    with torch.no_grad():
        dense = DenseCLIP(clip)
        features = dense.features(pixels, "cliper", class_embeddings=words)
        scores = dense.score_map(features, words).values[0]
        output = clip.vision_model(pixels, output_hidden_states=True, output_attentions=True)
        layers, last = clip.vision_model.encoder.layers, clip.vision_model.encoder.layers[-1]
        attention = sum(output.attentions[:-1])[0].clone()
        rows = torch.cat([words, F.normalize(words.mean(0, keepdim=True), dim=-1)])
        probabilities = []
        for index in range(len(layers)):
            state = output.hidden_states[index]
            stream = state if index == len(layers) - 1 else layers[index].layer_norm1(state)
            attention = attention / attention.sum(-2, keepdim=True)
            attention = attention / attention.sum(-1, keepdim=True)
            used = (attention + attention.transpose(1, 2)) / 2
            used = (used - used.mean(-2, keepdim=True)).clamp(min=0)
            used = used / used.sum(-1, keepdim=True)
            value = last.self_attn.v_proj(last.layer_norm1(stream))[0]
            heads = value.view(len(value), len(used), -1)
            mixed = torch.cat([used[h] @ heads[:, h] for h in range(len(used))], dim=-1)
            tokens = clip.visual_projection(clip.vision_model.post_layernorm(last.self_attn.out_proj(mixed)))
            probabilities.append((100 * F.normalize(tokens[1:], dim=-1) @ rows.T).softmax(-1)[:, :4])
        selected = probabilities[-1]
        selected[selected < 0.1 * selected.amax(0)] = 0
        expected = used[:, 1:, 1:].mean(0).T @ selected + torch.stack(probabilities).mean(0)
    grid = features.trunk.grid
    torch.testing.assert_close(scores, expected.T.unflatten(1, grid), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", ["sq64", "sq96"])
@pytest.mark.parametrize("data_set", ["voc21", "context59", "ade150"])
def test_gated_labels_are_the_authors(goldens, size, data_set):
    folder, inputs, dense = goldens
    expected = arrays_of(folder, size)
    words = torch.from_numpy(np.concatenate([inputs["text_bg"], inputs["text"]]))
    (decision,) = dense.segment(
        torch.from_numpy(inputs[f"pixel_{size}"]),
        words,
        method="cliper",
        method_options=CLIPER_OPTIONS[data_set, "B/16"],
        class_of_query=[0, 0, 1, 2, 3, 4, 5],
        background_index=0,
        sizes=[(100, 140)],
    )
    np.testing.assert_array_equal(decision.labels.numpy(), expected[f"label_{data_set}_100x140"])


def test_the_gate_needs_a_background_class(goldens):
    _, inputs, dense = goldens
    with pytest.raises(ValueError, match="background"):
        dense.segment(
            torch.from_numpy(inputs["pixel_sq64"]),
            torch.from_numpy(inputs["text"]),
            method="cliper",
            method_options={"background_threshold": 0.5},
        )
