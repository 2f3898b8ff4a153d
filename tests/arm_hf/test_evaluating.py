"""Evaluation: shared passes, counts, resuming after a kill, several processes, and the files that are written."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from arm_hf import ARMModel, OpenVocabSegmentationPipeline
from arm_hf.cli import app
from arm_hf.data import open_data
from arm_hf.evaluating import evaluate_data
from arm_hf.evaluation_pictures import choose
from arm_hf.evaluation_plan import EvaluationOptions, make_plan
from arm_hf.label_sets import load_label_set
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.method import list_methods
from arm_hf.modeling.prompts import SINGLE_TEMPLATE, TEMPLATE_SETS
from arm_hf.partial_results import PartialResults, Tally
from arm_hf.protocols import InputRule, MethodSetup, load_protocol
from arm_hf.resizing import to_pixel_values
from arm_hf.shared_pass import Row, SharedPass, drop_small_classes

CLASSES = ["background", "cat", "grass", "sky"]


def write_data(folder, count, classes=CLASSES, background=0, size=(96, 64)):
    """A labelled folder of drawn scenes; label 255 at the border of each."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        labels = rng.integers(0, len(classes), (4, 6)).repeat(size[1] // 4, 0).repeat(size[0] // 6, 1)
        noise = rng.integers(0, 60, (*labels.shape, 3))
        colors = np.random.default_rng(1).integers(0, 190, (len(classes), 3))
        Image.fromarray((colors[labels] + noise).astype(np.uint8)).save(folder / "images" / f"{number:03}.png")
        labels[:2] = 255
        Image.fromarray(labels.astype(np.uint8)).save(folder / "labels" / f"{number:03}.png")
    (folder / "val.txt").write_text("".join(f"{number:03}\n" for number in range(count)))
    record = {"classes": classes, "background_index": background, "ignore_index": 255}
    (folder / "classes.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def pipe(tiny_clip, tiny_tokenizer, tiny_image_processor):
    torch.manual_seed(0)
    model = ARMModel.from_clip(tiny_clip, fusion_layers=(2, 5), templates="single").eval()
    return OpenVocabSegmentationPipeline(model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor)


@pytest.fixture
def model_folder(tmp_path, pipe):
    pipe.model.save_pretrained(tmp_path / "model", self_contained=True)
    pipe.tokenizer.save_pretrained(tmp_path / "model")
    pipe.image_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def setup_of(protocol, method, **arguments):
    """A protocol's setup at a quarter of its sizes, with one template in place of 80: quick on a processor."""
    setup = load_protocol(protocol).setup(method, **arguments)
    sizes = {
        name: value // 4
        for name in ("short_side", "window", "stride")
        if (value := getattr(setup.input, name)) is not None
    }
    return dataclasses.replace(setup, templates="single", input=dataclasses.replace(setup.input, **sizes))


def invoke(*words):
    return CliRunner().invoke(app, ["evaluate", "--device", "cpu", *map(str, words)])


def numbers(folder):
    """All figures that must not depend on how the work was divided, from results.json and images.csv."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["results"]:
        del row["seconds_per_image"]
    return results["results"], (folder / "images.csv").read_text()


def test_windows_and_arm_give_what_the_model_gives_alone(pipe, photo):
    labels = load_label_set("voc21")
    rule = InputRule(48, 2048, "opencv-bilinear", "pixel", 32, 16, "pad")
    setups = [
        MethodSetup("sclip", rule, labels, 0, threshold=0.01, templates="single"),
        MethodSetup("maskclip", rule, labels, 0, threshold=0.0477, arm_threshold=0.5, templates="single"),
    ]
    rows = [Row(setup, arm) for setup in setups for arm in (False, True)]
    found = SharedPass(pipe, rows, window_batch_size=4)(photo)
    assert found.passes == 1
    pixels = to_pixel_values(
        photo,
        pipe.image_processor,
        interpolation="opencv-bilinear",
        short_side=48,
        long_side=None,
        rounding="pixel",
        patch_size=16,
    )[None]
    vocabulary = setups[0].vocabulary()
    words = pipe.text_encoder.class_embeddings(vocabulary.queries, "single")
    for row in rows:
        threshold = row.setup.arm_threshold if row.arm else row.setup.threshold
        alone = pipe.model.segment(
            pixels,
            words,
            method=row.setup.method,
            method_options=row.options,
            use_arm=row.arm,
            class_of_query=vocabulary.class_of_query,
            sizes=[(photo.height, photo.width)],
            window=32,
            stride=16,
            threshold=threshold,
            background_index=0,
        )[0]
        np.testing.assert_array_equal(found.labels[row.name], alone.labels.numpy(), err_msg=row.name)
    assert all(len(np.unique(labels)) > 1 for labels in found.labels.values())


def test_pamr_runs_only_when_asked_for_and_not_with_arm(tmp_path, pipe, photo):
    data = open_data(write_data(tmp_path / "data", 1))
    plans = [
        make_plan(pipe, data, ["naclip", "clip"], EvaluationOptions(arm="both", pamr=pamr)) for pamr in (False, True)
    ]
    assert all(row.pamr is None for plan in plans for row in plan.rows)  # "plain" knows no method's own PAMR
    assert setup_of("voc21", "naclip").pamr == 10
    setup = dataclasses.replace(setup_of("voc21", "naclip"), method="maskclip", threshold=None)
    found = [SharedPass(pipe, [Row(setup, pamr=rounds)])(photo).labels["maskclip"] for rounds in (None, 10)]
    assert (found[0] != found[1]).any()
    pixels = to_pixel_values(
        photo,
        pipe.image_processor,
        interpolation="opencv-bilinear",
        short_side=84,
        long_side=None,
        rounding="pixel",
        patch_size=16,
    )[None]
    vocabulary = setup.vocabulary()
    words = pipe.text_encoder.class_embeddings(vocabulary.queries, "single")
    alone = DenseCLIP(pipe.model.clip, "drop").segment(
        pixels,
        words,
        method="maskclip",
        method_options={"logit_scale": 40.0},
        class_of_query=vocabulary.class_of_query,
        sizes=[(photo.height, photo.width)],
        background_index=0,
        pamr=10,
    )[0]
    np.testing.assert_array_equal(found[1], alone.labels.numpy())


def test_methods_that_see_the_same_share_one_pass(pipe, photo):
    calls = []
    block = pipe.model.clip.vision_model.encoder.layers[3].layer_norm2
    block.register_forward_hook(lambda *_: calls.append(1))
    methods = ("clip", "sclip", "clearclip", "naclip")
    for common, passes in ((True, 1), (False, 3)):
        rows = [Row(setup_of("voc21", method, common_input=common), arm) for method in methods for arm in (False, True)]
        shared_pass = SharedPass(pipe, rows, window_batch_size=64)
        calls.clear()
        found = shared_pass(photo)
        assert len(calls) == found.passes == shared_pass.num_passes == passes
        assert all(labels.shape == (120, 160) for labels in found.labels.values())


def test_memory_of_the_decision_does_not_change_it(pipe, photo):
    rows = [Row(setup_of("ade150", "clearclip", common_input=True), arm) for arm in (False, True)]
    whole, chunked = (SharedPass(pipe, rows, max_chunk_values=values)(photo).labels for values in (2**24, 2**17))
    for name in whole:
        np.testing.assert_array_equal(whole[name], chunked[name])


def test_a_background_that_is_no_class_counts_as_wrong(pipe, photo):
    rows = [Row(setup_of("voc20", "cliper"), arm) for arm in (False, True)]
    found = SharedPass(pipe, rows)(photo).labels
    assert found["cliper"].min() >= -1 and found["cliper"].max() <= 19
    assert found["cliper + ARM"].min() >= 0  # ARM chooses among the classes
    nothing = dataclasses.replace(rows[0].setup, options={"background_threshold": 2.5})
    assert (SharedPass(pipe, [Row(nothing)])(photo).labels["cliper"] == -1).all()


def test_small_classes_leave_as_in_sclip():
    rng = np.random.default_rng(0)
    scores = rng.random((5, 20, 20)).astype(np.float32)
    scores[3] *= 0.4  # rarely wins
    first = scores.argmax(0)
    counts = np.bincount(first.ravel(), minlength=5)
    small = [index for index in range(1, 5) if counts[index] <= 0.1 * counts[1:].sum()]
    assert 3 in small
    expected = scores.copy()
    expected[small] = 0
    labels = np.where(expected.max(0) < 0.7, 0, expected.argmax(0))
    found = drop_small_classes(torch.from_numpy(scores), torch.from_numpy(first), 0.1, 0, 0.7)
    np.testing.assert_array_equal(found.numpy(), labels)


def test_the_figures_are_those_of_the_label_maps(tmp_path, pipe):
    data = open_data(write_data(tmp_path / "data", 5))
    options = EvaluationOptions(arm="both", limit=4)
    plan = make_plan(pipe, data, ["sclip"], options)
    kept = {}
    evaluation = evaluate_data(
        pipe, data, plan, options, tmp_path / "out", "m", keep_maps=lambda index, labels: kept.update({index: labels})
    )
    assert sorted(evaluation.tally.images) == sorted(kept) == [0, 1, 2, 3]
    for row in plan.rows:
        inside, union = np.zeros(4), np.zeros(4)
        for index in kept:
            truth = np.asarray(Image.open(tmp_path / "data" / "labels" / f"{index:03}.png"))
            for label in range(4):
                a, b = truth == label, (kept[index][row.name] == label) & (truth != 255)
                inside[label] += (a & b).sum()
                union[label] += (a | b).sum()
        figures = evaluation.tally.matrices[row.name].compute()
        np.testing.assert_allclose(figures["per_category_iou"], inside / union, rtol=1e-12)


def test_the_command_writes_everything(tmp_path, model_folder):
    data, out = write_data(tmp_path / "data", 4), tmp_path / "out"
    run = invoke("--data", data, "--methods", "sclip,cliper", "--arm", model_folder, "--out", out, "--pictures", 1)
    assert run.exit_code == 0, run.output
    assert not (out / ".partial").exists()
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert [row["name"] for row in results["results"]] == ["sclip", "sclip + ARM", "cliper", "cliper + ARM"]
    assert results["data"]["images"] == 4 and results["model"]["name"] == "model" and results["versions"]["torch"]
    assert results["protocol"]["methods"]["sclip"]["options"]["logit_scale"] == 40.0
    assert results["protocol"]["methods"]["sclip"]["source"]
    for row in results["results"]:
        assert 0 <= row["mean_iou"] <= 100 and 0 <= row["boundary_iou"] <= 100
        assert row["seconds_per_image"]["trunk"] > 0 and row["per_class"]["cat"]["pixels"] > 0
    text = (out / "results.md").read_text()
    assert "| sclip + ARM |" in text and "what ARM adds" in text and "Protocol `plain`" in text
    with open(out / "images.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 5
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert len(pictures) == 2 and pictures[0].startswith("best_1_") and pictures[1].startswith("worst_1_")

    again = invoke("--data", data, "--methods", "sclip", "--model", model_folder, "--out", out)
    assert again.exit_code == 2 and "--overwrite" in again.output
    replaced = invoke(
        "--data", data, "--methods", "sclip", "--arm", "off", "--model", model_folder, "--out", out, "--overwrite",
        "--pictures", 0, "--limit", 2, "--boundary", 0,
    )  # fmt: skip
    assert replaced.exit_code == 0, replaced.output
    rows = json.loads((out / "results.json").read_text())["results"]
    assert [row["name"] for row in rows] == ["sclip"] and "boundary_iou" not in rows[0]
    assert not list((out / "pictures").iterdir())


def test_a_protocol_reads_the_labels_and_stands_beside_the_papers_numbers(tmp_path, model_folder):
    names = [label.name for label in load_label_set("voc21")]
    data, out = write_data(tmp_path / "data", 2, names), tmp_path / "out"
    given = ["--data", data, "--model", model_folder, "--pictures", 0, "--window", 0, "--size", 64]
    run = invoke(*given, "--protocol", "voc20", "--methods", "clearclip", "--out", out)
    assert run.exit_code == 0, run.output
    results = json.loads((out / "results.json").read_text())
    assert "background" not in results["protocol"]["classes"] and "ignored" in results["data"]["labels"]
    published = {row["name"]: [entry["miou"] for entry in row["published"]] for row in results["results"]}
    assert published == {"clearclip": [80.9], "clearclip + ARM": [89.3]}
    assert "89.3 (B/16, ARM paper, Table 1" in (out / "results.md").read_text()
    wrong = invoke(*given, "--protocol", "ade150", "--methods", "clearclip", "--out", tmp_path / "other")
    assert wrong.exit_code == 2 and "150 classes" in wrong.output


def test_a_standard_tree_is_read_in_the_protocols_layout(tmp_path, model_folder):
    plain = write_data(tmp_path / "plain", 2, [str(number) for number in range(21)])
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for part, source in (("JPEGImages", "images"), ("SegmentationClass", "labels")):
        (root / part).mkdir(parents=True)
        for path in (plain / source).iterdir():
            with Image.open(path) as image:
                image.save(root / part / path.with_suffix(".jpg" if source == "images" else ".png").name)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("000\n001\n")
    for protocol in ("voc20", "voc21"):
        out = tmp_path / protocol
        words = ["--data", root.parent, "--protocol", protocol, "--methods", "clearclip", "--arm", "off", "--window", 0]
        run = invoke(*words, "--size", 64, "--model", model_folder, "--pictures", 0, "--out", out)
        assert run.exit_code == 0, run.output
        assert len(json.loads((out / "results.json").read_text())["results"][0]["per_class"]) == int(protocol[3:])


@pytest.fixture
def large_trees(tmp_path):
    """PASCAL Context with its 459 classes, and ADE20K with 847, two images each."""
    savemat = pytest.importorskip("scipy.io").savemat
    context, ade = tmp_path / "VOCdevkit" / "VOC2010", tmp_path / "ADE20K_2021_17_01"
    folders = [context / "JPEGImages", context / "trainval"]
    folders += [ade / f"{kind}_detectron2" / "validation" for kind in ("images", "annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        image = Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
        labels = rng.integers(1, 459, (4, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint16)
        labels[:16, :16] = 459
        image.save(folders[0] / f"{number}.jpg")
        savemat(folders[1] / f"{number}.mat", {"LabelMap": labels})
        image.save(folders[2] / f"{number}.jpg")
        labels[:16, :32] = [846] * 16 + [65535] * 16
        Image.fromarray(labels).save(folders[3] / f"{number}.tif")
    (context / "val.txt").write_text("0\n1\n")
    (context / "labels.txt").write_text("".join(f"{number}: thing {number}\n" for number in range(1, 460)))
    return {"context459": context.parent, "ade847": ade.parent}


@pytest.mark.parametrize(("protocol", "last"), [("context459", "thing 459"), ("ade847", "adding machine, ")])
def test_large_vocabularies_are_read_in_their_own_layout(
    protocol, last, tmp_path, large_trees, model_folder, monkeypatch
):
    monkeypatch.setitem(TEMPLATE_SETS, "imagenet80", SINGLE_TEMPLATE)  # 80 sentences a word are not the point
    out = tmp_path / "out"
    run = invoke(
        "--data", large_trees[protocol], "--protocol", protocol, "--methods", "clearclip", "--model", model_folder,
        "--window", 0, "--size", 64, "--pictures", 1, "--out", out,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    results = json.loads((out / "results.json").read_text())
    classes = results["protocol"]["classes"]
    assert len(classes) == int(protocol[-3:]) and classes[-1].startswith(last)
    assert len(results["protocol"]["methods"]["clearclip"]["label_words"]) == len(classes)
    pixels = [row["pixels"] for row in results["results"][0]["per_class"].values()]
    assert len(pixels) == len(classes) and pixels[-1] == 2 * 16 * 16
    assert sum(pixels) == 2 * (64 * 96 - 16 * 16 * (protocol == "ade847"))  # ADE's map has ignored pixels


def test_all_methods_are_evaluated_or_left_out_with_the_reason(tmp_path, model_folder):
    data, out = write_data(tmp_path / "data", 1), tmp_path / "out"
    run = invoke("--data", data, "--methods", "all", "--model", model_folder, "--pictures", 0, "--out", out)
    assert run.exit_code == 0, run.output
    results = json.loads((out / "results.json").read_text())
    evaluated = {row["method"] for row in results["results"]}
    assert evaluated | set(results["left_out"]) == set(list_methods()) and len(evaluated) >= 10
    assert all("outside" in reason for reason in results["left_out"].values())
    assert "Left out: proxyclip" in (out / "results.md").read_text()


def test_settings_can_be_changed_and_say_so(tmp_path, model_folder):
    data = write_data(tmp_path / "data", 1)
    words = ["--data", data, "--methods", "naclip,clip", "--arm", "off", "--model", model_folder, "--pictures", 0]
    run = invoke(*words, "--method-option", "naclip.gaussian_std=2.5", "--out", tmp_path / "out")
    assert run.exit_code == 0, run.output
    setup = json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]["methods"]["naclip"]
    assert setup["options"]["gaussian_std"] == 2.5 and "gaussian_std" in setup["notes"][-1]


def test_wrong_requests_are_one_clear_line(tmp_path, tiny_clip_folder, model_folder):
    data = write_data(tmp_path / "data", 2)
    base = ["--data", data, "--out", tmp_path / "out", "--model", tiny_clip_folder]
    for words, expected in (
        (["--arm", "on"], "without ARM"),
        (["--methods", "sclop"], "Did you mean 'sclip'"),
        (["--methods", "proxyclip"], "outside"),
        (["--protocol", "voc"], "did you mean"),
        (["--split", "test"], "test.txt"),
        (["--limit", 0], "limit"),
        (["--stride", 8], "window"),
        (["--resize", "cubic"], "resize"),
        (["--resize", "pil-bicubic"], "--size"),
        (["--threshold", 1.5], "threshold"),
        (["--metric", "hub"], "--metric ours"),
        (["--labels-from", "voc21"], "21 labels"),
        (["--method-option", "naclip.gaussian_std=3"], "naclip"),
        (["--method-option", "clearclip.width=3"], "width"),
        (["--method-option", "width=3"], "method.key=value"),
        (["--arm", model_folder], "two models"),
    ):
        run = invoke(*base, *words)
        assert run.exit_code == 2 and expected in run.output, (words, run.output)
        assert not (tmp_path / "out" / "results.json").exists()


def test_a_broken_label_map_stops_with_its_name_and_loses_nothing(tmp_path, model_folder):
    data, out = write_data(tmp_path / "data", 6), tmp_path / "out"
    good = (data / "labels" / "004.png").read_bytes()
    Image.fromarray(np.full((64, 96), 77, np.uint8)).save(data / "labels" / "004.png")
    words = [
        "--data",
        data,
        "--methods",
        "clip",
        "--arm",
        "off",
        "--model",
        model_folder,
        "--out",
        out,
        "--pictures",
        0,
    ]
    run = invoke(*words)
    assert run.exit_code == 2 and "004.png" in run.output and "77" in run.output
    other = invoke(*words, "--limit", 5)
    assert other.exit_code == 2 and "data.limit" in other.output and "--overwrite" in other.output
    (data / "labels" / "004.png").write_bytes(good)
    run = invoke(*words)
    assert run.exit_code == 0 and "going on: 4 images" in run.output
    assert invoke(*words[:-2], "--pictures", 0, "--overwrite", "--out", tmp_path / "fresh").exit_code == 0
    assert numbers(out) == numbers(tmp_path / "fresh")


def test_a_damaged_or_doubled_state_is_named(tmp_path):
    empty = lambda: Tally.empty(["a"], 3, 255, None)  # noqa: E731
    partial = PartialResults(tmp_path, {"model": 1})
    tally = partial.begin(empty())
    tally.images[0] = {"name": "x"}
    tally.matrices["a"].update(np.array([[0, 1]]), np.array([[0, 2]]))
    partial.save(tally)
    again = PartialResults(tmp_path, {"model": 1}).begin(empty())
    assert again.images == tally.images
    np.testing.assert_array_equal(again.matrices["a"].counts, tally.matrices["a"].counts)
    with pytest.raises(ValueError, match="model"):
        PartialResults(tmp_path, {"model": 2}).begin(empty())
    state = next((tmp_path / ".partial").glob("*.npz"))
    (state.parent / "copy.npz").write_bytes(state.read_bytes())
    with pytest.raises(ValueError, match="counted twice"):
        PartialResults(tmp_path, {"model": 1}).begin(empty())
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{state.name}.*remove it"):
        PartialResults(tmp_path, {"model": 1}).begin(empty())
    assert PartialResults(tmp_path, {"model": 2}).begin(empty(), discard=True).images == {}


METRIC = '''
import datasets
import evaluate
import numpy as np

class Counted(evaluate.Metric):
    """Counts."""

    def _info(self):
        image = datasets.Image()
        features = datasets.Features({"predictions": image, "references": image})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index):
        inside, union = np.zeros(num_labels), np.zeros(num_labels)
        for found, truth in zip(predictions, references):
            found, truth = np.array(found), np.array(truth)
            for label in range(num_labels):
                a, b = truth == label, (found == label) & (truth != ignore_index)
                inside[label] += (a & b).sum(); union[label] += (a | b).sum()
        return {"mean_iou": float((inside / union).mean())}
'''


def test_a_metric_of_evaluate_gives_the_same_number(tmp_path, model_folder):
    (tmp_path / "counted").mkdir()
    (tmp_path / "counted" / "counted.py").write_text(METRIC)
    data, out = write_data(tmp_path / "data", 3), tmp_path / "out"
    words = [
        "--data",
        data,
        "--methods",
        "clip",
        "--arm",
        "both",
        "--model",
        model_folder,
        "--out",
        out,
        "--pictures",
        0,
    ]
    run = invoke(*words, "--metric", tmp_path / "counted")
    assert run.exit_code == 0, run.output
    for row in json.loads((out / "results.json").read_text())["results"]:
        assert row["metric"]["mean_iou"] == pytest.approx(row["mean_iou"], abs=1e-3)
    assert "mIoU (evaluate)" in (out / "results.md").read_text()


def test_a_streamed_data_set_gives_the_same_numbers(tmp_path, pipe):
    folder = write_data(tmp_path / "data", 5)
    options = EvaluationOptions(limit=4)
    counts = []
    for streaming in (False, True):
        data = open_data(folder, streaming=streaming)
        plan = make_plan(pipe, data, ["clip"], options)
        counts.append(
            evaluate_data(pipe, data, plan, options, tmp_path / str(streaming), "m").tally.matrices["clip"].counts
        )
    np.testing.assert_array_equal(*counts)


def test_worst_and_best_are_apart(tmp_path, pipe):
    data = open_data(write_data(tmp_path / "data", 5))
    options = EvaluationOptions()
    evaluation = evaluate_data(pipe, data, make_plan(pipe, data, ["clip"], options), options, tmp_path / "out", "m")
    chosen = choose(evaluation, 3)
    assert len(chosen["worst"]) == len(chosen["best"]) == 2 and not set(chosen["worst"]) & set(chosen["best"])
    scores = {index: record["miou"]["clip"] for index, record in evaluation.tally.images.items()}
    assert scores[chosen["worst"][0]] == min(scores.values()) and scores[chosen["best"][0]] == max(scores.values())


def start(root, words, launcher=()):
    """The command in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, *launcher, "-m", "arm_hf.cli", "evaluate", *map(str, words)]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(tmp_path, root, model_folder):
    data, out = write_data(tmp_path / "data", 120), tmp_path / "out"
    words = ["--data", data, "--methods", "clip,resclip,cliper", "--model", model_folder, "--pictures", 0]
    words += ["--save-every", 1]
    process = start(root, [*words, "--out", out])
    deadline = time.monotonic() + 240
    while not list(out.glob(".partial/*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(out.glob(".partial/*.npz")) and not (out / "results.json").exists()

    run = invoke(*words, "--out", out)
    assert run.exit_code == 0 and "going on: " in run.output
    before = int(run.output.partition("going on: ")[2].split()[0])
    assert 1 <= before < 120
    assert invoke(*words, "--out", tmp_path / "fresh").exit_code == 0
    assert numbers(out) == numbers(tmp_path / "fresh")


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, root, model_folder):
    data, out = write_data(tmp_path / "data", 7), tmp_path / "out"
    words = ["--data", data, "--methods", "sclip,cliper", "--model", model_folder, "--pictures", 1, "--device", "cpu"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output, _ = start(root, [*words, "--out", out], launcher).communicate(timeout=500)
    assert (out / "results.json").exists(), output
    assert json.loads((out / "results.json").read_text())["processes"] == 2
    assert invoke(*words, "--out", tmp_path / "one").exit_code == 0
    assert numbers(out) == numbers(tmp_path / "one")


@pytest.mark.slow
def test_one_process_finishes_what_two_began(tmp_path, root, model_folder):
    data, out = write_data(tmp_path / "data", 8), tmp_path / "out"
    good = (data / "labels" / "006.png").read_bytes()
    (data / "labels" / "006.png").write_bytes(good[:40])
    words = ["--data", data, "--methods", "clip", "--model", model_folder, "--pictures", 0, "--device", "cpu"]
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    process = start(root, [*words, "--save-every", 1, "--out", out], launcher)
    output, _ = process.communicate(timeout=500)
    assert process.returncode != 0 and "006.png" in output and not (out / "results.json").exists()
    (data / "labels" / "006.png").write_bytes(good)
    run = invoke(*words, "--out", out)
    assert run.exit_code == 0 and "going on: " in run.output, output
    assert invoke(*words, "--out", tmp_path / "one").exit_code == 0
    assert numbers(out) == numbers(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "protocol"),
    [
        ("voc2012", "voc20"),
        ("voc2012", "voc21"),
        ("coco_object", "coco_object"),
        ("coco_stuff171", "coco_object"),
        ("coco_stuff171", "coco_stuff171"),
        ("ade20k150", "ade150"),
        ("msrc", "plain"),
        ("camvid", "plain"),
    ],
)
def test_the_labelled_folders_evaluate_as_they_are(tmp_path, shared, model_folder, folder, protocol):
    words = ["--data", shared / "data" / folder, "--protocol", protocol, "--methods", "clearclip,cliper", "--limit", 2]
    run = invoke(*words, "--model", model_folder, "--out", tmp_path / "out", "--pictures", 0, "--common-input")
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"]["misnamed"] in (
        [],
        ["television / televisionreceiver"],
    )


@pytest.mark.slow
def test_the_numbers_are_those_of_the_mini_recipes_own_evaluation(tmp_path, shared):
    pytest.importorskip("cv2")
    from arm_hf import resolve_model
    from arm_hf.segmenting import load_pipeline
    from arm_hf.training.mini.data import read_list
    from arm_hf.training.mini.evaluate import Evaluator, Task

    pipe = load_pipeline(resolve_model("arm-clip-mini"), device="cpu")
    evaluator = Evaluator(
        pipe.model, pipe.tokenizer, pipe.image_processor, shared / "data", pipe.model.config.templates
    )
    every = len(read_list(shared / "data", "msrc", "val")) // 3
    theirs = evaluator.run([Task("msrc", "msrc")], every=every)["msrc"]
    data = open_data(shared / "data" / "msrc")
    data = data.select(range(0, len(data), every))
    options = EvaluationOptions(arm="both")
    evaluation = evaluate_data(
        pipe, data, make_plan(pipe, data, ["clearclip"], options), options, tmp_path / "out", "mini"
    )
    for name, strength in (("clearclip", 0.0), ("clearclip + ARM", 1.0)):
        confusion, _ = theirs[strength]
        assert confusion.images == len(evaluation.tally.images)
        differing = np.abs(confusion.matrix - evaluation.tally.matrices[name].matrix).sum() / 2
        assert differing <= 1e-4 * confusion.matrix.sum()


def test_dense_clip_is_left_as_it_was(pipe, photo):
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    SharedPass(pipe, [Row(setup_of("voc21", "sclip"), arm) for arm in (False, True)])(photo)
    assert all(torch.equal(before[name], value) for name, value in pipe.model.state_dict().items())
    assert isinstance(pipe.model.dense, DenseCLIP) and pipe.model.dense.odd_sizes == "pad"
