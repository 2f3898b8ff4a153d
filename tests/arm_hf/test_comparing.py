"""Several methods on one photo: one shared pass, one picture, and methods from outside the package."""

import copy

import numpy as np
import pytest
from typer.testing import CliRunner

from arm_hf import ARMModel, OpenVocabSegmentationPipeline, register_method
from arm_hf.cli import app
from arm_hf.comparing import compare, grid, parse_methods
from arm_hf.modeling import method as method_module
from arm_hf.modeling.images import load_image


@pytest.fixture
def pipe(tiny_clip, tiny_tokenizer, tiny_image_processor):
    model = ARMModel.from_clip(tiny_clip, fusion_layers=(2, 5)).eval()
    return OpenVocabSegmentationPipeline(model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor)


@pytest.fixture
def toy(monkeypatch):
    """A method that is registered from outside the package, and gone after the test."""
    monkeypatch.setattr(method_module, "_METHODS", copy.copy(method_module._METHODS))

    @register_method("toy", paper="none", summary="the input of the last block, projected")
    def project_only(context, settings):
        return context.tower.project(context.trunk.last_input)[:, 1:]

    return "toy"


def count_calls(clip):
    """How often each block's layer norm ran (methods may run a block's attention without calling the block)."""
    calls = [0] * len(clip.vision_model.encoder.layers)
    for index, block in enumerate(clip.vision_model.encoder.layers[:-1]):
        block.layer_norm2.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


def test_methods_of_one_rule_share_the_trunk(pipe, photo):
    calls = count_calls(pipe.model.clip)
    found = compare(pipe, photo, "cat, dog, sky", ["clip", "sclip", "clearclip", "naclip"], arm="both")
    assert calls[:-1] == [1] * (len(calls) - 1)
    assert len(found.results) == 8 and found.trunk_seconds > 0
    assert {result.semantic_map.shape for result in found.results} == {(photo.height, photo.width)}


def test_results_are_those_of_the_pipeline(pipe, photo):
    found = compare(pipe, photo, "cat, dog=puppy, sky", ["cliper", "sclip"], arm="both", background=0.4)
    for result in found.results:
        name, _, refined = result.name.partition(" + ")
        alone = pipe(photo, "cat, dog=puppy, sky", method=name, use_arm=bool(refined), background=0.4, semantic=True)
        assert (alone["semantic_map"] == result.semantic_map).mean() > 0.999
        np.testing.assert_allclose(alone["confidence"], result.confidence, atol=1e-4)


ONE_OF_EACH_RULE = ["clearclip", "cliper", "gem"]


def test_one_position_table_for_all_takes_one_pass(pipe, photo):
    calls = count_calls(pipe.model.clip)
    own = compare(pipe, photo, "cat, dog, sky", ONE_OF_EACH_RULE)
    assert calls[0] == 3
    common = compare(pipe, photo, "cat, dog, sky", ONE_OF_EACH_RULE, common_input=True)
    assert calls[0] == 4
    for result in common.results:
        options = {"position_rule": "reference"}
        alone = pipe(photo, "cat, dog, sky", method=result.name, use_arm=False, method_options=options, semantic=True)
        assert (alone["semantic_map"] == result.semantic_map).mean() > 0.999
        np.testing.assert_allclose(alone["confidence"], result.confidence, atol=1e-5)
    scores = [(a.confidence, b.confidence) for a, b in zip(own.results, common.results, strict=True)]
    assert [np.abs(a - b).max() > 2e-5 for a, b in scores] == [False, True, True]


def test_where_no_table_is_resized_all_share_a_pass(pipe, photo):
    side = pipe.model.clip.config.vision_config.image_size
    square = photo.resize((side, side))
    calls = count_calls(pipe.model.clip)
    found = compare(pipe, square, "cat, dog, sky", ONE_OF_EACH_RULE, size=side)
    assert calls[0] == 1
    for result in found.results:
        alone = pipe(square, "cat, dog, sky", method=result.name, use_arm=False, size=side, semantic=True)
        assert (alone["semantic_map"] == result.semantic_map).mean() > 0.999
        np.testing.assert_allclose(alone["confidence"], result.confidence, atol=1e-5)


def test_all_methods_run_or_say_why_not(pipe, photo):
    found = compare(pipe, photo, "cat, dog", parse_methods("all"))
    names = {result.name for result in found.results}
    assert names | set(found.left_out) == set(parse_methods("all"))
    assert set(found.left_out) <= {"proxyclip", "corrclip"}
    assert all("outside" in reason for reason in found.left_out.values())


def test_the_grid_shows_the_photo_and_every_result(pipe, photo):
    found = compare(pipe, photo, "cat, dog", ["clip", "sclip", "maskclip"])
    sheet = grid(photo, found, tile=120)
    assert sheet.mode == "RGB"
    assert sheet.width >= 2 * 100 and sheet.height >= 2 * 60


def test_a_method_from_outside_is_compared(pipe, photo, toy):
    found = compare(pipe, photo, "cat, dog", parse_methods("clip, toy"), arm="both")
    assert [result.name for result in found.results] == ["clip", "clip + ARM", "toy", "toy + ARM"]


def test_wrong_requests_are_one_clear_line(pipe, photo, tiny_clip_folder):
    for names in ("", "clip, clip", "no_such"):
        with pytest.raises(ValueError, match="method"):
            parse_methods(names)
    with pytest.raises(ValueError, match="off, on, both"):
        compare(pipe, photo, "cat", ["clip"], arm="maybe")


def test_the_command_writes_the_picture_once(tmp_path, photo, tiny_clip_folder, toy):
    source, out = tmp_path / "photo.jpg", tmp_path / "grid.png"
    photo.save(source)
    words = ["compare", str(source), "--labels", "cat, dog", "--model", str(tiny_clip_folder), "--out", str(out)]
    run = CliRunner().invoke(app, [*words, "--methods", "clip,toy", "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert "toy" in run.output and "shared trunk" in run.output
    assert load_image(out).width > 100

    again = CliRunner().invoke(app, [*words, "--methods", "clip"])
    assert again.exit_code == 2 and "--overwrite" in again.output
    common = CliRunner().invoke(app, [*words, "--methods", "clip,gem", "--common-input", "--overwrite"])
    assert common.exit_code == 0, common.output
    with_arm = CliRunner().invoke(app, [*words, "--methods", "clip", "--arm", "on", "--overwrite"])
    assert with_arm.exit_code == 2 and "without ARM; compare with --arm off" in with_arm.output


def test_segment_accepts_a_method_from_outside(tmp_path, photo, tiny_clip_folder, toy):
    source = tmp_path / "photo.jpg"
    photo.save(source)
    words = ["segment", str(source), "--labels", "cat, dog", "--model", str(tiny_clip_folder), "--method", "toy"]
    run = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "out" / "photo.png").is_file()
