"""Sheets of pictures, and plots of results, trainings and confusion."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from arm_hf.cli import app
from arm_hf.plot_data import read_confusion, read_log, read_results, smooth
from arm_hf.sheets import heat_map, rank_classes, score_sheet, tile_sheet

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None,
    reason="needs matplotlib: pip install 'arm_hf[plots]'",
)


def run(*words):
    return CliRunner().invoke(app, ["plot", *map(str, words)])


@pytest.fixture
def evaluation(tmp_path):
    """What `arm-hf evaluate` writes, as far as plots read it."""
    rows = [
        {
            "method": method,
            "arm": arm,
            "mean_iou": 40.0 + 5 * arm + number,
            "published": [{"miou": 59.1}] if not arm else [],
            "per_class": {
                "cat": {"iou": 60.0 + number, "pixels": 5},
                "dog": {"iou": None, "pixels": 0},
                "sky": {"iou": 20.0, "pixels": 9},
            },
        }
        for number, method in enumerate(("clearclip", "sclip"))
        for arm in (False, True)
    ]
    record = {"data": {"name": "pets"}, "protocol": {"name": "plain"}, "results": rows}
    (tmp_path / "results.json").write_text(json.dumps(record), encoding="utf-8")
    counts = np.array([[5, 3, 0, 1], [0, 0, 0, 0], [2, 0, 9, 0]])
    np.savez_compressed(
        tmp_path / "confusion.npz",
        classes=np.array(["cat", "dog", "sky"]),
        **{"row clearclip": counts, "row sclip + ARM": counts},
    )
    return tmp_path


class TestSheets:
    def test_a_heat_map_runs_from_dark_violet_to_yellow(self):
        photo = Image.new("RGB", (40, 20), (90, 90, 90))
        scores = np.zeros((10, 20))
        scores[:, 10:] = 1.0
        map_ = heat_map(photo, scores, alpha=1.0)
        assert map_.size == photo.size
        assert map_.getpixel((0, 0)) == (68, 1, 84) and map_.getpixel((39, 19)) == (253, 231, 37)
        assert heat_map(photo, scores, alpha=0.0).getpixel((39, 0)) == (90, 90, 90)
        assert heat_map(photo, scores * 9 + 2, limits=(1, 2), alpha=1.0).getpixel((0, 0)) == (253, 231, 37)

    def test_brighter_is_more(self):
        ramp = heat_map(Image.new("L", (64, 1)), np.linspace(0, 1, 64)[None], alpha=1.0).convert("L")
        assert (np.diff(np.asarray(ramp, dtype=int)[0]) >= -1).all()

    @pytest.mark.parametrize(
        ("scores", "options", "message"),
        [
            (np.zeros(3), {}, r"shape \(3,\)"),
            (np.full((2, 2), np.nan), {}, "finite"),
            (np.zeros((2, 2)), {"limits": (1, 1)}, "rise"),
            (np.zeros((2, 2)), {"alpha": 2}, "alpha"),
        ],
    )
    def test_impossible_heat_maps(self, scores, options, message):
        with pytest.raises(ValueError, match=message):
            heat_map(Image.new("RGB", (4, 4)), scores, **options)

    def test_classes_with_the_largest_mean_come_first(self):
        scores = np.stack([np.full((4, 6), level) for level in (0.2, 0.7, 0.1)])
        assert rank_classes(scores) == [1, 0, 2]
        photo = Image.new("RGB", (60, 40))
        one, all_ = (score_sheet(photo, scores, {0: "a", 1: "b", 2: "c"}, most, tile=60) for most in (1, 3))
        assert all_.width * all_.height > one.width * one.height
        with pytest.raises(ValueError, match="K = 2"):
            score_sheet(photo, scores, {0: "a", 1: "b"})

    def test_tiles_keep_their_shape(self):
        red, tall = Image.new("RGB", (200, 100), "red"), Image.new("L", (10, 50), 255)
        sheet = np.asarray(tile_sheet([("one", red), ("x" * 300, tall)], tile=100, columns=2))
        reds = (sheet == (255, 0, 0)).all(axis=-1)
        assert reds.sum() == 100 * 50
        for wrong in ([], [("one", red)]):
            with pytest.raises(ValueError, match="at least"):
                tile_sheet(wrong, tile=0 if wrong else 10)


class TestData:
    def test_results_of_an_evaluation(self, evaluation):
        rows = read_results(evaluation)
        assert [row.name for row in rows] == ["clearclip", "clearclip + ARM", "sclip", "sclip + ARM"]
        assert rows[0].data == "pets" and rows[0].papers == (59.1,)
        assert rows[1].mean_iou == 45.0 and dict(rows[1].per_class) == {"cat": 60.0, "sky": 20.0}

    def test_results_of_a_card(self, root):
        rows = read_results(root / "hub_cards" / "results" / "arm-clip-mini.json")
        assert {row.name for row in rows} == {"without ARM", "with ARM"}
        assert all(0 <= value <= 100 for row in rows for value in row.per_class.values())

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "not JSON"), ("[]", "object"), ('{"sets": {}}', "no results"), ('{"a": 1}', "known")],
    )
    def test_files_that_are_no_results(self, tmp_path, text, message):
        path = tmp_path / "results.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_results(path)
        with pytest.raises(ValueError, match="cannot read"):
            read_results(tmp_path / "absent.json")

    def test_a_training_log_with_a_line_cut_short(self, tmp_path):
        lines = [{"step": 5, "loss": 2.0, "lr": 0.1}, {"step": 5, "mean_iou": {"voc": 0.25}}, {"step": 9, "loss": 1.0}]
        path = tmp_path / "log.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 1', encoding="utf-8")
        log = read_log(tmp_path)
        assert log.curves["loss"] == ([5, 9], [2.0, 1.0]) and log.curves["lr"] == ([5], [0.1])
        assert log.mean_iou == {"voc": ([5], [25.0])}
        path.write_text('no json\n{"step": 1, "loss": 1}\n', encoding="utf-8")
        with pytest.raises(ValueError, match="line 1"):
            read_log(path)

    def test_confusion_of_a_row(self, evaluation):
        name, counts, classes = read_confusion(evaluation, "sclip + ARM")
        assert name == "sclip + ARM" and classes == ["cat", "dog", "sky"] and counts[2, 2] == 9
        with pytest.raises(ValueError, match="choose one: clearclip, sclip"):
            read_confusion(evaluation)
        with pytest.raises(ValueError, match="no row 'clip'"):
            read_confusion(evaluation, "clip")
        with pytest.raises(ValueError, match="cannot read"):
            read_confusion(evaluation / "results.json")

    def test_the_running_mean_leaves_out_what_is_not_finite(self):
        assert smooth([1.0, 3.0, float("nan"), 5.0], 2) == [1.0, 2.0, 2.0, 4.0]


@needs_matplotlib
class TestPlots:
    def test_bars_show_every_number_once(self, evaluation):
        from arm_hf.plots import result_bars

        (axis,) = result_bars(read_results(evaluation), papers=True).axes
        assert sorted(text.get_text() for text in axis.texts) == ["40.0", "41.0", "45.0", "46.0"]
        assert sorted(round(bar.get_width(), 1) for bar in axis.patches) == [40.0, 41.0, 45.0, 46.0]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["clearclip", "sclip"]
        assert [line.get_xdata()[0] for line in axis.lines] == [59.1, 59.1]

    def test_without_methods_the_data_sets_are_the_rows(self, root):
        from arm_hf.plots import result_bars

        rows = read_results(root / "hub_cards" / "results" / "arm-clip-mini.json")
        (axis,) = result_bars(rows).axes
        assert [label.get_text() for label in axis.get_yticklabels()] == list(dict.fromkeys(row.data for row in rows))

    def test_the_best_class_is_on_top(self, evaluation):
        from arm_hf.plots import class_bars

        (axis,) = class_bars(read_results(evaluation)).axes
        assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "sky"]
        assert axis.get_ylim()[0] > axis.get_ylim()[1]

    def test_confusion_is_in_percent_of_the_right_class(self, evaluation):
        from arm_hf.plots import confusion_plot

        axis = confusion_plot(*read_confusion(evaluation, "clearclip")[1:]).axes[0]
        shares = axis.images[0].get_array()
        np.testing.assert_allclose(shares, [[500 / 9, 0, 400 / 9], [200 / 11, 900 / 11, 0]])  # dog never occurs
        assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "sky", "other"]
        with pytest.raises(ValueError, match="K = 2"):
            confusion_plot(np.zeros((3, 3)), ["a", "b"])
        with pytest.raises(ValueError, match="no class"):
            confusion_plot(np.zeros((2, 2)), ["a", "b"])

    def test_every_command_writes_its_picture_once(self, evaluation, tmp_path):
        log = [{"step": step, "loss": 2 / step, "lr": 0.1} for step in range(1, 60)]
        log += [{"step": step, "mean_iou": {"voc": 0.2, "mean": 0.2}} for step in (30, 59)]
        (evaluation / "log.jsonl").write_text("\n".join(map(json.dumps, log)), encoding="utf-8")
        for words in (
            ["results", evaluation, "--papers"],
            ["classes", evaluation, "--row", "sclip", "--row", "clearclip + ARM"],
            ["confusion", evaluation, "--row", "clearclip"],
            ["curves", evaluation],
        ):
            out = tmp_path / f"{words[0]}.png"
            done = run(*words, "--out", out)
            assert done.exit_code == 0, done.output
            assert min(Image.open(out).size) > 200
            again = run(*words, "--out", out)
            assert again.exit_code == 2 and "--overwrite" in again.output
        assert run("results", evaluation, "--out", tmp_path / "x.svg").exit_code == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["results", "{}", "--out", "x.gif"], "x.gif"),
            (["results", "absent.json"], "absent.json"),
            (["classes", "{}", "--row", "nothing"], "clearclip + ARM"),
            (["classes", "{}", "--data", "voc"], "pets"),
            (["curves", "{}"], "log.jsonl"),
            (["confusion", "{}"], "choose one"),
        ],
    )
    def test_wrong_requests_are_one_line(self, evaluation, words, message):
        done = run(*(word.replace("{}", str(evaluation)) for word in words))
        assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_scores_of_a_photo(tmp_path, photo, tiny_clip_folder):
    source, out = tmp_path / "photo.jpg", tmp_path / "scores.png"
    photo.save(source)
    words = ["scores", source, "--labels", "cat, dog", "--model", tiny_clip_folder, "--device", "cpu", "--out", out]
    done = run(*words, "--stretch")
    assert done.exit_code == 0, done.output
    assert Image.open(out).width > 700
    assert run(*words).exit_code == 2


def test_without_matplotlib_the_command_says_what_to_install(run_python, root):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        f"sys.argv = ['arm-hf', 'plot', 'results', {str(root / 'hub_cards/results/arm-clip-mini.json')!r}]\n"
        "import contextlib, io\nfrom arm_hf.cli import main\nerrors = io.StringIO()\n"
        "with contextlib.redirect_stderr(errors):\n"
        "    try:\n        main()\n    except SystemExit as end:\n        code = end.code\n"
        "print(code, errors.getvalue())"
    )
    assert "pip install 'arm_hf[plots]'" in run_python(code)
