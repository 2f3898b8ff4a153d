"""Settings of a run and what becomes of each picture, without a command line."""

import pytest

from arm_hf.folders import Skipped, Written, collect_images, plan_outputs
from arm_hf.modeling.prompts import parse_labels
from arm_hf.segmenting import RunSettings, load_pipeline, parse_options, run_record, segment_files


def test_parse_options():
    assert parse_options(["gaussian-std=2.5", " mlp = True", "n=3", "rule=bilinear", "layers=[1, 2]", "s=none"]) == {
        "gaussian_std": 2.5,
        "mlp": True,
        "n": 3,
        "rule": "bilinear",
        "layers": (1, 2),
        "s": None,
    }
    for pairs, message in ((["a"], "key=value"), (["=3"], "key=value"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(ValueError, match=message):
            parse_options(pairs)


def test_pictures_come_back_in_order_and_bad_ones_are_left_out(tmp_path, photo, tiny_clip_folder):
    names = ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    for name in names:
        photo.resize((64, 48)).save(tmp_path / name)
    for name in ("1.jpg", "3.jpg", "5.jpg"):
        (tmp_path / name).write_bytes(b"")
    files = collect_images([tmp_path / name for name in names])
    settings = RunSettings(parse_labels("cat, dog"), templates="single", batch_size=2)
    pipe = load_pipeline(str(tiny_clip_folder), device="cpu")

    def segment(files, out, settings=settings, workers=0):
        jobs = zip(files, plan_outputs(files, tmp_path / out), strict=True)
        return list(segment_files(pipe, jobs, settings, run_record(pipe, settings, "tiny"), workers))

    results = segment(files, "out")
    assert sorted(result.file.name for result in results) == names
    assert [result.file.name for result in results if isinstance(result, Written)] == ["2.jpg", "4.jpg"]
    skipped = [result for result in results if isinstance(result, Skipped)]
    assert all(result.file.name in result.reason for result in skipped)

    nothing = [file for file in files if file.name in ("1.jpg", "5.jpg")]
    results = segment(nothing, "out2")
    assert [type(result) for result in results] == [Skipped, Skipped]

    wrong = RunSettings(parse_labels("cat"), method_options={"no_such": 1})
    with pytest.raises(ValueError, match="has no setting no_such"):
        segment(files, "out3", wrong)
