"""PAMR against a plain restatement, its invariants, and its place in the decision stage."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from arm_hf.modeling import pamr
from arm_hf.modeling.decision import upsample, window_boxes
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.pamr import PAMR, affinity, neighbour_offsets, refine

from .conftest import noise


def plain_pamr(image: np.ndarray, maps: np.ndarray, dilations: tuple[int, ...], iterations: int) -> np.ndarray:
    """The description of the algorithm with one gather per neighbour; image (C, H, W), maps (Q, H, W)."""
    rows, columns = (np.arange(extent) for extent in image.shape[1:])

    def look(values: np.ndarray, dy: int, dx: int) -> np.ndarray:
        return values[:, np.clip(rows + dy, 0, rows[-1])[:, None], np.clip(columns + dx, 0, columns[-1])]

    square = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    neighbours = [step for step in square if step != (0, 0)]
    deviation = np.stack([look(image, *step) for step in square]).std(axis=0, ddof=1)
    scores = np.stack([-np.abs(image - look(image, *step)) / (1e-8 + 0.1 * deviation) for step in neighbours])
    powers = np.exp(scores.mean(axis=1))
    weights = powers / powers.sum(axis=0)
    for _ in range(iterations):
        maps = sum(own * look(maps, *step) for own, step in zip(weights, neighbours, strict=True))
    return maps


@pytest.mark.parametrize(("size", "dilations"), [((11, 14), (2, 5)), ((6, 9), (8, 16)), ((7, 5), (1,))])
def test_equals_a_plain_restatement(size, dilations):
    image, maps = noise(2, 3, *size).double(), noise(2, 4, *size, seed=1).double()
    image[0, :, :3] = 0.25  # a flat area: no deviation for some pixels
    found = refine(maps, affinity(image, dilations), dilations, 3)
    for b in range(2):
        expected = plain_pamr(image[b].numpy(), maps[b].numpy(), dilations, 3)
        np.testing.assert_allclose(found[b].numpy(), expected, atol=1e-10)
    single = PAMR(image.float(), 3, dilations)(maps.float())
    torch.testing.assert_close(single, found.float(), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_first_pass_of_resclip_is_the_authors(shared):
    with np.load(shared / "goldens/self_attention/dense_sq64.npz") as golden:
        pixels, text = torch.from_numpy(golden["pixel_values"]), torch.from_numpy(golden["text_features"])
        expected = torch.from_numpy(golden["resclip.naclip.voc20.rcs_sfr.first_prob"])
    dense = DenseCLIP(CLIPModel.from_pretrained(shared / "goldens/tiny_clip_hf").eval())
    cosines = dense.query_maps(pixels, text, "resclip", {"preset": "voc20", "sfr": False}).coarse
    scores = F.interpolate(cosines, size=(64, 64), mode="bilinear", align_corners=False)
    found = (40 * PAMR(pixels, 10)(scores)).softmax(dim=1)[0]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 100), (40, 17), (64, 64)])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_values_stay_within_those_of_the_map(size, queries):
    image, maps = noise(1, 3, *size), noise(1, queries, *size, seed=1)
    weights = affinity(image)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(1, *size))
    found = refine(maps, weights)
    assert found.shape == maps.shape
    assert (found.amax((2, 3)) <= maps.amax((2, 3)) + 1e-5).all()
    assert (found.amin((2, 3)) >= maps.amin((2, 3)) - 1e-5).all()
    constant = torch.full_like(maps, 0.7)
    torch.testing.assert_close(refine(constant, weights), constant, atol=1e-5, rtol=0)


def test_a_flat_image_averages_the_neighbours():
    weights = affinity(torch.full((1, 3, 20, 30), 0.3))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16))


def test_an_edge_stops_the_flow():
    image = torch.zeros(1, 3, 40, 80)
    image[..., 40:] = 1.0
    maps = image[:, :1] + 0.1 * noise(1, 1, 40, 80)
    found = PAMR(image)(maps)
    assert found[..., :40].max() < 0.5 < found[..., 40:].min()


def test_blocks_and_parts_do_not_change_the_numbers(monkeypatch):
    image, maps = noise(2, 3, 37, 50), noise(2, 9, 37, 50, seed=1)
    whole = PAMR(image)(maps)
    parts = torch.cat([PAMR(image)(maps[:, :4]), PAMR(image)(maps[:, 4:])], dim=1)
    alone = torch.stack([PAMR(pixels)(queries) for pixels, queries in zip(image, maps, strict=True)])
    monkeypatch.setattr(pamr, "BLOCK_VALUES", 300)
    for other in (parts, alone, PAMR(image)(maps)):
        torch.testing.assert_close(other, whole, atol=1e-6, rtol=1e-5)


def test_maps_are_not_changed_and_are_resized_with_aligned_corners():
    image, maps = noise(1, 3, 33, 41), noise(1, 2, 5, 6, seed=1)
    before = maps.clone()
    resized = F.interpolate(maps, size=(33, 41), mode="bilinear", align_corners=True)
    torch.testing.assert_close(PAMR(image)(maps), PAMR(image)(resized))
    torch.testing.assert_close(refine(maps, affinity(image), iterations=0), resized)
    assert torch.equal(maps, before)


def test_wrong_arguments_say_what_is_allowed():
    image = noise(1, 3, 8, 8)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        PAMR(image, 0)
    with pytest.raises(ValueError, match="positive numbers"):
        neighbour_offsets((0, 4))
    with pytest.raises(ValueError, match=r"weights must be \(2, 16\)"):
        refine(noise(2, 3, 8, 8), affinity(image))
    with pytest.raises(ValueError, match="must not be negative"):
        refine(noise(1, 3, 8, 8), affinity(image), iterations=-1)


@pytest.mark.parametrize("window", [None, 48])
@torch.no_grad()
def test_segment_refines_averaged_scores_at_the_size_of_the_result(tiny_clip, pixels, words, window):
    dense, size = DenseCLIP(tiny_clip), (50, 77)
    boxes = window_boxes((64, 96), window, None)
    found = dense.segment(pixels, words, method="naclip", pamr=4, sizes=[size] * 2, window=window)
    chunked = dense.segment(
        pixels, words, method="naclip", pamr=4, sizes=[size] * 2, window=window, max_chunk_values=9000
    )
    for image, ours, other in zip(pixels, found, chunked, strict=True):
        crops = torch.stack([image[:, top:bottom, left:right] for top, left, bottom, right in boxes])
        maps = dense.query_maps(crops, words, "naclip")
        scores = F.interpolate(upsample(maps, boxes, (64, 96), 0, 5)[None], size=size, mode="bilinear")
        guide = F.interpolate(image[None], size=size, mode="bilinear")
        expected = (40 * refine(scores, affinity(guide), iterations=4)[0]).softmax(dim=0)
        torch.testing.assert_close(ours.confidence, expected.amax(dim=0), atol=1e-5, rtol=1e-4)
        assert (ours.labels == expected.argmax(dim=0)).float().mean() > 0.999
        assert (ours.labels == other.labels).float().mean() > 0.999


@pytest.mark.parametrize("use_arm", [False, True])
def test_pipeline_and_arm_accept_it(arm, make_pipe, photo, use_arm):
    pipe = make_pipe(arm)
    call = {"candidate_labels": "cat, grass", "use_arm": use_arm, "semantic": True}
    plain, refined = pipe(photo, **call), pipe(photo, **call, pamr=5)
    assert refined["confidence"].shape == plain["confidence"].shape
    assert not np.allclose(refined["confidence"], plain["confidence"])
    with pytest.raises(ValueError, match="PAMR iterations must be at least 1"):
        pipe(photo, **call, pamr=0)
