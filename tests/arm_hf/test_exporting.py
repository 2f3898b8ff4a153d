"""Exported graphs give what torch gives, for sizes that were not traced, and run without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, pipeline

from arm_hf.data import open_data
from arm_hf.export_quality import compare_weights, save_quality
from arm_hf.exporting import ImageGraph, TraceableTower, checked_inputs, export_onnx, export_torch, quantise
from arm_hf.folders import new_folder
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.trunk import VisionTower
from arm_hf.onnx_runner import OnnxSegmenter, parse_labels, resize

LABELS = {"cat": ["cat"], "dog": ["dog", "puppy"], "sky": ["sky"]}


@pytest.fixture
def small_clip(tiny_clip_config):
    """Three blocks: tracing takes time by the block."""
    vision = {**tiny_clip_config.vision_config.to_dict(), "num_hidden_layers": 3}
    text = {**tiny_clip_config.text_config.to_dict(), "num_hidden_layers": 1}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(projection_dim=64, vision_config=vision, text_config=text)).eval()


@pytest.fixture
def pipe(small_clip, tiny_tokenizer, tiny_image_processor):
    model = ARMModel.from_clip(small_clip, fusion_layers=(1, 2), num_scale_blocks=1, coarse_form="logits").eval()
    return pipeline(
        "open-vocab-segmentation", model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor
    )


@pytest.mark.parametrize("rule", ["reference", "bilinear", "transformers"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (1, 3), (9, 7)])
def test_the_traceable_position_table_is_the_same(small_clip, rule, grid):
    with torch.no_grad():
        expected = VisionTower(small_clip).position_table(grid, rule)
        found = TraceableTower(small_clip).position_table(grid, rule)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["clearclip", "naclip", "sclip", "clip_surgery"])
@pytest.mark.parametrize("use_arm", [True, False])
def test_the_graph_computes_what_the_model_computes(pipe, method, use_arm):
    graph = ImageGraph(pipe.model, method, use_arm=use_arm)
    for pixels, words in checked_inputs(graph):
        with torch.no_grad():
            expected = pipe.model.query_maps(pixels, words, method, use_arm=use_arm)
            torch.testing.assert_close(graph(pixels, words), expected.chunk(), atol=1e-5, rtol=1e-4)
    assert (graph.activation, graph.scale) == (expected.activation, pytest.approx(expected.scale))


def test_what_cannot_be_exported_is_refused(pipe):
    with pytest.raises(ValueError, match="background rule of 'cliper'"):
        ImageGraph(pipe.model, "cliper", {"background_threshold": 0.5}, use_arm=False)
    with pytest.raises(ValueError, match="position rule 'antialias' cannot be exported"):
        ImageGraph(pipe.model, "gem")


def test_the_runners_resize_is_that_of_torch():
    maps = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for size in ((5, 7), (20, 9), (3, 30), (2, 2), (1, 1)):
        expected = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
        np.testing.assert_allclose(resize(maps.numpy(), size), expected.numpy(), atol=1e-6)


def test_the_runners_labels():
    assert parse_labels(" cat, dog=puppy | hound ,sky") == {
        "cat": ["cat"],
        "dog": ["dog", "puppy", "hound"],
        "sky": ["sky"],
    }
    for text in ("cat,,dog", "cat,cat"):
        with pytest.raises(SystemExit, match="name of its own"):
            parse_labels(text)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("whole")
    assert (tmp_path / "a" / "b" / "x").read_text() == "whole"
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "a" / "b"):
        pass


@pytest.mark.slow
def test_torch_export(pipe, tmp_path):
    written = export_torch(tmp_path, ImageGraph(pipe.model), pipe.model.clip)
    assert [each.path.name for each in written] == ["image.pt2", "text.pt2"]
    assert all(each.difference < 1e-4 for each in written)


def check_quality(folder, runner, photo):
    """Labels that are what 32 bits predict: all of them right there, and with 8 bits as many as agree."""
    data = folder / "data"
    words = ["cat", "sky"]
    found = runner(photo, {word: [word] for word in words}).labels
    for part, image in (("images", photo), ("labels", Image.fromarray(found.astype(np.uint8)))):
        (data / part).mkdir(parents=True)
        image.save(data / part / "a.png")
    (data / "classes.json").write_text(json.dumps({"classes": words}))
    (data / "val.txt").write_text("a\n")
    opened = open_data(data)
    record = json.loads(save_quality(folder, opened, compare_weights(folder, opened, threads=1)).read_text())
    exact, coarse = record["weights"]["float32"], record["weights"]["int8"]
    assert (record["images"], exact["mean_iou"], exact["agreement"]) == (1, 100, 1)
    assert 0.8 < coarse["agreement"] <= 1 and coarse["image_graph_bytes"] < 0.5 * exact["image_graph_bytes"]


@pytest.mark.slow
def test_onnx_and_its_runner_without_torch(pipe, tmp_path, photo):
    pytest.importorskip("onnxscript")
    graph = ImageGraph(pipe.model)
    written = export_onnx(pipe, tmp_path, graph, ("a photo of a {}.", "the {}"))
    assert [each.path.name for each in written] == ["image.onnx", "text.onnx"]
    assert all(each.difference < 1e-4 for each in written)

    runner = OnnxSegmenter(tmp_path, threads=1)
    words = [word for synonyms in LABELS.values() for word in synonyms]
    expected = pipe.text_encoder.class_embeddings(words, ("a photo of a {}.", "the {}")).numpy()
    np.testing.assert_allclose(runner.class_embeddings(words), expected, atol=1e-4)
    for size in ((160, 120), (97, 151), (60, 500)):
        picture = photo.resize(size)
        found = runner(picture, LABELS)
        reference = pipe(picture, LABELS, templates=["a photo of a {}.", "the {}"], semantic=True)
        assert found.labels.shape == reference["semantic_map"].shape
        # The pipeline resizes pictures with torchvision, the runner with Pillow.
        assert (found.labels == reference["semantic_map"]).mean() > 0.97
        assert np.abs(found.confidence - reference["confidence"]).mean() < 0.02

    small = quantise(tmp_path)
    assert [each.path.name for each in small] == ["image.int8.onnx", "text.int8.onnx"]
    assert small[0].num_bytes < 0.5 * written[0].num_bytes
    coarse = OnnxSegmenter(tmp_path, int8=True, threads=1)(photo, LABELS)
    assert (coarse.labels == runner(photo, LABELS).labels).mean() > 0.8

    check_quality(tmp_path, runner, photo)

    photo.save(tmp_path / "photo.png")
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "arm_hf"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
sys.argv = ["run.py", "photo.png", "cat, dog=puppy, sky"]
import runpy
runpy.run_path("run.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "label map: labels.png"
    with Image.open(tmp_path / "labels.png") as image:
        assert image.size == photo.size
        assert (np.asarray(image) == runner(photo, LABELS).labels).mean() > 0.999
    assert json.loads((tmp_path / "export.json").read_text())["activation"] == "softmax"
