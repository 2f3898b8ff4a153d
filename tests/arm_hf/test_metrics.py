"""Figures of segmentations against plain loops, the hub's documented numbers, streaming, and two processes."""

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from arm_hf import metrics
from arm_hf.metrics import ConfusionMatrix


@pytest.fixture(scope="module")
def folder(root):
    return root / "arm_hf" / "metrics" / "mean_iou"


@st.composite
def pairs_of_maps(draw, values=(0, 1, 2, 3, 7, 254, 255)):
    """One to three pairs of maps of different sizes, in several integer types."""
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        count = shape[0] * shape[1]
        dtype = draw(st.sampled_from([np.uint8, np.int32, np.int64]))
        two = [draw(st.lists(st.sampled_from(values), min_size=count, max_size=count)) for _ in range(2)]
        pairs.append(tuple(np.array(flat, dtype=dtype).reshape(shape) for flat in two))
    return pairs


def relabelled(label, label_map, reduce_labels):
    label = label_map.get(label, label) if label_map else label
    if reduce_labels:
        label = 255 if label in (0, 255) else label - 1
    return label


def figures_by_hand(pairs, num_labels, ignore_index, label_map=None, reduce_labels=False):
    """Sets of pixels per class, over all images."""
    predicted, true = {}, {}
    for number, (prediction, reference) in enumerate(pairs):
        for y, x in np.ndindex(prediction.shape):
            label = relabelled(int(reference[y, x]), label_map, reduce_labels)
            if label != ignore_index:
                predicted.setdefault(int(prediction[y, x]), set()).add((number, y, x))
                true.setdefault(label, set()).add((number, y, x))
    nan = float("nan")
    rows = []
    for label in range(num_labels):
        p, t = predicted.get(label, set()), true.get(label, set())
        rows.append((len(p & t), len(p | t), len(t)))
    iou = [both / union if union else nan for both, union, _ in rows]
    accuracy = [both / size if size else nan for both, _, size in rows]
    total = sum(size for _, _, size in rows)
    mean = [[x for x in values if x == x] for values in (iou, accuracy)]
    return {
        "mean_iou": sum(mean[0]) / len(mean[0]) if mean[0] else nan,
        "mean_accuracy": sum(mean[1]) / len(mean[1]) if mean[1] else nan,
        "overall_accuracy": sum(both for both, _, _ in rows) / total if total else nan,
        "fw_iou": sum(i * size / total for i, (_, _, size) in zip(iou, rows, strict=True) if size) if total else nan,
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), rtol=1e-12, err_msg=name)


@pytest.fixture(scope="module")
def metric():
    return metrics.load("mean_iou")


class TestMeanIoU:
    @given(
        pairs=pairs_of_maps(),
        num_labels=st.integers(1, 5),
        ignore_index=st.sampled_from([255, 0, 2]),
        label_map=st.sampled_from([None, {0: 1}, {1: 2, 2: 1}, {7: 3, 3: 255}]),
        reduce_labels=st.booleans(),
        nan_to_num=st.sampled_from([None, 0]),
    )
    @settings(max_examples=100, deadline=None)
    def test_against_sets_of_pixels(
        self, metric, pairs, num_labels, ignore_index, label_map, reduce_labels, nan_to_num
    ):
        found = metric.compute(
            predictions=[prediction for prediction, _ in pairs],
            references=[reference for _, reference in pairs],
            num_labels=num_labels,
            ignore_index=ignore_index,
            label_map=label_map,
            reduce_labels=reduce_labels,
            nan_to_num=nan_to_num,
        )
        expected = figures_by_hand(pairs, num_labels, ignore_index, label_map, reduce_labels)
        if nan_to_num is not None:
            expected = {name: np.nan_to_num(value, nan=nan_to_num) for name, value in expected.items()}
        assert_same(found, expected)

    def test_numbers_in_the_hubs_documentation(self, metric):
        predicted = [[[1, 2], [3, 4], [5, 255]], [[2, 7], [9, 2], [3, 6]], [[2, 2, 3], [8, 2, 4], [3, 255, 2]]]
        actual = [[[0, 3], [5, 4], [6, 255]], [[1, 7], [9, 2], [3, 6]], [[1, 2, 2], [8, 2, 1], [3, 255, 1]]]
        found = metric.compute(
            predictions=[np.array(values) for values in predicted],
            references=[np.array(values) for values in actual],
            num_labels=10,
            ignore_index=255,
            reduce_labels=False,
        )
        assert found["mean_iou"] == 0.47750000000000004
        assert found["mean_accuracy"] == 0.5916666666666666
        assert found["overall_accuracy"] == 0.5263157894736842
        assert found["per_category_iou"].tolist() == [0, 0, 0.375, 0.4, 0.5, 0, 0.5, 1, 1, 1]

    def test_wide_and_negative_values(self, metric):
        prediction = np.array([[0, 1, 3000, -1, 70000]])
        reference = np.array([[0, 1, 1, 1, 65535]])
        found = metric.compute(predictions=[prediction], references=[reference], num_labels=2, ignore_index=65535)
        assert found["per_category_iou"].tolist() == [1, 1 / 3]

    def test_map_by_map_and_kinds_of_maps(self, metric, tmp_path):
        prediction, reference = np.array([[0, 1], [1, 1]], np.uint8), np.array([[0, 0], [1, 255]], np.uint8)
        Image.fromarray(reference).save(tmp_path / "map.png")
        metric.add(prediction=prediction, reference=reference)
        metric.add(prediction=torch.from_numpy(prediction), reference=str(tmp_path / "map.png"))
        metric.add_batch(predictions=[prediction.tolist()], references=[Image.fromarray(reference)])
        assert len(metric) == 3
        found = metric.compute(num_labels=2, ignore_index=255)
        assert_same(found, figures_by_hand([(prediction, reference)] * 3, 2, 255))
        assert len(metric) == 0

    def test_memory_does_not_grow(self, metric):
        random = np.random.default_rng(0)

        def add(count):
            for _ in range(count):
                two = random.integers(0, 5, (2, 200, 200), dtype=np.uint8)
                metric.add(prediction=two[0], reference=two[1])

        add(2)
        tracemalloc.start()
        add(30)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        metric.compute(num_labels=5, ignore_index=255)
        assert grown < 20_000  # one map is 40,000

    def test_boundaries(self):
        random = np.random.default_rng(0)
        pairs = [tuple(random.integers(0, 4, (2, 8, 9))) for _ in range(3)]
        options = {"num_labels": 3, "ignore_index": 255, "reduce_labels": True}
        metric = metrics.load("mean_iou", boundary_radius=0.1, **options)
        found = metric.compute(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
        matrix = ConfusionMatrix(3, 255, 0.1)
        for prediction, reference in pairs:
            matrix.update(prediction, np.where(reference == 0, 255, reference - 1))
        assert_same(found, matrix.compute())
        metric.add(prediction=pairs[0][0], reference=pairs[0][1])
        with pytest.raises(ValueError, match="boundaries were found with"):
            metric.compute(num_labels=4)

    def test_bad_input(self, metric):
        small, large = np.zeros((2, 2), int), np.zeros((2, 3), int)
        for arguments, message in (
            ({"predictions": [small], "references": [large]}, "shape"),
            ({"predictions": [small], "references": []}, "Mismatch in the number"),
            ({"predictions": [small.astype(float)], "references": [small]}, "whole numbers"),
            ({"predictions": [small]}, "one of them is missing"),
            ({}, "no maps were added"),
        ):
            with pytest.raises(ValueError, match=message):
                metric.compute(num_labels=2, ignore_index=255, **arguments)
        with pytest.raises(ValueError, match="num_labels and ignore_index are needed"):
            metric.compute(predictions=[small], references=[small])
        with pytest.raises(ValueError, match="num_labels and ignore_index are needed"):
            metrics.load("mean_iou", boundary_radius=0.02)
        with pytest.raises(ValueError, match="unknown metric 'iou'; known are mean_iou"):
            metrics.load("iou")

    def test_needs_no_package(self, folder, run_python, tmp_path):
        """The folder alone is a metric: nothing of ours is importable where it runs."""
        code = f"""
            import sys
            sys.modules["arm_hf"] = None  # importing it is an error
            import evaluate
            metric = evaluate.load({str(folder)!r})
            maps = {{"predictions": [[[0, 1]]], "references": [[[0, 0]]]}}
            print(metric.compute(**maps, num_labels=2, ignore_index=255)["mean_iou"])
        """
        found = run_python(textwrap.dedent(code), path=None, env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
        assert float(found) == 0.25

    def test_class_is_an_evaluate_metric(self, metric):
        assert isinstance(metric, evaluate.Metric)
        assert "num_labels" in metric.inputs_description


def boundary_by_hand(mask, distance):
    """The mask without what `distance` erosions by a 3 x 3 square leave; outside of the image there is no mask."""
    left = mask.copy()
    for _ in range(distance):
        padded = np.pad(left, 1)
        left = np.array(
            [[padded[y : y + 3, x : x + 3].all() for x in range(mask.shape[1])] for y in range(mask.shape[0])]
        )
    return mask & ~left


class TestConfusionMatrix:
    @given(pairs=pairs_of_maps(), num_classes=st.integers(1, 5), ignore_index=st.sampled_from([255, 0]))
    @settings(max_examples=60, deadline=None)
    def test_against_sets_of_pixels(self, pairs, num_classes, ignore_index):
        matrix = ConfusionMatrix(num_classes, ignore_index)
        for prediction, reference in pairs:
            matrix.update(prediction, reference)
        assert_same(matrix.compute(), figures_by_hand(pairs, num_classes, ignore_index))

    @given(
        pairs=st.lists(
            st.tuples(st.integers(4, 12), st.integers(4, 12), st.integers(0, 2**31)), min_size=1, max_size=3
        ),
        radius=st.sampled_from([0.05, 0.15, 0.4]),
    )
    @settings(max_examples=40, deadline=None)
    def test_boundary_iou_against_erosion(self, pairs, radius):
        matrix = ConfusionMatrix(3, 255, boundary_radius=radius)
        both, union = np.zeros(3), np.zeros(3)
        for height, width, seed in pairs:
            random = np.random.default_rng(seed)
            # Blocks, so that there is more than edges; 3 is a label that is no class.
            blocks = random.choice([0, 1, 2, 3, 255], (2, 3, 3), p=[0.35, 0.3, 0.2, 0.05, 0.1])
            reference, prediction = (np.kron(block, np.ones((4, 4), int))[:height, :width] for block in blocks)
            matrix.update(prediction, reference)
            distance = max(1, round(radius * (reference.shape[0] ** 2 + reference.shape[1] ** 2) ** 0.5))
            for label in range(3):
                counted = reference != 255
                true = boundary_by_hand((reference == label) & counted, distance)
                predicted = boundary_by_hand((prediction == label) & counted, distance)
                both[label] += (true & predicted).sum()
                union[label] += (true | predicted).sum()
        with np.errstate(invalid="ignore"):
            expected = both / union
        found = matrix.compute()
        np.testing.assert_allclose(found["per_category_boundary_iou"], expected)
        np.testing.assert_allclose(found["boundary_iou"], np.nanmean(expected) if union.any() else np.nan)

    def test_boundary_iou_sees_what_iou_does_not(self):
        reference = np.zeros((100, 100), int)
        reference[20:80, 20:80] = 1
        prediction = np.zeros((100, 100), int)
        prediction[22:82, 22:82] = 1
        matrix = ConfusionMatrix(2, boundary_radius=0.02)
        matrix.update(prediction, reference)
        found = matrix.compute()
        assert found["boundary_iou"] < 0.6 < 0.9 < found["mean_iou"]

    def test_merge_and_state(self):
        random = np.random.default_rng(0)
        maps = random.integers(0, 3, (4, 2, 9, 7))
        whole, first, second = (ConfusionMatrix(3, 255, 0.1) for _ in range(3))
        for number, (prediction, reference) in enumerate(maps):
            whole.update(prediction, reference)
            (first if number < 2 else second).update(prediction, reference)
        restored = ConfusionMatrix.from_state(json.loads(json.dumps(first.state())))
        restored.merge(second)
        assert_same(restored.compute(), whole.compute())
        assert whole.matrix.shape == (3, 3) and whole.matrix.dtype == np.int64 and whole.matrix.sum() == 4 * 63

    def test_bad_input(self):
        matrix = ConfusionMatrix(2)
        with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 3\)"):
            matrix.update(np.zeros((2, 2), int), np.zeros((2, 3), int))
        with pytest.raises(ValueError, match="predictions must be whole numbers, got float64"):
            matrix.update(np.zeros((2, 2)), np.zeros((2, 2), int))
        with pytest.raises(ValueError, match="cannot add counts"):
            matrix.merge(ConfusionMatrix(3))
        with pytest.raises(ValueError, match="no state of a confusion matrix"):
            ConfusionMatrix.from_state({"num_classes": 2})
        with pytest.raises(ValueError, match="at least 1"):
            ConfusionMatrix(0)
        with pytest.raises(ValueError, match="share of the diagonal"):
            ConfusionMatrix(2, boundary_radius=15)

    def test_nothing_counted(self):
        found = ConfusionMatrix(2).compute()
        assert np.isnan(found["mean_iou"]) and np.isnan(found["overall_accuracy"]) and np.isnan(found["fw_iou"])


def test_two_processes(root, tmp_path):
    """Each counts its half; both get the sum, and the metric gives its figures to process 0."""
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys
        import numpy as np
        from accelerate import PartialState
        from arm_hf import metrics
        state = PartialState(cpu=True)
        maps = np.random.default_rng(0).integers(0, 3, (5, 2, 9, 7))
        matrix = metrics.ConfusionMatrix(3, 255, 0.1)
        metric = metrics.load(
            "mean_iou", num_process=2, process_id=state.process_index, experiment_id="two", num_labels=3,
            ignore_index=255, boundary_radius=0.1, cache_dir=sys.argv[1],
        )
        for prediction, reference in maps[state.process_index :: 2]:
            matrix.update(prediction, reference)
            metric.add(prediction=prediction, reference=reference)
        total, figures = matrix.reduce(), metric.compute()
        figures = figures and {name: np.asarray(value).tolist() for name, value in figures.items()}
        with open(f"{sys.argv[1]}/{state.process_index}.json", "w") as file:
            json.dump({"total": total.state(), "figures": figures}, file)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    whole = ConfusionMatrix(3, 255, 0.1)
    for prediction, reference in np.random.default_rng(0).integers(0, 3, (5, 2, 9, 7)):
        whole.update(prediction, reference)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first["total"] == second["total"] == whole.state()
    assert_same(first["figures"], whole.compute())
    assert second["figures"] is None
