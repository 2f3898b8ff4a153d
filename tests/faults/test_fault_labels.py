"""Words of any script, length, number and intent: as labels, as class names of data, as names of files."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

GROUP = "labels"

ODD = [
    "كلب",
    "שלום עולם",
    "\u202egnp.exe",
    "猫",
    "ねこ",
    "고양이",
    "कुत्ता",
    "Ünïcödé",
    "e\u0301te\u0301",
    "été",
    "👩\u200d👩\u200d👧\u200d👦",
    "🇩🇪",
    "a\u0300\u0301\u0302\u0303\u0304" * 20,
    "\ufeffcat",
    "zero\u200bwidth",
    "ﬀ ligature",
    "𝕮𝖆𝖙",
    "\U0010ffff",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\windows\\system32",
    "a/b",
    "a\\b",
    "a b",
    "a_b",
    "CON",
    "con.png",
    ".",
    "..",
    "~",
    "-rf",
    "--help",
    "$(reboot)",
    "`id`",
    "%s%n%d",
    "{0}",
    "{}",
    '"quoted"',
    "it's",
    "semi;colon",
    "tab\tinside",
    "new\nline",
    "nul\0byte",
    "bell\x07",
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "c1\x9b31m",
    "line\u2028end",
    "<script>alert(1)</script>",
    "&amp;",
    "[link](javascript:alert(1))",
    "null",
    "true",
    "1e309",
    "NaN",
    "0",
    "a" * 300,
    "word " * 2000,
    "x" * 10_000,
]


def plain(name: str) -> str:
    return " ".join(name.split())


def printable(text: str) -> bool:
    """Nothing in a text moves a terminal's cursor or turns its writing direction."""
    turning = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029}
    return all(sign == "\n" or not (ord(sign) < 32 or 127 <= ord(sign) < 160 or ord(sign) in turning) for sign in text)


@pytest.mark.filterwarnings("ignore:.*label.s. are longer:UserWarning")
def test_each_as_a_label_of_the_pipeline(faults, pipe, draw):
    image = draw(64, 48)
    for name in ODD:
        with faults.case(GROUP, f"pipeline: {name[:40]!a}") as case:
            result = pipe(image, candidate_labels=[[name], ["sky"]], semantic=True)
            assert result["id2label"] == {0: plain(name), 1: "sky"}
            assert result["semantic_map"].shape == (48, 64) and np.isfinite(result["confidence"]).all()
            case.right()


def test_all_together_through_the_command(faults, cli, models, tmp_path, draw):
    """Names go into the legend as they are; no file is named after one, and the terminal is left alone."""
    names = [name for name in ODD if not set(name) & set(",=|\n\u2028") and not name.startswith("#")]
    (tmp_path / "labels.txt").write_text("\n".join(names), encoding="utf-8")
    picture = tmp_path / "in" / "photo.png"
    picture.parent.mkdir()
    draw(512, 384).save(picture)
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = ["--labels-from", tmp_path / "labels.txt", "--templates", "single", "--device", "cpu"]
    done = cli("segment", picture, *arguments, "--model", models / "clip", "--window", 64, "--out", tmp_path / "out")
    with faults.case(GROUP, "command: the run as a whole") as case:
        assert done.code == 0, done.err + done.crash
        assert printable(done.out + done.err), ascii(done.out + done.err)
        assert all(line.startswith("arm-hf: warning: ") for line in done.err.splitlines()), done.err
        assert max(map(len, done.out.splitlines())) < 300
        case.whole(tmp_path / "out")
        written = {path.name for path in (tmp_path / "out").rglob("*")}
        assert written == {"photo.png", "photo.json", "photo_overlay.png", "manifest.jsonl"}
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
        case.right()
    legend = json.loads((tmp_path / "out" / "photo.json").read_text(encoding="utf-8"))
    with faults.case(GROUP, "command: many of them occur") as case:
        assert len(legend["segments"]) > 2
        case.right()
    for index, name in enumerate(names):
        with faults.case(GROUP, f"command: {name[:40]!a}") as case:
            assert legend["id2label"][str(index)] == plain(name)
            case.right()


def test_ten_thousand(faults, cli, models, tmp_path, draw):
    draw(64, 48).save(tmp_path / "photo.png")
    (tmp_path / "labels.txt").write_text("\n".join(f"thing {number}" for number in range(10_000)))
    arguments = ["--labels-from", tmp_path / "labels.txt", "--templates", "single", "--device", "cpu"]
    done = cli("segment", tmp_path / "photo.png", *arguments, "--model", models / "clip", "--out", tmp_path / "out")
    with faults.case(GROUP, "command: 10,000 labels") as case:
        assert done.code == 0, done.err + done.crash
        case.whole(tmp_path / "out")
        with Image.open(tmp_path / "out" / "photo.png") as labels:
            assert labels.mode == "I;16" and labels.size == (64, 48)
            found = set(np.asarray(labels).ravel().tolist())
        legend = json.loads((tmp_path / "out" / "photo.json").read_text())
        assert len(legend["id2label"]) == 10_000
        assert {segment["id"] for segment in legend["segments"]} == found
        case.right()


@pytest.mark.parametrize("through", ["command", "pipeline"])
def test_what_is_no_label(faults, cli, models, tmp_path, draw, request, through):
    picture = tmp_path / "photo.png"
    draw(16, 16).save(picture)
    pipe = request.getfixturevalue("pipe") if through == "pipeline" else None
    wrong = {
        "empty": "",
        "blank": "  \t ",
        "commas": ",,,",
        "an empty one": "cat,,dog",
        "a blank one": "cat, \u00a0 ,dog",
        "twice": "cat, dog, cat",
        "twice but for case": "Cat, cAT",
        "twice but for blanks": "hot  dog, hot dog",
        "twice but for a full width letter's case": "Ａ, ａ",
        "an empty synonym": "cat=kitten||tom",
        "no name": "=cmd|' /C calc'!A0",
        "no words": "cat:=",
        "bars": "|||",
        "half a character": "cat, \ud83d",
    }
    for name, labels in wrong.items():
        with faults.case(GROUP, f"{through}: {name}") as case:
            if pipe is None:
                out = tmp_path / "out"
                done = cli("segment", picture, "--labels", labels, "--model", models / "clip", "--out", out)
                case.command(done, 2)
                assert not out.exists() and printable(done.err)
            else:
                with pytest.raises(ValueError) as caught:
                    pipe(draw(16, 16), candidate_labels=labels)
                case.line(str(caught.value))


def test_as_class_names_and_file_names_of_an_evaluation(faults, cli, models, tmp_path, labelled):
    """What is written parses, and every cell holds what it should."""
    classes = ["background", 'a "b", c', "pipe | pipe", "\x1b[31mred", "<b>", "=1+1", "猫", "x" * 300]
    images = ["a,b", 'say "hi"', "=1+1", "pipe|pipe", "猫", "red\x1b[31m", "-rf", "a;b"]
    data, out = labelled(len(images), classes, images), tmp_path / "out"
    done = cli("evaluate", "--data", data, "--methods", "clearclip", "--model", models / "full", "--device", "cpu",
               "--out", out, "--pictures", 2)  # fmt: skip
    with faults.case(GROUP, "evaluate: the run as a whole") as case:
        assert done.code == 0, done.err + done.crash
        assert printable(done.out), ascii(done.out)
        case.whole(out)
        case.right()
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in classes:
        with faults.case(GROUP, f"evaluate: class {name[:40]!a}") as case:
            assert name in results["protocol"]["classes"]
            assert name in results["results"][0]["per_class"]
            case.right()
    rows = list(csv.reader(io.StringIO((out / "images.csv").read_text(encoding="utf-8"))))
    for index, name in enumerate(images):
        with faults.case(GROUP, f"evaluate: image {name!a}") as case:
            assert [row[1] for row in rows if row[0] == str(index)] == [name]
            case.right()
    with faults.case(GROUP, "evaluate: the Markdown table") as case:
        lines = (out / "results.md").read_text(encoding="utf-8").splitlines()
        table = [line for line in lines if line.startswith("| ") and "pipe" in line]
        assert len(table) == 1 and table[0].replace("\\|", "").count("|") == 4, table
        assert all((out / "pictures").resolve() in path.resolve().parents for path in out.rglob("*.jpg"))
        case.right()
