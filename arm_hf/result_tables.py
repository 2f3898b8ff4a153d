"""The results of an evaluation as JSON, as a Markdown table, and per image as CSV.

The papers' numbers stand beside ours in a column of their own, each with its paper; they are for the named CLIP on the
whole data set, and never mixed with ours.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arm_hf import __version__
from arm_hf.evaluating import Evaluation
from arm_hf.folders import atomic_path
from arm_hf.shared_pass import Row

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "pillow")
FIGURES = ("mean_iou", "mean_iou_in_labels", "boundary_iou", "overall_accuracy", "mean_accuracy", "fw_iou")
NO_NUMBER = "-"


def build_results(
    evaluation: Evaluation, device: str, metric: str = "ours", hub: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Everything about an evaluation, for JSON. Figures are percentages; what cannot be divided is None.

    Args:
        evaluation: What was counted.
        device: What it ran on.
        metric: "ours", "hub", or the path of the metric that was asked for.
        hub: That metric's results per row.
    """
    identity, plan = evaluation.identity, evaluation.plan
    images = len(evaluation.tally.images)
    results = []
    for row in plan.rows:
        result = _row_result(evaluation, row)
        if hub is not None:
            result["metric"] = {"source": metric, "mean_iou": _percent(hub[row.name]["mean_iou"])}
        results.append(result)
    return {
        "arm_hf": __version__,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": device,
        "processes": evaluation.processes,
        "model": identity["model"],
        "data": {
            **identity["data"],
            "images": images,
            "labels": plan.table.rule,
            "misnamed": list(plan.table.misnamed),
        },
        "protocol": identity["protocol"],
        "backbone_of_settings": plan.backbone,
        "boundary_radius": identity["boundary_radius"],
        "comparable": comparable(evaluation),
        "left_out": dict(plan.left_out),
        "results": results,
    }


def comparable(evaluation: Evaluation) -> str:
    """What one must know before our numbers are held against the papers'."""
    data, model = evaluation.identity["data"], evaluation.identity["model"]
    return (
        f"ours: {len(evaluation.tally.images)} images of {data['name']} ({data['split']}) with {model['name']}, mean "
        "over the classes in labels or predictions; the papers': the whole data set with the CLIP they name. The two "
        "are comparable only where data and CLIP are the same."
    )


def _row_result(evaluation: Evaluation, row: Row) -> dict[str, Any]:
    plan, matrix = evaluation.plan, evaluation.tally.matrices[row.name]
    figures = matrix.compute()
    pixels = matrix.counts[:-1].sum(axis=1)
    figures["mean_iou_in_labels"] = float(np.mean(figures["per_category_iou"][pixels > 0]))
    per_class = {
        name: {
            "iou": _percent(figures["per_category_iou"][index]),
            "accuracy": _percent(figures["per_category_accuracy"][index]),
            **(
                {"boundary_iou": _percent(figures["per_category_boundary_iou"][index])}
                if "per_category_boundary_iou" in figures
                else {}
            ),
            "pixels": int(pixels[index]),
        }
        for index, name in enumerate(plan.protocol.classes)
    }
    records = evaluation.tally.images.values()
    return {
        "name": row.name,
        "method": row.setup.method,
        "arm": row.arm,
        "options": row.options,
        "threshold": row.setup.threshold,
        "arm_threshold": row.setup.arm_threshold if row.arm else None,
        "pamr": row.pamr,
        **{name: _percent(figures[name]) for name in FIGURES if name in figures},
        "classes_in_labels": int((pixels > 0).sum()),
        "seconds_per_image": {
            "method": _mean(record["seconds"][row.name] for record in records),
            "trunk": _mean(record["trunk_seconds"][row.name] for record in records),
        },
        "published": [
            dict(entry)
            for entry in plan.protocol.published_for(row.setup.method, row.arm, plan.backbone, row.pamr is not None)
        ],
        "per_class": per_class,
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The results for people."""
    model, data, protocol = results["model"], results["data"], results["protocol"]
    rows = results["results"]
    boundary = any("boundary_iou" in row for row in rows)
    metric = any("metric" in row for row in rows)
    head = [
        "method",
        "mIoU",
        "of classes in labels",
        *(["mIoU (evaluate)"] if metric else []),
        *(["boundary IoU"] if boundary else []),
    ]
    head += ["pixel acc.", "mean acc.", "fw IoU", "ms: method + trunk", "the papers' mIoU"]
    body = []
    for row in rows:
        seconds = row["seconds_per_image"]
        line = [row["name"] + (" + PAMR" if row["pamr"] else "")]
        line += [_show(row["mean_iou"]), _show(row["mean_iou_in_labels"])]
        line += [_show(row["metric"]["mean_iou"])] if metric else []
        line += [_show(row.get("boundary_iou"))] if boundary else []
        line += [_show(row["overall_accuracy"]), _show(row["mean_accuracy"]), _show(row["fw_iou"])]
        line += [f"{1000 * seconds['method']:.0f} + {1000 * seconds['trunk']:.0f}", _published(row["published"])]
        body.append(line)
    lines = [
        f"# {protocol['title']}",
        "",
        f"{model['name']} ({model['type']}, {model['dtype']}, {model['parameters'] / 1e6:.1f} M parameters) on "
        f"{data['name']}, {data['split']}: {data['images']} images, {rows[0]['classes_in_labels']} of "
        f"{len(protocol['classes'])} classes occur in the labels. arm_hf {results['arm_hf']}, torch "
        f"{results['versions']['torch']}, transformers {results['versions']['transformers']}, {results['device']}, "
        f"{results['processes']} process{'es' if results['processes'] > 1 else ''}.",
        "",
        *_table(head, body, left=(0, len(head) - 1)),
        "",
        f"How to read the last column: {results['comparable']}",
        *_gains(rows, boundary),
        *(f"\nLeft out: {name}: {reason}" for name, reason in results["left_out"].items()),
        "",
        *_protocol_section(results),
        *_class_section(rows),
    ]
    return "\n".join(lines) + "\n"


def image_scores(evaluation: Evaluation) -> str:
    """CSV: index and name of every image, and per row the mIoU of that image alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [row.name for row in evaluation.plan.rows]
    writer.writerow(["index", "image", *names])
    for index, record in sorted(evaluation.tally.images.items()):
        writer.writerow([index, record["name"], *(_number(record["miou"][name]) for name in names)])
    return text.getvalue()


def _gains(rows: Sequence[Mapping[str, Any]], boundary: bool) -> list[str]:
    alone = {row["method"]: row for row in rows if not row["arm"]}
    pairs = [(alone[row["method"]], row) for row in rows if row["arm"] and row["method"] in alone]
    if not pairs:
        return []
    keys = ["mean_iou", *(["boundary_iou"] if boundary else [])]
    gains = [[_difference(with_arm.get(key), host.get(key)) for key in keys] for host, with_arm in pairs]
    body = [[host["method"], *map(_signed, gain)] for (host, _), gain in zip(pairs, gains, strict=True)]
    body.append(["mean", *(_signed(_mean_of_known(column)) for column in zip(*gains, strict=True))])
    titles = ["what ARM adds to", "mIoU", *(["boundary IoU"] if boundary else [])]
    return ["", *_table(titles, body, left=(0,))]


def _protocol_section(results: Mapping[str, Any]) -> list[str]:
    protocol = results["protocol"]
    lines = [
        f"## Protocol `{protocol['name']}`",
        "",
        f"- labels: {protocol['labels']} (here: {results['data']['labels']}); {protocol['source']}",
        f"- metric: {protocol['metric']}",
    ]
    if "arm_threshold_source" in protocol:
        lines.append(f"- threshold with ARM: {protocol['arm_threshold_source']}")
    body = []
    for name, setup in protocol["methods"].items():
        seen = setup["input"]
        side = "model's" if seen["short_side"] is None else str(seen["short_side"])
        window = "whole" if seen["window"] is None else f"{seen['window']}/{seen['stride']}"
        scale = setup["options"].get("logit_scale")
        thresholds = [_plain(setup["threshold"]), _plain(setup["arm_threshold"]), _plain(setup["area_threshold"])]
        templates = setup["templates"] if isinstance(setup["templates"], str) else f"{len(setup['templates'])} own"
        resized = f"{seen['interpolation']}, {seen['rounding']}"
        source = "; ".join([setup["source"], *setup["notes"]])
        body.append([name, side, resized, window, seen["odd_sizes"], _plain(scale), *thresholds, templates, source])
    head = ["method", "short side", "resize, rounding", "window/stride", "odd sizes", "logit scale", "threshold"]
    head += ["with ARM", "area", "templates", "source and notes"]
    return [*lines, "", *_table(head, body, left=(0, 2, 10)), ""]


def _class_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name, entry in rows[0]["per_class"].items() if entry["pixels"]]
    body = [[name, *(_show(row["per_class"][name]["iou"]) for row in rows)] for name in names]
    return ["## IoU of the classes that occur", "", *_table(["class", *(row["name"] for row in rows)], body, left=(0,))]


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """A Markdown table; columns in `left` are left-aligned, the others right."""
    rule = [":--" if index in left else "--:" for index in range(len(head))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *body)]
    return [f"| {' | '.join(line)} |" for line in escaped]


def _published(entries: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for entry in entries:
        note = f", {entry['note']}" if entry.get("note") else ""
        parts.append(f"{entry['miou']} ({entry['backbone']}, {entry['source']}{note})")
    return "; ".join(parts) or NO_NUMBER


def clear_results(out: str | Path, overwrite: bool) -> None:
    """Make sure that results may be written into a folder, and take earlier ones away if they may be replaced.

    Args:
        out: Folder of the results.
        overwrite: Whether earlier ones may be replaced.

    Raises:
        ValueError: There are results already, or the folder is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"the results cannot go to {str(out)!r}: it is a file")
    earlier = out / "results.json"
    if not earlier.exists():
        return
    if not overwrite:
        raise ValueError(f"{str(earlier)!r} is there already; choose another --out, or pass --overwrite")
    for path in (earlier, *(out / "pictures").glob("worst_*.jpg"), *(out / "pictures").glob("best_*.jpg")):
        path.unlink()


def write_results(out: str | Path, results: Mapping[str, Any], evaluation: Evaluation) -> list[Path]:
    """Write `confusion.npz`, `images.csv`, `results.md` and, last, `results.json` (strict: no NaN), each in one step.

    `confusion.npz` holds `classes` and for each row the pixels of each right class by what was found, none last.

    Args:
        out: Folder of the results.
        results: From `build_results`.
        evaluation: What was counted.
    """
    texts = {
        "images.csv": image_scores(evaluation),
        "results.md": markdown(results),
        "results.json": json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    paths = [Path(out) / "confusion.npz"]
    counts: dict[str, Any] = {
        f"row {row.name}": evaluation.tally.matrices[row.name].counts[:-1] for row in evaluation.plan.rows
    }
    with atomic_path(paths[0]) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, classes=np.array(evaluation.plan.protocol.classes), **counts)
    for name, text in texts.items():
        paths.append(Path(out) / name)
        with atomic_path(paths[-1]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def summary(results: Mapping[str, Any]) -> list[str]:
    """A few lines for the terminal."""
    rows = results["results"]
    width = max(len(row["name"]) for row in rows)
    figures = ("mean_iou", "mean_iou_in_labels", "boundary_iou", "overall_accuracy")
    titles = ("mIoU", "in labels", "boundary", "pixels")
    lines = [f"{'':<{width}} {''.join(f'{title:>10}' for title in titles)}  the papers' mIoU (their data and CLIP)"]
    for row in rows:
        numbers = "".join(f"{_show(row.get(figure)):>10}" for figure in figures)
        lines.append(f"{row['name']:<{width}} {numbers}  {_published(row['published'])}")
    return lines


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else round(100 * float(value), 4)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _show(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{value:+.2f}"


def _plain(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{value:g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
