"""ProxyCLIP and CorrCLIP against the authors' numbers and plain restatements; what reaches them from outside."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.modeling import proxy_methods
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.outside import cut_to_windows
from arm_hf.modeling.proxy_methods import CorrClipSettings
from arm_hf.modeling.regions import correct_labels, merge_regions

from .conftest import noise

PROXY_TOLERANCE, CORR_TOLERANCE = 3e-5, 5e-5  # of the reference numbers' own README
SIZES = ("sq64", "sq96", "ns80x128")
CASES = ("zero_same", "zero_x2", "full_x2", "two_x2")


@pytest.fixture(scope="module")
def goldens(shared):
    folder = shared / "goldens" / "fusion_and_proxies"
    with np.load(folder / "inputs.npz") as inputs:
        return folder, dict(inputs), DenseCLIP(CLIPModel.from_pretrained(folder.parent / "tiny_clip_hf_b").eval())


def arrays_of(folder, method, size):
    if not size.startswith("ns"):
        with np.load(folder / f"{method}_{size}.npz") as file:
            return dict(file)
    with np.load(folder / "core2.npz") as core:
        prefix = f"{size}/{method}."
        return {key.removeprefix(prefix): core[key] for key in core.files if key.startswith(prefix)}


def grid_of(inputs, size, case):
    height, width = inputs[f"pixel_{size}"].shape[-2:]
    side = 8 if "x2" in case else 16
    return height // side, width // side


@torch.no_grad()
def run(goldens, size, method, outside, **options):
    """Patch features (N, D), cosines (Q, h, w) and probabilities at the image's size, (Q, H, W)."""
    _, inputs, dense = goldens
    pixels, words = torch.from_numpy(inputs[f"pixel_{size}"]), torch.from_numpy(inputs["text"])
    features = dense.features(pixels, method, options, outside=outside)
    scores = dense.score_map(features, words)
    large = F.interpolate(scores.values, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    return features.patch_features[0].flatten(0, 1), scores.values[0], (scores.scale * large).softmax(dim=1)[0]


def close(found, expected, atol):
    np.testing.assert_allclose(found.numpy(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["same", "x2"])
@pytest.mark.parametrize(("preset", "options"), [("default", {}), ("b1g5", {"beta": 1.0, "gamma": 5.0})])
def test_proxyclip_is_the_authors(goldens, size, case, preset, options):
    arrays = arrays_of(goldens[0], "proxyclip", size)
    key = f"{case}_{preset}_features{'_fixed' if size.startswith('ns') else ''}"
    if key not in arrays:
        pytest.skip("no reference numbers for this setting")
    outside = {"proxy_features": torch.from_numpy(arrays[f"{case}_vfm"])[None]}
    features, cosines, probabilities = run(goldens, size, "proxyclip", outside, **options)
    close(features, arrays[key], PROXY_TOLERANCE)
    if not size.startswith("ns"):
        close(cosines, arrays[f"{case}_{preset}_cos"], 1e-5)
        close(probabilities, arrays[f"{case}_{preset}_prob"], 2e-5)


def test_proxy_attention_is_the_authors(goldens):
    for size in SIZES:
        arrays = arrays_of(goldens[0], "proxyclip", size)
        features = F.normalize(torch.from_numpy(arrays["x2_vfm"]).flatten(1).T, dim=-1)[None]
        lowest = 1.2 * proxy_methods.mean_similarity(features)
        everyone = torch.eye(features.shape[1])[None]  # values that show the weights
        found = proxy_methods.correlate(
            features, everyone, 3.0, lambda similarity, _, limit=lowest: similarity >= limit
        )[0]
        close(found, arrays["x2_default_attn"], 1e-6)


@torch.no_grad()
def test_reference_bug_is_understood_and_put_right(goldens, monkeypatch):
    """The reference reads (width, height) for (height, width) when it lays the values out on CLIP's grid."""
    arrays = arrays_of(goldens[0], "proxyclip", "ns80x128")

    def transposed(context, hidden, grid):
        block = context.tower.last_block
        values = block.self_attn.v_proj(block.layer_norm1(hidden[:, 1:])).transpose(1, 2)
        maps = values.unflatten(2, context.trunk.grid[::-1])
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        return block.self_attn.out_proj(maps.flatten(2).transpose(1, 2))

    outside = {"proxy_features": torch.from_numpy(arrays["x2_vfm"])[None]}
    monkeypatch.setattr(proxy_methods, "values_on_grid", transposed)
    features, _, _ = run(goldens, "ns80x128", "proxyclip", outside)
    close(features, arrays["x2_default_features_official_bug"], PROXY_TOLERANCE)
    assert np.abs(features.numpy() - arrays["x2_default_features_fixed"]).max() > 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_corrclip_is_the_authors(goldens, size, case):
    arrays = arrays_of(goldens[0], "corrclip", size)
    if f"{case}_features" not in arrays:
        pytest.skip("no reference numbers for this case")
    grid = grid_of(goldens[1], size, case)
    features = torch.from_numpy(arrays[f"{case}_vfm"]).T.unflatten(1, grid)[None]
    outside = {"proxy_features": features, "regions": arrays[f"{case}_mask"]}
    found, cosines, probabilities = run(goldens, size, "corrclip", outside)
    close(found, arrays[f"{case}_features"], CORR_TOLERANCE)
    if not size.startswith("ns"):
        close(cosines, arrays[f"{case}_cos"], 1e-5)
        close(probabilities, arrays[f"{case}_prob"], 2e-5)
        corrected = correct_labels(probabilities.argmax(dim=0), arrays[f"{case}_mask"])
        assert np.array_equal(corrected.numpy(), arrays[f"{case}_pred_corrected"])


@pytest.mark.parametrize("size", SIZES)
def test_merged_regions_are_the_authors_clusters(goldens, size):
    arrays = arrays_of(goldens[0], "corrclip", size)
    for case in CASES:
        if f"{case}_dbscan_labels" not in arrays:
            continue
        grid = grid_of(goldens[1], size, case)
        before = torch.from_numpy(arrays[f"{case}_mask"].astype(np.int64))
        before = before - before.min()
        merged = merge_regions(before, grid, torch.from_numpy(arrays[f"{case}_vfm"]), 0.2)
        assert torch.equal(merged == 0, before == 0)
        of_region = torch.stack([merged[before == region][0] for region in before.unique()[1:]])
        clusters = torch.from_numpy(arrays[f"{case}_dbscan_labels"].astype(np.int64))
        assert torch.equal(of_region[:, None] == of_region, clusters[:, None] == clusters)


@torch.no_grad()
def test_batches_mix_images_with_different_regions(goldens):
    _, inputs, dense = goldens
    arrays = arrays_of(goldens[0], "corrclip", "sq64")
    cases = ("zero_x2", "two_x2", "full_x2")
    features = torch.stack([torch.from_numpy(arrays[f"{case}_vfm"]).T.unflatten(1, (8, 8)) for case in cases])
    regions = np.stack([arrays[f"{case}_mask"] for case in cases])
    pixels = torch.from_numpy(inputs["pixel_sq64"]).expand(3, -1, -1, -1)
    found = dense.features(pixels, "corrclip", outside={"proxy_features": features, "regions": regions})
    for case, image in zip(cases, found.patch_features, strict=True):
        close(image.flatten(0, 1), arrays[f"{case}_features"], CORR_TOLERANCE)


def plain_trunk(clip, image):
    """Token-by-token weights of the last block's value path, and hidden states, from transformers' own outputs."""
    output = clip.vision_model(image, output_hidden_states=True)
    last = clip.vision_model.encoder.layers[-1]

    def mixed(hidden, weights):
        value = last.self_attn.v_proj(last.layer_norm1(hidden))[0, 1:]
        return clip.vision_model.post_layernorm(last.self_attn.out_proj(weights @ value))

    return output.hidden_states, mixed


@torch.no_grad()
def test_proxyclip_is_its_formula(tiny_clip):
    clip = tiny_clip.double()
    image, proxy = noise(1, 3, 64, 64).double(), noise(1, 7, 4, 4, seed=1) + 0.5
    states, mixed = plain_trunk(clip, image)
    units = F.normalize(proxy[0].flatten(1).T, dim=-1).double()
    scores = 3.0 * (units @ units.T - 1.2 * (units @ units.T).mean())
    scores[scores < 0] = -torch.inf
    assert 0.2 < scores.isinf().float().mean() < 0.8
    expected = clip.visual_projection(mixed(states[-2], scores.softmax(dim=-1)))
    found = DenseCLIP(clip).features(image, "proxyclip", outside={"proxy_features": proxy}).patch_features
    torch.testing.assert_close(found[0].flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("unsegmented", ["similar", "unsegmented"])
def test_corrclip_is_its_formula(tiny_clip, unsegmented):
    """Loops over pairs and regions; the copies of CLS run through transformers' blocks with a mask of their own."""
    clip = tiny_clip.double()
    clip.set_attn_implementation("eager")
    image, proxy = noise(1, 3, 64, 64).double(), noise(1, 7, 4, 4, seed=1) + 0.5
    regions = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [3, 3, 2, 4], [3, 3, 4, 4]])
    states, mixed = plain_trunk(clip, image)
    units = F.normalize(proxy[0].flatten(1).T, dim=-1).double()
    cosines, flat = units @ units.T, regions.flatten().tolist()
    scores = torch.full_like(cosines, -torch.inf)
    for i, first in enumerate(flat):
        for j, second in enumerate(flat):
            loose = unsegmented == "similar" and (first == 0 or second == 0)
            if cosines[i, j] > cosines.mean() if loose else first == second:
                scores[i, j] = 4 * cosines[i, j]
    weights = scores.softmax(dim=-1)
    total = mixed(states[-2], weights) + mixed(torch.stack(states[6:11]).mean(0), weights)

    # Tokens: five copies, CLS, patches. Nobody sees a copy; a copy sees CLS and its region.
    tokens = torch.cat([states[0][:, :1].expand(-1, 5, -1), states[0]], dim=1)
    mask = torch.zeros(22, 22, dtype=torch.double)
    mask[:, :5] = -torch.inf
    for region in range(5):
        for patch, other in enumerate(flat):
            if other != region:
                mask[region, 6 + patch] = -torch.inf
    for block in clip.vision_model.encoder.layers:
        tokens = block(tokens, attention_mask=mask[None, None])
    total = total + 0.5 * clip.vision_model.post_layernorm(tokens[0, flat])

    outside = {"proxy_features": proxy, "regions": regions.repeat_interleave(16, 0).repeat_interleave(16, 1)}
    options = {"merge_distance": None, "unsegmented_scope": unsegmented}
    found = DenseCLIP(clip).features(image, "corrclip", options, outside=outside).patch_features
    torch.testing.assert_close(found[0].flatten(0, 1), clip.visual_projection(total), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branches_can_be_left_out(tiny_clip):
    dense, image = DenseCLIP(tiny_clip), noise(1, 3, 64, 96)
    outside = {"proxy_features": noise(1, 5, 4, 6), "regions": torch.arange(6)[:, None].expand(6, 9)}
    for options in ({"spatial_weight": 0.0}, {"semantic_weight": 0.0}, {"spatial_weight": 0.0, "semantic_weight": 0.0}):
        features = dense.features(image, "corrclip", options, outside=outside)
        assert bool(features.trunk.heads) == ("semantic_weight" not in options)
        assert features.patch_features.isfinite().all()


def test_middle_blocks_follow_the_code_and_exist_in_any_tower():
    of = CorrClipSettings().middle_blocks
    assert (of(12), of(24), of(32)) == (tuple(range(5, 10)), tuple(range(10, 22)), tuple(range(2, 30)))
    for depth in range(2, 48):
        assert of(depth) and max(of(depth)) <= depth - 2
    assert CorrClipSettings(spatial_blocks=(3,)).middle_blocks(12) == (3,)


@pytest.mark.parametrize("method", ["proxyclip", "corrclip"])
@torch.no_grad()
def test_features_that_are_all_alike_do_no_harm(tiny_clip, method):
    outside = {"proxy_features": torch.ones(2, 3, 5, 7), "regions": torch.zeros(64, 96, dtype=torch.int32)}
    features = DenseCLIP(tiny_clip).features(noise(2, 3, 64, 96), method, outside=outside)
    assert features.patch_features.shape == (2, 5, 7, 64)
    assert features.patch_features.isfinite().all()


@torch.no_grad()
def test_chunks_do_not_change_the_result(tiny_clip, monkeypatch):
    outside = {"proxy_features": noise(2, 5, 9, 7), "regions": torch.arange(30).view(5, 6)}
    for method in ("proxyclip", "corrclip"):
        whole = DenseCLIP(tiny_clip).features(noise(2, 3, 64, 96), method, outside=outside).patch_features
        with monkeypatch.context() as patch:
            patch.setattr(proxy_methods, "CHUNK_VALUES", 1000)
            parts = DenseCLIP(tiny_clip).features(noise(2, 3, 64, 96), method, outside=outside).patch_features
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


class TestOutside:
    @pytest.mark.parametrize("method", ["proxyclip", "corrclip"])
    def test_missing_features_are_named(self, tiny_clip, pixels, method):
        with pytest.raises(ValueError, match=rf"{method}.*pass outside={{'proxy_features': \.\.\.}}"):
            DenseCLIP(tiny_clip).features(pixels, method)

    def test_missing_regions_are_named(self, tiny_clip, pixels):
        with pytest.raises(ValueError, match=r"'corrclip' needs a map of regions.*'regions'"):
            DenseCLIP(tiny_clip).features(pixels, "corrclip", outside={"proxy_features": noise(2, 4, 3, 3)})

    @pytest.mark.parametrize(
        ("outside", "message"),
        [
            ({"proxy_features": noise(1, 4, 3, 3)}, r"must be \(2, C, h, w\) for 2 images, got \(1, 4, 3, 3\)"),
            ({"proxy_features": noise(2, 4, 3)}, r"got \(2, 4, 3\)"),
            ({"proxy_features": noise(2, 4, 3, 3), "regions": noise(2, 8, 8)}, "must hold integers, got torch.float32"),
            ({"proxy_features": noise(2, 4, 3, 3), "regions": torch.zeros(3, 8, 8).int()}, r"got \(3, 8, 8\)"),
        ],
    )
    def test_wrong_shapes_are_named(self, tiny_clip, pixels, outside, message):
        with pytest.raises(ValueError, match=message):
            DenseCLIP(tiny_clip).features(pixels, "corrclip", outside=outside)

    @torch.no_grad()
    def test_added_border_is_a_region_of_its_own(self, tiny_clip):
        dense, image, proxy = DenseCLIP(tiny_clip), noise(1, 3, 50, 71), noise(1, 4, 8, 10)
        regions = torch.arange(5)[:, None].repeat_interleave(10, 0).expand(50, 71)
        found = dense.features(image, "corrclip", outside={"proxy_features": proxy, "regions": regions})
        by_hand = F.pad(regions, (4, 5, 7, 7), value=5)
        expected = dense.features(
            F.pad(image, (4, 5, 7, 7)), "corrclip", outside={"proxy_features": proxy, "regions": by_hand}
        )
        torch.testing.assert_close(found.patch_features, expected.patch_features)
        seen = dense.features(image, "corrclip", outside={"proxy_features": proxy, "regions": lambda _: by_hand[None]})
        torch.testing.assert_close(seen.patch_features, expected.patch_features)

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(50, 71), (64, 64)])
    def test_dropped_border(self, tiny_clip, size):
        dense, image = DenseCLIP(tiny_clip, odd_sizes="drop"), noise(1, 3, *size)
        outside = {"proxy_features": noise(1, 4, 6, 8), "regions": (noise(*size) > 0).int()}
        found = dense.features(image, "corrclip", outside=outside).patch_features
        outside["regions"] = outside["regions"][: size[0] // 16 * 16, : size[1] // 16 * 16]
        as_function = {**outside, "regions": lambda pixels: outside["regions"][None]}
        again = dense.features(image, "corrclip", outside=as_function).patch_features
        torch.testing.assert_close(found, again)

    def test_maps_are_cut_to_windows(self):
        regions = torch.arange(2 * 8 * 12).view(2, 8, 12)
        outside = {
            "regions": regions,
            "proxy_features": noise(2, 3, 4, 6),
            "function": len,
            "redundant_text": noise(2, 64),
        }
        places = [(0, (0, 0, 4, 4)), (1, (4, 6, 8, 10)), (1, (0, 8, 4, 12))]
        found = cut_to_windows(outside, places, (8, 12), 2)
        assert torch.equal(found["regions"][1], regions[1, 4:8, 6:10])
        assert torch.equal(found["proxy_features"][1], outside["proxy_features"][1, :, 2:4, 3:5])
        assert found["proxy_features"].shape == (3, 3, 2, 2)
        assert found["function"] is len
        assert found["redundant_text"] is outside["redundant_text"]
        (only,) = cut_to_windows({"regions": regions[0].numpy()}, places[:1], (8, 12), 2).values()
        assert torch.equal(only, regions[:1, :4, :4])
        with pytest.raises(ValueError, match=r"outside\['regions'\] holds 2 maps for 3 images"):
            cut_to_windows({"regions": regions}, places, (8, 12), 3)
        tiny = cut_to_windows({"regions": regions[:1, :1, :2]}, places, (8, 12), 1 + 1)["regions"]
        assert tiny.shape == (3, 1, 1)

    @torch.no_grad()
    def test_windows_and_batches_cut_the_maps_as_they_cut_the_pixels(self, tiny_clip, words):
        dense, images = DenseCLIP(tiny_clip), noise(3, 3, 64, 96)
        outside = {"proxy_features": noise(3, 4, 8, 12), "regions": (noise(3, 64, 96) > 0.3).int().numpy()}
        for limit in (1, 2, 100):
            windowed = dense.segment(
                images, words, method="corrclip", outside=outside, window=64, stride=32, window_batch_size=limit
            )
            whole = dense.segment(images, words, method="corrclip", outside=outside, window_batch_size=limit)
            for index in range(3):
                own = {key: value[index : index + 1] for key, value in outside.items()}
                options = {"method": "corrclip", "outside": own}
                (alone,) = dense.segment(images[index : index + 1], words, **options)
                torch.testing.assert_close(whole[index].confidence, alone.confidence, atol=1e-4, rtol=1e-4)
                (left,) = dense.segment(
                    images[index : index + 1, :, :, :64],
                    words,
                    method="corrclip",
                    outside={
                        "proxy_features": own["proxy_features"][..., :8],
                        "regions": own["regions"][..., :64],
                    },
                )
                only_left = windowed[index].confidence[:, :32]  # the second window starts at 32
                torch.testing.assert_close(only_left, left.confidence[:, :32], atol=1e-4, rtol=1e-4)

    def test_pipeline_and_arm_take_them(self, arm, tiny_clip, make_pipe, photo):
        size = (photo.height, photo.width)
        regions = (np.indices(size).sum(axis=0) // 40).astype(np.int32)
        seen = []

        def proxy(pixels):
            seen.append(tuple(pixels.shape))
            return F.avg_pool2d(pixels, 8).float()

        for model, use_arm in ((arm, True), (arm, False), (tiny_clip, None)):
            for method in ("proxyclip", "corrclip"):
                for window in (None, 48):
                    result = make_pipe(model)(
                        photo,
                        candidate_labels="cat, grass",
                        method=method,
                        use_arm=use_arm,
                        window=window,
                        outside={"proxy_features": proxy, "regions": regions},
                        semantic=True,
                    )
                    assert result["semantic_map"].shape == size
                    corrected = correct_labels(result["semantic_map"], regions, unsegmented=-1)
                    assert all(len(np.unique(corrected[regions == index])) == 1 for index in np.unique(regions))
        assert seen
        with pytest.raises(ValueError, match="needs features of a vision model"):
            make_pipe(tiny_clip)(photo, candidate_labels="cat, grass", method="proxyclip")

    @pytest.mark.parametrize("as_function", [False, True])
    def test_pipeline_corrects_the_map_of_any_method(self, tiny_clip, make_pipe, photo, as_function):
        regions = (np.indices((photo.height, photo.width)) // 40).sum(axis=0).astype(np.int32)
        outside = {"regions": (lambda pixels: resized(regions, pixels)) if as_function else regions}
        options = {"candidate_labels": "cat, grass, sky, sea, dog, road", "method": "clip", "semantic": True}
        pipe = make_pipe(tiny_clip)
        plain = pipe(photo, **options)
        result = pipe(photo, **options, outside=outside, correct_regions=True)
        expected = correct_labels(plain["semantic_map"], regions)
        same = (result["semantic_map"] == expected).mean()
        assert same > 0.98 if as_function else same == 1  # a function sees the resized picture
        changed = plain["semantic_map"] != result["semantic_map"]
        assert changed.any()
        assert (result["confidence"][~changed] == plain["confidence"][~changed]).all()
        assert sum(segment["pixels"] for segment in result["segments"]) == regions.size
        with pytest.raises(ValueError, match="correct_regions needs a map of regions"):
            pipe(photo, **options, correct_regions=True)


def resized(regions, pixels):
    maps = torch.from_numpy(regions)[None, None].float()
    return F.interpolate(maps, size=pixels.shape[-2:], mode="nearest")[0].int()
