"""The tables of the front page are what the registry and the results say today."""

from pathlib import Path

import pytest

from arm_hf.hub_cards.build_card import HERE, read_json
from arm_hf.hub_cards.readme_tables import evidence_tables, fill, int8_table, methods_table, results_table, speed_table

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def test_the_front_page_is_up_to_date() -> None:
    measured = read_json(HERE / "results" / "arm-clip-mini.json", "training/pretrain_mini.py --results")
    text = README.read_text(encoding="utf-8")
    assert fill(text, {"methods": methods_table(), "results": results_table(measured)}) == text, "run make card"


def test_the_guide_on_speed_is_up_to_date() -> None:
    measured = HERE / "results" / "benchmark.json"
    table = speed_table(read_json(measured, "make bench") if measured.is_file() else None)
    text = (ROOT / "arm_hf" / "SPEED.md").read_text(encoding="utf-8")
    assert fill(text, {"speed": table}) == text, "run make card"


def test_the_guide_on_export_is_up_to_date() -> None:
    table = int8_table(read_json(HERE / "results" / "int8.json", "arm-hf export --int8 --measure-on"))
    text = (ROOT / "arm_hf" / "EXPORT.md").read_text(encoding="utf-8")
    assert fill(text, {"int8": table}) == text, "run make card"


def test_the_page_on_what_arm_adds_is_up_to_date() -> None:
    files = {base: HERE / "results" / f"evidence-{base}.json" for base in ("fair", "ablations", "strong")}
    records = {base: read_json(path, "training/ablate.py") if path.is_file() else None for base, path in files.items()}
    text = (ROOT / "training" / "EVIDENCE.md").read_text(encoding="utf-8")
    tables = {base: evidence_tables(record) for base, record in records.items()}
    assert fill(text, tables) == text, "run make card"


def test_a_row_of_the_guide_on_speed() -> None:
    row = {
        "name": "gem + ARM",
        "section": "arm",
        "target": 0.16,
        "value": 0.17,
        "verdict": "missed",
        "bound": "added",
        "flops_added": 0.146,
        "floor": 0.131,
    }
    free = {"name": "plain", "section": "methods", "target": None}
    together = {**free, "name": "all", "section": "together", "value": 4.1, "verdict": "", "bound": "ratio"}
    record = {"setting": {"rounds": 7}, "machine": {"threads": 2}, "rows": [row, free, together]}
    lines = speed_table(record).splitlines()
    assert lines[0] == "rounds 7, threads 2." and len(lines) == 6
    assert lines[-2] == "| gem + ARM | 0.17 x plain added | 0.15 | 0.13 | 0.16 | missed |"
    assert lines[-1] == "| all | 4.10 x plain | - | - | - |  |"


def test_only_what_stands_between_the_markers_changes() -> None:
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nafter"
    assert fill(text, {"a": "new"}) == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter"
    with pytest.raises(ValueError, match="b"):
        fill(text, {"b": "new"})


def test_a_row_gives_both_figures() -> None:
    plain = {"images": 3, "classes_present": 2, "miou": 47.61}
    table = results_table({"sets": {"camvid": {"without_arm": plain, "with_arm": {**plain, "miou": 48.9}}}})
    assert "| CamVid | 3 | 2 | 47.6 | 48.9 |" in table
