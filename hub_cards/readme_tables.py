"""Fills the tables of the front page and of the guide on speed from the registry and from measured results.

    python -m arm_hf.hub_cards.readme_tables

replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in README.md, arm_hf/SPEED.md, arm_hf/EXPORT.md and
training/EVIDENCE.md, so that nobody types it.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arm_hf.hub_cards.build_card import HERE, read_json, rows


def methods_table() -> str:
    """Every registered method with what it computes and its paper, as a Markdown table."""
    from arm_hf.modeling.dense_clip import BUILT_IN_METHODS, get_method

    lines = ["| method | what it computes | paper |", "|---|---|---|"]
    for name in BUILT_IN_METHODS:
        method = get_method(name)
        lines.append(f"| `{name}` | {method.summary} | {method.paper} |")
    return "\n".join(lines)


def results_table(results: Mapping[str, Any]) -> str:
    """mIoU in percent of the embedded model on validation photos, with and without ARM, as a Markdown table."""
    lines = ["| validation photos of | photos | classes present | mIoU | mIoU with ARM |", "|---|---|---|---|---|"]
    for row in rows(dict(results)):
        figures = " | ".join("-" if value is None else f"{value:.1f}" for value in (row.alone, row.with_arm))
        lines.append(f"| {row.title} | {row.images} | {row.classes_present} | {figures} |")
    return "\n".join(lines)


BOUND_UNITS = {"ratio": "x plain", "added": "x plain added", "over": "x one by one", "mib": "MiB"}


def speed_table(record: Mapping[str, Any] | None) -> str:
    """What `arm-hf benchmark` measured where, every row that has a target and all of "together", as Markdown.

    Args:
        record: Its benchmark.json, or None while there is none.
    """
    if record is None:
        return "No measurement has been recorded here yet."
    facts = {**record["setting"], **record["machine"]}
    lines = [
        ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
        "| | measured | operations alone | floor | target | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in record["rows"]:
        if row["target"] is None and row["section"] != "together":
            continue
        bound, digits = row["bound"], 0 if row["bound"] == "mib" else 2
        unit = BOUND_UNITS[bound]
        alone = row.get({"ratio": "flops_ratio", "added": "flops_added", "over": "flops_over"}.get(bound, ""))
        target = "-" if row["target"] is None else f"{row['target']:g}"
        counted, floor = ("-" if value is None else f"{value:.2f}" for value in (alone, row.get("floor")))
        lines.append(
            f"| {row['name']} | {row['value']:.{digits}f} {unit} | {counted} | {floor} | {target} | {row['verdict']} |"
        )
    return "\n".join(lines)


def int8_table(record: Mapping[str, Any]) -> str:
    """What 8-bit weights cost, as Markdown.

    Args:
        record: The int8.json of `arm-hf export --int8 --measure-on`.
    """
    lines = [
        f"{record['images']} photos of {record['data']} ({record['split']}), mean over the classes present:",
        "",
        "| weights | image graph | mIoU | time a photo | pixels as in float32 |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["weights"].items():
        figures = f"{row['image_graph_bytes'] / 1e6:.1f} MB | {row['mean_iou']:.2f} | {row['seconds']:.2f} s"
        lines.append(f"| {name} | {figures} | {100 * row['agreement']:.1f}% |")
    return "\n".join(lines)


def evidence_tables(record: Mapping[str, Any] | None) -> str:
    """What `training/ablate.py` measured on one base, as Markdown.

    Args:
        record: Its evidence.json, or None while there is none.
    """
    from arm_hf.training.ablation_tables import markdown

    return "No measurement has been recorded here yet." if record is None else markdown(record, level=2).rstrip()


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between their markers.

    Args:
        text: The page.
        tables: Markdown by the name of the markers.

    Raises:
        ValueError: A marker pair is missing.
    """
    for name, table in tables.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, flags=re.DOTALL)
        if found is None:
            raise ValueError(f"the text has no <!-- {name} --> ... <!-- /{name} --> to fill")
        text = f"{text[: found.start(1)]}{table}\n{text[found.end(1) :]}"
    return text


def main() -> None:
    """Writes the tables of README.md, arm_hf/SPEED.md, arm_hf/EXPORT.md and training/EVIDENCE.md."""
    parser = argparse.ArgumentParser(
        prog="python -m arm_hf.hub_cards.readme_tables", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "arm-clip-mini.json")
    parser.add_argument("--speed", type=Path, default=Path("arm_hf/SPEED.md"))
    parser.add_argument("--benchmark", type=Path, default=HERE / "results" / "benchmark.json")
    parser.add_argument("--export", type=Path, default=Path("arm_hf/EXPORT.md"))
    parser.add_argument("--int8", type=Path, default=HERE / "results" / "int8.json")
    parser.add_argument("--evidence", type=Path, default=Path("training/EVIDENCE.md"))
    parser.add_argument("--ablations", type=Path, default=HERE / "results", help="folder of evidence-fair.json, ...")
    arguments = parser.parse_args()
    measured = read_json(arguments.results, "training/pretrain_mini.py --results")
    speed = read_json(arguments.benchmark, "make bench") if arguments.benchmark.is_file() else None
    files = {base: arguments.ablations / f"evidence-{base}.json" for base in ("fair", "ablations", "strong")}
    evidence = {
        base: evidence_tables(read_json(path, "training/ablate.py") if path.is_file() else None)
        for base, path in files.items()
    }
    pages = {
        arguments.readme: {"methods": methods_table(), "results": results_table(measured)},
        arguments.speed: {"speed": speed_table(speed)},
        arguments.export: {"int8": int8_table(read_json(arguments.int8, "arm-hf export --int8 --measure-on"))},
        arguments.evidence: evidence,
    }
    for page, tables in pages.items():
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(f"Written: {', '.join(map(str, pages))}")


if __name__ == "__main__":
    main()
