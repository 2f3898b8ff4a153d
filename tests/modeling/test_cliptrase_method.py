"""CLIPtrase and its clustering against the authors' numbers and against plain restatements."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.modeling.cliptrase_method import correlation, dbscan, denoise, median_filter
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.method import get_method

CLUSTERED = ("VOC20_eps0.7_min3", "VOC21_eps0.7_min3", "ADE150_eps0.7_min3", "ADE150_eps0.5_min2")


@pytest.fixture(scope="module")
def goldens(shared):
    """Inputs, the CLIP they were made with, and a reader of the authors' arrays by size."""
    folder = shared / "goldens" / "fusion_and_proxies"
    inputs, core = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "core2"))

    def read(size):
        if (folder / f"cliptrase_{size}.npz").exists():
            return dict(np.load(folder / f"cliptrase_{size}.npz"))
        prefix = f"{size}/cliptrase."
        return {key[len(prefix) :]: value for key, value in core.items() if key.startswith(prefix)}

    clip = CLIPModel.from_pretrained(shared / "goldens" / "tiny_clip_hf_b").eval()
    return SimpleNamespace(inputs={k: torch.from_numpy(v) for k, v in inputs.items()}, read=read, dense=DenseCLIP(clip))


def close(found, expected, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(found), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", ["sq64", "sq96", "ns80x128"])
@torch.no_grad()
def test_features_and_correlations_are_the_authors(goldens, size):
    expected, words = goldens.read(size), goldens.inputs["text"]
    options = {"clustering": "vote"}  # keeps the projections of the block before the last
    features = goldens.dense.features(goldens.inputs[f"pixel_{size}"], "cliptrase", options, class_embeddings=words)
    close(features.patch_features.flatten(1, 2)[0], expected["features_raw"][1:])
    close(features.context.scratch["image"][0], expected["features_raw"][0])
    weights = correlation(features.trunk.heads[10])
    close(weights[0, 1:, 1:], expected["attn_cluster"], 2e-6)
    close(weights[0, :1, 1:], expected["attn_cluster_cls"], 2e-6)
    if "attn_weights" in expected:
        close(weights[0], expected["attn_weights"][10], 2e-6)
        close(denoise(weights)[0], expected["attn_denoised"], 2e-6)
    plain = goldens.dense.features(goldens.inputs[f"pixel_{size}"], "cliptrase", class_embeddings=words)
    scores = goldens.dense.score_map(plain, words)
    close(scores.values[0], expected["patch_logits"] / scores.scale, 2e-6)  # cosines


@pytest.mark.parametrize("size", ["sq64", "sq96"])
@pytest.mark.parametrize("variant", CLUSTERED)
@torch.no_grad()
def test_clusters_and_votes_are_the_authors(goldens, size, variant):
    pytest.importorskip("sklearn")
    expected = goldens.read(size)
    data_set, eps, min_samples = variant.split("_")
    eps, min_samples = float(eps.removeprefix("eps")), int(min_samples.removeprefix("min"))
    clusters = dbscan(torch.from_numpy(expected["attn_denoised"]), eps, min_samples)
    assert np.array_equal(clusters.numpy(), expected[f"dbscan_{variant}"])
    words, background = goldens.inputs["text"], {}
    if data_set == "VOC21":
        words = torch.cat([words, goldens.inputs["text_bg"]])
        background = {"class_of_query": (0, 1, 2, 3, 4, 5, 5), "background_index": 5}
    options = {"clustering": "vote", "eps": eps, "min_samples": min_samples, "image_weighting": data_set == "VOC20"}
    pixels = goldens.inputs[f"pixel_{size}"]
    (decision,) = goldens.dense.segment(pixels, words, method="cliptrase", method_options=options, **background)
    assert np.array_equal(decision.labels.numpy(), expected[f"pred_{variant}"])


@torch.no_grad()
def test_cliptrase_is_a_plain_restatement_on_any_clip(tiny_clip):
    clip = tiny_clip.double()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)).double()
    hidden = clip.vision_model(pixels, output_hidden_states=True).hidden_states
    layers = clip.vision_model.encoder.layers

    def roles(index):
        normed = layers[index].layer_norm1(hidden[index])[0]
        names = ("q_proj", "k_proj", "v_proj")
        return [getattr(layers[index].self_attn, name)(normed).view(len(normed), 2, 64) for name in names]

    q, k, v = roles(11)
    mixed = [sum((z[:, h] @ z[:, h].T / 8).softmax(-1) for z in (q, k, v)) @ v[:, h] for h in range(2)]
    tokens = hidden[11][0] + layers[11].self_attn.out_proj(torch.cat(mixed, dim=-1))
    tokens = tokens + layers[11].mlp(layers[11].layer_norm2(tokens))
    expected = clip.visual_projection(clip.vision_model.post_layernorm(tokens))
    features = DenseCLIP(clip).features(pixels, "cliptrase", {"clustering": "vote"})
    torch.testing.assert_close(features.patch_features.flatten(1, 2)[0], expected[1:], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(features.context.scratch["image"][0], expected[0], atol=1e-6, rtol=1e-6)

    cosines = torch.zeros(17, 17, dtype=torch.double)
    for z in roles(10):
        for head in range(2):
            cosines += F.cosine_similarity(z[:, None, head], z[None, :, head], dim=-1) / 6
    found = correlation(features.trunk.heads[10])
    torch.testing.assert_close(found[0].double(), cosines, atol=1e-6, rtol=0)


def test_median_filter_by_hand():
    maps = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    mirrored = np.pad(maps.numpy(), 3, mode="symmetric")
    expected = [[np.median(mirrored[y : y + 7, x : x + 7]) for x in range(8)] for y in range(5)]
    assert np.array_equal(median_filter(maps).numpy(), np.array(expected, dtype=np.float32))


def regions_by_hand(rows, clusters, grid, size):
    maps = []
    for index in range(int(clusters.max()) + 1):
        mean = rows[clusters == index].mean(0).view(1, 1, *grid)
        mean = F.interpolate(mean, scale_factor=4, mode="bilinear")
        maps.append(F.interpolate(median_filter(mean[0, 0])[None, None], size=size, mode="bilinear")[0, 0])
    return torch.stack(maps).argmax(0)


@pytest.mark.parametrize("clustering", ["vote", "mean"])
@torch.no_grad()
def test_clustering_by_hand_on_an_image_of_odd_size(tiny_clip, words, clustering):
    pytest.importorskip("sklearn")
    dense = DenseCLIP(tiny_clip)
    pixels = torch.randn(1, 3, 90, 71, generator=torch.Generator().manual_seed(5))
    options = {"clustering": clustering, "eps": 0.4, "min_samples": 2}
    features = dense.features(pixels, "cliptrase", options, class_embeddings=words, background_queries=(1, 3))
    scores = dense.score_map(features, words)
    assert scores.values.shape == (1, 5, 96, 80)

    rows = denoise(correlation(features.trunk.heads[10]))[0]
    clusters = dbscan(rows, 0.4, 2)
    regions = regions_by_hand(rows, clusters, (6, 5), (96, 80))
    assert len(regions.unique()) > 1
    plain = dense.query_maps(pixels, words, "cliptrase").coarse
    plain = F.interpolate(plain, size=(96, 80), mode="bilinear")[0]
    labels = plain.argmax(0)
    labels[labels == 3] = 1
    inside = torch.zeros(96, 80, dtype=torch.bool)
    inside[3:93, 4:75] = True  # the pixels that padding added have no vote
    for region in regions.unique():
        members = inside & (regions == region)
        found = scores.values[0][:, regions == region]
        assert (found == found[:, :1]).all()
        if not members.any():
            continue
        if clustering == "vote":
            expected = torch.stack([(labels[members] == query).float().mean() for query in range(5)])
            assert scores.values[0][:, members].argmax(0).unique() == labels[members].mode().values
        else:
            expected = plain[:, members].mean(dim=1)
        torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clustering", ["vote", "mean"])
@torch.no_grad()
def test_without_a_cluster_the_plain_decision_stays(tiny_clip, words, pixels, clustering):
    pytest.importorskip("sklearn")
    dense = DenseCLIP(tiny_clip)
    options = {"clustering": clustering, "eps": 1e-6, "min_samples": 30}
    found = dense.segment(pixels, words, method="cliptrase", method_options=options)
    for ours, plain in zip(found, dense.segment(pixels, words, method="cliptrase"), strict=True):
        assert torch.equal(ours.labels, plain.labels)
        torch.testing.assert_close(ours.confidence, plain.confidence, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clustering", ["vote", "mean"])
def test_clustering_works_with_windows_batches_half_precision_and_arm(arm, tiny_clip, words, clustering):
    pytest.importorskip("sklearn")
    pixels = torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(5))
    options = {"method": "cliptrase", "method_options": {"clustering": clustering, "eps": 0.4, "min_samples": 2}}
    dense = DenseCLIP(tiny_clip)
    together = dense.segment(pixels, words, **options)
    for index, decision in enumerate(together):
        (alone,) = dense.segment(pixels[index : index + 1], words, **options)
        assert torch.equal(alone.labels, decision.labels)
    for results in (
        dense.segment(pixels, words, window=48, stride=20, **options),
        arm.segment(pixels, words, use_arm=True, **options),
        DenseCLIP(tiny_clip.bfloat16()).segment(pixels.bfloat16(), words.bfloat16(), **options),
        DenseCLIP(tiny_clip.float(), odd_sizes="drop").segment(pixels, words, **options),
    ):
        for decision in results:
            assert decision.labels.shape == (70, 90)
            assert decision.confidence.isfinite().all()


def test_the_default_settings_of_clustering_run(tiny_clip, words, pixels):
    pytest.importorskip("sklearn")
    dense = DenseCLIP(tiny_clip)
    large = torch.randn(1, 3, 272, 288, generator=torch.Generator().manual_seed(5))
    for images in (pixels, large):
        for decision in dense.segment(images, words, method="cliptrase", method_options={"clustering": "vote"}):
            assert decision.labels.shape == images.shape[-2:]


@torch.no_grad()
def test_missing_scikit_learn_is_explained(monkeypatch, tiny_clip, words, pixels):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    dense = DenseCLIP(tiny_clip)
    with pytest.raises(ImportError, match='run "pip install scikit-learn"'):
        dense.query_maps(pixels, words, "cliptrase", {"clustering": "vote"})
    dense.query_maps(pixels, words, "cliptrase")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clustering": "kmeans"}, "clustering must be one of none, vote, mean"),
        ({"eps": 0.0}, "eps must be positive or None"),
        ({"min_samples": 0}, "min_samples must be at least 1 or None"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_method("cliptrase").settings(options)
