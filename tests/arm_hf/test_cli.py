"""The command line in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import arm_hf


@pytest.fixture
def environment(root):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


@pytest.fixture
def arm(tmp_path, environment):
    """Runs `arm-hf ARGUMENTS` in an empty folder."""

    def run(*arguments, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", "arm_hf.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def one_line(done) -> str:
    """The line on stderr of a command that failed as it should."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("arm-hf: error: "), done.stderr
    assert done.returncode == 2
    return lines[0]


def test_help_and_version(arm, run_python):
    code = "import sys, arm_hf.cli; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert run_python(code).strip() == "[]"  # help comes at once
    assert arm("--help").returncode == 0
    text = arm("segment", "--help").stdout
    for option in ("labels", "labels-from", "method", "method-option", "model", "arm", "no-arm", "background"):
        assert f"--{option}" in text
    for option in ("templates", "window", "stride", "size", "batch-size", "device", "dtype", "out", "overwrite"):
        assert f"--{option}" in text
    assert arm("--version").stdout.strip() == f"arm-hf {arm_hf.__version__}"


def test_labels(arm):
    listed = arm("labels").stdout
    assert all(name in listed for name in arm_hf.list_label_sets())
    printed = arm("labels", "voc21").stdout
    lines = [line for line in printed.splitlines() if not line.startswith("#")]
    assert arm_hf.parse_labels(lines) == arm_hf.load_label_set("voc21")
    assert "did you mean 'voc21'" in one_line(arm("labels", "voc12"))


def test_methods(run_python):
    code = """
import sys
from arm_hf.cli import main
for options in (["--json"], []):
    sys.argv = ["arm-hf", "methods", *options]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0
    print("=====")
"""
    as_json, text, _ = run_python(code).split("=====")
    records = {record["name"]: record for record in json.loads(as_json)}
    assert {"clip", "maskclip", "sclip", "clearclip", "naclip"} <= set(records)
    for record in records.values():
        assert all(record[key] for key in ("paper", "summary", "cost", "reference", "settings"))
        assert all(setting["help"] for setting in record["settings"])
        assert f"{record['name']}: {record['summary']}" in text
    assert "gaussian_std=5.0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment"], "Missing argument"),
        (["segment", "."], "say what to look for"),
        (["segment", ".", "--labels", "cat", "--sise", "3"], "No such option: --sise"),
        (["segment", ".", "--labels", "cat,,dog"], "label 2 is empty"),
        (["segment", ".", "--labels", "cat,Cat"], "given twice"),
        (["segment", ".", "--labels", "cat=|"], "synonym of label 'cat' is empty"),
        (["segment", ".", "--labels-from", "voc20", "--labels", "cat"], "given twice"),
        (["segment", ".", "--labels-from", "voc22"], "neither a text file nor a label set"),
        (["segment", ".", "--labels", "cat"], "there are no images in"),
        (["segment", "cat.jpg", "--labels", "cat"], "there is no file or folder 'cat.jpg'"),
        (["paint"], "No such command 'paint'"),
    ],
)
def test_wrong_command_lines(arm, arguments, message):
    assert message in one_line(arm(*arguments))


def test_wrong_settings(tmp_path, run_python):
    """These need the methods, and so torch: one process for all."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    cases = {
        "unknown method 'naclop'": ["--method", "naclop"],
        "has no setting gausian_std": ["--method", "naclip", "--method-option", "gausian_std=3"],
        "gaussian_std must be positive": ["--method", "naclip", "--method-option", "gaussian-std=-3"],
        "key=value": ["--method", "naclip", "--method-option", "gaussian_std"],
        "no effect without window": ["--stride", "112"],
        "stride must be between": ["--window", "224", "--stride", "300"],
        "size must be at least 1": ["--size", "0"],
        "batch size must be at least 1": ["--batch-size", "0"],
        "must lie between 0 and 1": ["--background", "1.5"],
        "unknown template set": ["--templates", "imagenet"],
        "unknown dtype 'int8'": ["--dtype", "int8"],
        "cannot load the model": ["--model", str(tmp_path / "nowhere")],
        "cannot load the model 'no-such-user/model'": ["--model", "no-such-user/model"],
    }
    code = f"""
import contextlib, io, json, sys
from arm_hf.cli import main
answers = []
for options in {list(cases.values())!r}:
    sys.argv = ["arm-hf", "segment", {str(tmp_path / "a.png")!r}, "--labels", "cat", "--out", "out", *options]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main()
        except SystemExit as stop:
            answers.append([stop.code, stderr.getvalue()])
print(json.dumps(answers))
"""
    answers = json.loads(run_python(code, cwd=tmp_path))
    for message, (exit_code, stderr) in zip(cases, answers, strict=True):
        assert exit_code == 2, stderr
        assert message in stderr and stderr.startswith("arm-hf: error: ") and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def album(tmp_path, photo):
    """Good pictures of many kinds, and bad ones."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    photo.save(folder / "photo.jpg")
    photo.save(folder / "photo.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.quantize(16).save(folder / "palette.gif")
    photo.convert("LA").save(folder / "alpha.png")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "sub" / "turned.jpg", exif=exif)
    photo.resize((20, 400)).save(folder / "sub" / "long.png")
    photo.crop((0, 0, 1, 1)).save(folder / "dot.png")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    return folder


def test_segment_a_folder(arm, album, tiny_clip_folder, tmp_path, photo):
    options = ["--labels", "cat, dog=puppy|hound, grass, sky", "--background", "0.05", "--templates", "single"]
    options += ["--method", "naclip", "--method-option", "gaussian_std=3", "--model", tiny_clip_folder]
    done = arm("segment", "album", *options, "--window", "64", "--batch-size", "3", "--out", "out")
    assert done.returncode == 1, done.stderr
    skipped = [line for line in done.stderr.splitlines() if line.startswith("arm-hf: skipped: ")]
    assert [next(name for name in ("cut.jpg", "empty.png", "text.jpg") if name in line) for line in skipped] == [
        "cut.jpg",
        "empty.png",
        "text.jpg",
    ]
    assert "Traceback" not in done.stderr
    assert "9 of 12 pictures segmented" in done.stdout

    out = tmp_path / "out"
    stems = ["alpha", "cmyk", "dot", "palette", "photo", "photo_png", "sixteen", "sub/long", "sub/turned"]
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    results = [f"{stem}{end}" for stem in stems for end in (".png", ".json", "_overlay.png")]
    assert written == sorted([*results, "manifest.jsonl"])
    for stem in stems:
        legend = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
        source = album / legend["image"]
        with Image.open(source) as image, Image.open(out / f"{stem}.png") as labels:
            upright = image.size[::-1] if stem == "sub/turned" else image.size
            assert labels.mode == "P" and labels.size == upright == (legend["width"], legend["height"])
            indices, palette = np.asarray(labels), labels.getpalette()
        assert [segment["id"] for segment in legend["segments"]] == sorted(
            np.unique(indices).tolist(), key=lambda index: (-int((indices == index).sum()), index)
        )
        for segment in legend["segments"]:
            assert segment["pixels"] == int((indices == segment["id"]).sum())
            assert segment["share"] == pytest.approx(segment["pixels"] / indices.size, abs=1e-6)
            assert segment["color"] == palette[3 * segment["id"] : 3 * segment["id"] + 3]
            assert segment["label"] == legend["id2label"][str(segment["id"])]
            assert 0 <= segment["score"] <= 1
        assert legend["id2label"] == {"0": "background", "1": "cat", "2": "dog", "3": "grass", "4": "sky"}
        assert legend["labels"][1] == {"name": "dog", "words": ["dog", "puppy", "hound"]}
        used = legend["settings"]
        assert (used["method"], used["method_options"], used["window"]) == ("naclip", {"gaussian_std": 3}, 64)
        assert (used["background"], used["templates"], used["use_arm"]) == ("0.05", "single", False)
        assert max(Image.open(out / f"{stem}_overlay.png").size) >= 640

    # A lossless copy of the same pixels gives the same answer, and so does the pipeline itself.
    from transformers import pipeline

    segment = pipeline("open-vocab-segmentation", model=str(tiny_clip_folder), dtype="float32", device="cpu")
    expected = segment(
        photo,
        candidate_labels="cat, dog=puppy|hound, grass, sky",
        background=0.05,
        templates="single",
        method="naclip",
        method_options={"gaussian_std": 3},
        window=64,
        semantic=True,
    )
    found = np.asarray(Image.open(out / "photo_png.png"))
    assert (found == expected["semantic_map"]).mean() > 0.999

    # Once more: nothing is replaced unless asked.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert "already" in one_line(arm("segment", "album/photo.jpg", *options, "--out", "out"))
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    done = arm("segment", "album/photo.jpg", "album/dot.png", *options, "--out", "out", "--overwrite")
    assert (done.returncode, done.stderr) == (0, "")
    assert "photo.jpg  160 x 120" in done.stdout and "score 0." in done.stdout
    assert (out / "photo.json").stat().st_mtime_ns != before[out / "photo.json"]


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_an_interrupt_that_a_finaliser_swallows_is_raised_again(run_python):
    code = """
import os, signal, sys, time
from arm_hf.commands.common import interrupts

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # Python runs the handler here, and drops what it raises

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
sys.unraisablehook = lambda what: print("dropped", what.exc_type.__name__)
with interrupts.watching():
    interrupts.check()
    thing = Finalised()
    del thing
    try:
        interrupts.check()
    except KeyboardInterrupt:
        print("raised again")
"""
    assert run_python(code).split("\n")[:2] == ["dropped KeyboardInterrupt", "raised again"]


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_an_interrupt_leaves_whole_files_and_one_line(environment, tiny_clip_folder, tmp_path, photo):
    folder, out = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    for index in range(400):
        photo.resize((320 + index, 240)).save(folder / f"{index:03}.jpg")
    arguments = ["segment", str(folder), "--labels", "cat,dog", "--model", str(tiny_clip_folder), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "arm_hf.cli", *arguments, "--templates", "single"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1].startswith("arm-hf: interrupted")
    assert "Traceback" not in stderr
    legends = list(out.glob("*.json"))
    assert 3 <= len(legends) < 400
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for legend in legends:
        files = json.loads(legend.read_text())["files"]
        for name in files.values():
            Image.open(Path(out, name)).load()
