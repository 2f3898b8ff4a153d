"""From scores on a grid to labels per pixel: geometry and decision against plain formulas, and bounded memory."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arm_hf.modeling.arm import refinement_map
from arm_hf.modeling.decision import QueryMaps, decide, window_boxes
from arm_hf.modeling.dense_clip import DenseCLIP, segment_images
from arm_hf.modeling.trunk import Padding

quick = settings(max_examples=60, deadline=None)
side = st.integers(1, 70)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps_of(scores: torch.Tensor, size: tuple[int, int], activation="softmax", scale=1.0, padding=None) -> QueryMaps:
    """Scores (B, Q, h, w) of images of a size."""
    return QueryMaps(scores, None, None, activation, scale, padding or Padding(), size)


class TestWindows:
    @quick
    @given(side, side, st.integers(1, 80), st.data())
    def test_every_pixel_is_seen_by_equal_windows_inside_the_image(self, height, width, window, data):
        stride = data.draw(st.integers(1, window))
        boxes = window_boxes((height, width), window, stride)
        visits = np.zeros((height, width), int)
        for top, left, bottom, right in boxes:
            assert (bottom - top, right - left) == (min(window, height), min(window, width))
            assert top >= 0 and left >= 0 and bottom <= height and right <= width
            visits[top:bottom, left:right] += 1
        assert visits.min() >= 1
        assert len(set(boxes)) == len(boxes)
        rows, columns = (max(length - window + stride - 1, 0) // stride + 1 for length in (height, width))
        assert len(boxes) == rows * columns

    def test_known_positions(self):
        # 336 x 448 with the literature's 224 / 112: 2 x 3 windows, none shifted.
        boxes = window_boxes((336, 448), 224, 112)
        assert [box[:2] for box in boxes] == [(0, 0), (0, 112), (0, 224), (112, 0), (112, 112), (112, 224)]
        # The last one is moved back to end at the border.
        assert [box[0] for box in window_boxes((300, 10), 224, 112)] == [0, 76]

    def test_half_the_window_is_the_default_stride(self):
        assert window_boxes((100, 100), 40, None) == window_boxes((100, 100), 40, 20)
        assert window_boxes((3, 2), 1, None) == window_boxes((3, 2), 1, 1)

    @pytest.mark.parametrize(
        ("window", "stride", "message"),
        [
            (0, 1, "window must be at least 1"),
            (-4, None, "window must be at least 1"),
            (32, 33, "between 1 and window"),
            (32, 0, "between 1 and window"),
            (None, 8, "no effect without window"),
        ],
    )
    def test_impossible_windows(self, window, stride, message):
        with pytest.raises(ValueError, match=message):
            window_boxes((64, 64), window, stride)

    @quick
    @given(side, side, st.integers(1, 80), st.data())
    def test_constant_scores_have_no_seam(self, height, width, window, data):
        stride = data.draw(st.integers(1, window))
        boxes = window_boxes((height, width), window, stride)
        crop = (min(window, height), min(window, width))
        padding = Padding.to_multiple(*crop, 16)
        padded = (crop[0] + padding.top + padding.bottom, crop[1] + padding.left + padding.right)
        scores = torch.tensor([0.3, 0.7, 0.1])[None, :, None, None].expand(
            len(boxes), 3, padded[0] // 16, padded[1] // 16
        )
        decision = decide(maps_of(scores, padded, "none", 1.0, padding), boxes, (height, width), range(3))
        assert decision.labels.shape == (height, width)
        assert (decision.labels == 1).all()
        torch.testing.assert_close(decision.confidence, torch.full((height, width), 0.7))

    def test_overlap_is_the_plain_average(self):
        boxes = window_boxes((4, 6), 4, 2)
        assert len(boxes) == 2
        scores = noise(2, 3, 4, 4)
        total, visits = torch.zeros(3, 4, 6), torch.zeros(4, 6)
        for window, (top, left, bottom, right) in zip(scores, boxes, strict=True):
            total[:, top:bottom, left:right] += window
            visits[top:bottom, left:right] += 1
        expected = (total / visits).softmax(0)
        decision = decide(maps_of(scores, (4, 4)), boxes, (4, 6), range(3), return_class_scores=True)
        torch.testing.assert_close(decision.class_scores, expected)

    @torch.no_grad()
    def test_a_window_that_holds_the_image_is_the_whole_image(self, tiny_clip, words):
        dense, image = DenseCLIP(tiny_clip), noise(1, 3, 50, 70)
        (whole,) = dense.segment(image, words)
        for window in (70, 71, 500):
            (windowed,) = dense.segment(image, words, window=window)
            assert torch.equal(windowed.labels, whole.labels)
            torch.testing.assert_close(windowed.confidence, whole.confidence)

    @torch.no_grad()
    @pytest.mark.parametrize("window_batch_size", [1, 2, 5, 100])
    def test_windows_per_pass_do_not_change_the_result(self, tiny_clip, words, window_batch_size):
        dense, images = DenseCLIP(tiny_clip), noise(2, 3, 70, 90)
        seen = []

        def maps(pixels):
            seen.append(len(pixels))
            return dense.query_maps(pixels, words)

        decisions = segment_images(
            maps, images, num_queries=5, window=48, stride=32, window_batch_size=window_batch_size
        )
        assert max(seen) <= window_batch_size and sum(seen) == 2 * 2 * 3
        alone = dense.segment(images[1:], words, window=48, stride=32)[0]
        assert (decisions[1].labels == alone.labels).float().mean() > 0.999
        torch.testing.assert_close(decisions[1].confidence, alone.confidence, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="window_batch_size must be at least 1"):
            segment_images(maps, images, num_queries=5, window_batch_size=0)


def plain_scores(scores, size, output_size, class_of_query, num_classes, activation, scale):
    """All queries at once: upsample, resize, activate, maximum over the queries of a class."""
    maps = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    maps = F.interpolate(maps, size=output_size, mode="bilinear", align_corners=False)[0]
    if activation == "softmax":
        maps = (scale * maps).softmax(dim=0)
    else:
        maps = maps.sigmoid() if activation == "sigmoid" else scale * maps
    result = torch.zeros(num_classes, *output_size)
    for index in range(num_classes):
        members = [query for query, owner in enumerate(class_of_query) if owner == index]
        if members:
            result[index] = maps[members].amax(dim=0)
    return result


class TestDecision:
    @quick
    @given(
        activation=st.sampled_from(["softmax", "sigmoid", "none"]),
        owners=st.lists(st.integers(0, 4), min_size=1, max_size=9),
        spare=st.integers(0, 2),
        size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        output_size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
        chunk=st.integers(1, 3000),
        seed=st.integers(0, 1000),
    )
    def test_equals_the_plain_formula(self, activation, owners, spare, size, output_size, chunk, seed):
        scores = noise(1, len(owners), 2, 3, seed=seed).abs() / 4
        num_classes = max(owners) + 1 + spare
        expected = plain_scores(scores, size, output_size, owners, num_classes, activation, 7.0)
        decision = decide(
            maps_of(scores, size, activation, 7.0),
            window_boxes(size, None, None),
            size,
            owners,
            num_classes=num_classes,
            output_size=output_size,
            return_class_scores=True,
            max_chunk_values=chunk,
        )
        torch.testing.assert_close(decision.class_scores, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(decision.confidence, expected.amax(dim=0), atol=1e-6, rtol=1e-5)
        chosen = expected.gather(0, decision.labels[None].long())[0]
        torch.testing.assert_close(chosen, expected.amax(dim=0), atol=1e-6, rtol=1e-5)
        assert decision.labels.dtype == torch.int32

    @quick
    @given(
        queries=st.integers(1, 12),
        chunk=st.integers(1, 500),
        activation=st.sampled_from(["softmax", "sigmoid", "none"]),
        refined=st.booleans(),
    )
    def test_chunks_do_not_change_the_labels(self, queries, chunk, activation, refined):
        scores = noise(1, queries, 3, 4)
        maps = maps_of(scores, (24, 32), activation, 5.0)
        if refined:
            maps.refinement_features, maps.class_embeddings = noise(1, 6, 12, 16), noise(queries, 6, seed=2)
        arguments = (maps, window_boxes((24, 32), None, None), (24, 32), range(queries))
        whole = decide(*arguments, return_class_scores=True)
        chunked = decide(*arguments, return_class_scores=True, max_chunk_values=chunk)
        assert torch.equal(whole.labels, chunked.labels)
        torch.testing.assert_close(whole.confidence, chunked.confidence)
        torch.testing.assert_close(whole.class_scores, chunked.class_scores)

    @pytest.mark.parametrize("refined", ["not at all", "by features", "by maps"])
    def test_queries_are_selected_with_their_refinement(self, refined):
        features, words = noise(1, 5, 8, 12, seed=1), noise(4, 5, seed=2)
        by = {
            "not at all": (None, None),
            "by features": (features, words),
            "by maps": (refinement_map(features, words), None),
        }
        maps = QueryMaps(noise(1, 4, 2, 3), *by[refined], "sigmoid", 1.0, Padding(), (32, 48))
        chosen = maps.select_queries([3, 1])
        assert chosen.num_queries == 2
        torch.testing.assert_close(chosen.chunk(), maps.chunk()[:, [3, 1]])
        torch.testing.assert_close(maps.chunk(1, 3), maps.chunk()[:, 1:3])

    def test_refinement_is_added_before_the_upsampling(self):
        coarse, features, words = noise(1, 4, 2, 3), noise(1, 5, 8, 12, seed=1), noise(4, 5, seed=2)
        fused = F.interpolate(coarse, size=(8, 12), mode="bilinear") + torch.einsum("qd,bdhw->bqhw", words, features)
        expected = plain_scores(fused, (32, 48), (32, 48), range(4), 4, "sigmoid", 1.0)
        maps = QueryMaps(coarse, features, words, "sigmoid", 1.0, Padding(), (32, 48))
        decision = decide(maps, window_boxes((32, 48), None, None), (32, 48), range(4), return_class_scores=True)
        torch.testing.assert_close(decision.class_scores, expected, atol=1e-5, rtol=1e-5)

    def test_ties_go_to_the_first_query(self):
        # A word that two classes share ("bed" in COCO-Object) is the earlier class's.
        scores = torch.ones(1, 3, 2, 2)
        for chunk in (1, 10**6):
            decision = decide(maps_of(scores, (2, 2)), [(0, 0, 2, 2)], (2, 2), [0, 1, 1], max_chunk_values=chunk)
            assert (decision.labels == 0).all()

    @quick
    @given(
        threshold=st.floats(0.05, 0.95),
        background=st.integers(0, 3),
        with_words=st.booleans(),
        activation=st.sampled_from(["softmax", "sigmoid", "none"]),
    )
    def test_threshold(self, threshold, background, with_words, activation):
        others = [index for index in range(4) if index != background]
        owners = [*others, background] if with_words else others
        scores = noise(1, len(owners), 9, 11).abs().clamp(max=2) / 2
        plain = plain_scores(scores, (9, 11), (9, 11), owners, 4, activation, 2.0)
        decision = decide(
            maps_of(scores, (9, 11), activation, 2.0),
            [(0, 0, 9, 11)],
            (9, 11),
            owners,
            num_classes=4,
            threshold=threshold,
            background_index=background,
            return_class_scores=True,
        )
        winner = plain[others].amax(dim=0)
        own = plain[background] if with_words else torch.zeros_like(winner)
        clear = (winner - threshold).abs().minimum((winner - own).abs()) > 1e-5
        expected = (winner < threshold) | (own > winner)
        assert torch.equal((decision.labels == background)[clear], expected[clear])
        assert decision.confidence.isfinite().all() and decision.class_scores.isfinite().all()
        # Where a class won, nothing is changed.
        won = clear & ~expected
        torch.testing.assert_close(decision.confidence[won], winner[won])
        torch.testing.assert_close(decision.class_scores[others], plain[others], atol=1e-6, rtol=1e-5)

    def test_arguments_that_do_not_fit(self):
        maps = maps_of(noise(1, 3, 2, 2), (4, 4))
        with pytest.raises(ValueError, match="needs a background class"):
            decide(maps, [(0, 0, 4, 4)], (4, 4), range(3), threshold=0.5)
        with pytest.raises(ValueError, match="2 class indices for 3 queries"):
            decide(maps, [(0, 0, 4, 4)], (4, 4), range(2))


class TestOddSizes:
    @quick
    @given(side, side, st.sampled_from([14, 16, 32]), st.sampled_from(["pad", "drop"]))
    def test_padding_makes_whole_patches(self, height, width, patch, rule):
        padding = Padding.to_multiple(height, width, patch, rule)
        image = torch.arange(float(height * width)).reshape(1, height, width)
        padded = padding.apply(image)
        assert padded.shape[-2] % patch == 0 and padded.shape[-1] % patch == 0
        assert min(padded.shape[-2:]) >= patch
        if rule == "pad":
            assert torch.equal(padding.crop(padded), image)
            assert 0 <= padding.bottom - padding.top <= 1 and 0 <= padding.right - padding.left <= 1
        elif min(height, width) >= patch:
            assert torch.equal(padding.crop(padded), padded)
            assert torch.equal(padded, image[:, : height // patch * patch, : width // patch * patch])

    @torch.no_grad()
    @pytest.mark.parametrize("window", [None, 50])
    def test_drop_stretches_the_map_over_the_image_in_one_step(self, tiny_clip, words, window):
        # SCLIP, NACLIP and ResCLIP: the h x w map is interpolated to the size of the crop, remainder included.
        image = noise(1, 3, 50, 75)
        dense = DenseCLIP(tiny_clip, odd_sizes="drop")
        expected, visits = torch.zeros(5, 50, 75), torch.zeros(50, 75)
        for top, left, bottom, right in window_boxes((50, 75), window, None):
            crop = image[..., top:bottom, left:right]
            maps = dense.query_maps(crop, words).coarse
            assert maps.shape[-2:] == (crop.shape[-2] // 16, crop.shape[-1] // 16)
            up = F.interpolate(maps, size=crop.shape[-2:], mode="bilinear", align_corners=False)[0]
            expected[:, top:bottom, left:right] += up
            visits[top:bottom, left:right] += 1
        expected = (50 * expected / visits).softmax(dim=0)
        (decision,) = dense.segment(image, words, window=window, return_class_scores=True)
        torch.testing.assert_close(decision.class_scores, expected, atol=1e-5, rtol=1e-4)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address and address not in self.seen:
            self.seen.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


@torch.no_grad()
def test_memory_of_171_classes_at_1024_pixels_is_bounded():
    """All upsampled scores at once would be 684 MiB, and the softmax as much again."""
    maps = maps_of(noise(1, 171, 64, 64), (1024, 1024))
    maps.refinement_features, maps.class_embeddings = noise(1, 8, 128, 128), noise(171, 8)
    arguments = (maps, [(0, 0, 1024, 1024)], (1024, 1024), range(171))
    with LiveBytes() as memory:
        labels = decide(*arguments).labels
    assert labels.unique().numel() / 171 > 0.05
    assert 64 < memory.peak / 2**20 < 256
