"""Where things lie: no pixel is lost or shifted, whatever the sizes of image, window, stride and patch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from arm_hf.modeling.decision import QueryMaps, decide, window_boxes
from arm_hf.modeling.dense_clip import segment_images
from arm_hf.modeling.trunk import Padding

GROUP = "geometry"
many = settings(max_examples=80, deadline=None)
patches = st.sampled_from([1, 2, 3, 4, 8, 14, 16])


@pytest.fixture
def counted(faults):
    """Counts the examples of a property, each as a case."""

    def count(name: str, example: Any, holds: Any) -> None:
        def body(**drawn: Any) -> None:
            with faults.case(GROUP, f"{name}: {drawn}") as case:
                holds(**drawn)
                case.right()

        body.__name__ = body.__qualname__ = "body"
        many(given(**example)(body))()

    return count


def network(patch: int, rule: str = "pad") -> Any:
    """Scores of three queries from the mean colours of each patch, and from their spread over the whole input.

    It sees what its input holds and not where, as a CLIP without position embeddings would.
    """

    def maps_of(pixels: torch.Tensor) -> QueryMaps:
        padding = Padding.to_multiple(*pixels.shape[-2:], patch, rule)
        padded = padding.apply(pixels)
        means = F.avg_pool2d(padded, patch)
        scores = torch.sin(3 * means) + means.std(dim=(-2, -1), correction=0, keepdim=True)
        return QueryMaps(scores, None, None, "none", 1.0, padding, (padded.shape[-2], padded.shape[-1]))

    return maps_of


def scores_of(pixels: torch.Tensor, patch: int, rule: str = "pad", **options: Any) -> Any:
    (decision,) = segment_images(network(patch, rule), pixels, num_queries=3, return_class_scores=True, **options)
    return decision


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_pixel_gets_one_class_at_the_images_own_size(counted):
    def holds(height, width, patch, window, stride, rule, out):
        window = None if window is None else max(1, window)
        stride = None if window is None or stride is None else 1 + stride % window
        sizes = [out] if out else None
        decision = scores_of(noise(1, 3, height, width), patch, rule, window=window, stride=stride, sizes=sizes)
        size = out or (height, width)
        assert decision.labels.shape == decision.confidence.shape == size
        assert decision.class_scores.shape == (3, *size) and decision.class_scores.isfinite().all()
        assert torch.equal(decision.labels.long(), decision.class_scores.argmax(0))
        boxes = window_boxes((height, width), window, stride)
        visits = np.zeros((height, width), int)
        for top, left, bottom, right in boxes:
            visits[top:bottom, left:right] += 1
        assert visits.min() >= 1
        assert window is None or visits.max() <= (-(-window // (stride or max(1, window // 2))) + 1) ** 2

    side = st.integers(1, 60)
    example = {"height": side, "width": side, "patch": patches, "window": st.none() | st.integers(1, 70),
               "stride": st.none() | st.integers(0, 70), "rule": st.sampled_from(["pad", "drop"]),
               "out": st.none() | st.tuples(side, side)}  # fmt: skip
    counted("size", example, holds)


def test_a_constant_stays_constant(counted):
    """At the seams of windows, at padded borders, after resizing."""

    def holds(height, width, patch, window, stride, out):
        boxes = window_boxes((height, width), window, 1 + stride % window)
        crop = (boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1])
        padding = Padding.to_multiple(*crop, patch)
        padded = (crop[0] + padding.top + padding.bottom, crop[1] + padding.left + padding.right)
        values = torch.tensor([0.3, 0.7, 0.1])[None, :, None, None]
        grid = values.expand(len(boxes), 3, padded[0] // patch, padded[1] // patch)
        maps = QueryMaps(grid, None, None, "none", 1.0, padding, padded)
        decision = decide(maps, boxes, (height, width), range(3), output_size=out, return_class_scores=True)
        assert (decision.labels == 1).all()
        torch.testing.assert_close(decision.class_scores, values[0].expand(3, *out))

    side = st.integers(1, 60)
    example = {"height": side, "width": side, "patch": patches, "window": st.integers(1, 70),
               "stride": st.integers(0, 70), "out": st.tuples(side, side)}  # fmt: skip
    counted("constant", example, holds)


def test_windows_of_an_affine_field_average_to_the_field(counted):
    """A cell lies at the middle of its patch; half a patch inside all windows the plane must come back exactly."""

    def holds(height, width, patch, cells, stride, slope):
        window = patch * cells
        height, width = max(height, window), max(width, window)
        boxes = window_boxes((height, width), window, 1 + stride % window)

        def field(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return slope[0] * y[:, None] + slope[1] * x[None, :]

        middles = (torch.arange(cells) + 0.5) * patch - 0.5
        grids = torch.stack([field(top + middles, left + middles) for top, left, *_ in boxes])
        maps = QueryMaps(grids[:, None], None, None, "none", 1.0, Padding(), (window, window))
        decision = decide(maps, boxes, (height, width), range(1), return_class_scores=True)
        expected = field(torch.arange(height).float(), torch.arange(width).float())
        inside = torch.ones(height, width, dtype=torch.bool)
        half = patch // 2
        for top, left, bottom, right in boxes:
            rim = torch.ones(window, window, dtype=torch.bool)
            rim[half : window - half, half : window - half] = False
            inside[top:bottom, left:right] &= ~rim
        torch.testing.assert_close(decision.class_scores[0][inside], expected[inside], atol=1e-3, rtol=1e-5)
        assert patch > 1 or inside.all()

    side = st.integers(1, 60)
    slopes = st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32))
    example = {"height": side, "width": side, "patch": patches, "cells": st.integers(2, 5),
               "stride": st.integers(0, 70), "slope": slopes}  # fmt: skip
    counted("affine field", example, holds)


def test_content_moved_by_whole_strides_moves_its_scores(counted):
    def holds(patch, cells, steps, columns, rows, seed):
        window = patch * cells
        stride = patch * (1 + steps % cells)
        height, width = window + stride * rows, window + stride * columns
        before = noise(1, 3, height, width + stride, seed=seed)
        one, two = before[..., :-stride], before[..., stride:]
        first, second = (scores_of(image, patch, window=window, stride=stride).class_scores for image in (one, two))
        rim = window - stride  # where the border leaves windows out
        left, right = first[..., rim + stride : width - rim], second[..., rim : width - stride - rim]
        torch.testing.assert_close(left, right)
        upright, moved = before.mT[..., :-stride, :], before.mT[..., stride:, :]
        above, below = (
            scores_of(image, patch, window=window, stride=stride).class_scores for image in (upright, moved)
        )
        torch.testing.assert_close(above[:, rim + stride : width - rim], below[:, rim : width - stride - rim])

    example = {"patch": patches, "cells": st.integers(1, 3), "steps": st.integers(0, 5), "columns": st.integers(1, 5),
               "rows": st.integers(0, 2), "seed": st.integers(0, 9)}  # fmt: skip
    counted("moved content", example, holds)


def test_a_mirrored_image_gives_the_mirrored_scores(counted):
    """Any shift of the map against the image, of half a pixel too, would show twice here."""

    def holds(patch, cells, steps, columns, rows, out, seed):
        window = patch * cells
        stride = patch * (1 + steps % cells)
        image = noise(1, 3, window + stride * rows, window + stride * columns, seed=seed)
        options = {"window": window, "stride": stride, "sizes": [out] if out else None}
        plain = scores_of(image, patch, **options).class_scores
        for axes in ((-1,), (-2,), (-2, -1)):
            mirrored = scores_of(image.flip(axes), patch, **options).class_scores
            torch.testing.assert_close(mirrored.flip(axes), plain, atol=1e-4, rtol=1e-4)

    example = {"patch": patches, "cells": st.integers(1, 3), "steps": st.integers(0, 5), "columns": st.integers(0, 4),
               "rows": st.integers(0, 2), "out": st.none() | st.tuples(st.integers(1, 70), st.integers(1, 70)),
               "seed": st.integers(0, 9)}  # fmt: skip
    counted("mirrored", example, holds)


def test_the_same_through_the_pipeline(faults, pipe, draw):
    """Masks share out all pixels of the picture, at its own size; content moved by whole strides moves its scores."""
    random = np.random.default_rng(0)
    for _ in range(25):
        width, height = (int(side) for side in random.integers(1, 150, 2))
        window = int(random.integers(16, 90)) if random.random() < 0.7 else None
        stride = int(random.integers(8, window + 1)) if window and random.random() < 0.7 else None
        with faults.case(GROUP, f"pipeline: {width} x {height}, {window}, {stride}") as case:
            found = pipe(draw(width, height), candidate_labels="cat,dog,sky", window=window, stride=stride)
            masks = np.stack([np.asarray(each["mask"]) // 255 for each in found])
            assert masks.shape[1:] == (height, width) and (masks.sum(0) == 1).all()
            case.right()
    wide = draw(48 + 16 * 9, 48, 5)
    with faults.case(GROUP, "pipeline: moved content") as case:
        options = {"candidate_labels": "cat,dog,sky", "semantic": True, "size": 48, "window": 48, "stride": 16}
        one, two = (pipe(wide.crop((left, 0, left + 48 + 16 * 8, 48)), **options)["confidence"] for left in (0, 16))
        np.testing.assert_allclose(one[:, 48:-32], two[:, 32:-48], atol=1e-4)
        assert np.ptp(one) > 1e-3
        case.right()
