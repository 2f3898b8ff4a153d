"""What plots are made from: results of `arm-hf evaluate`, results of a model card, logs of a training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """One measured row. Figures are percentages.

    Attributes:
        data: The data set it was measured on.
        method: The method; "" where a file does not name one.
        arm: Whether ARM refined it.
        mean_iou: mIoU; None if no class occurs.
        per_class: IoU of the classes that occur.
        papers: The papers' mIoU for this row, each for the CLIP and the data that the paper names.
    """

    data: str
    method: str
    arm: bool
    mean_iou: float | None
    per_class: Mapping[str, float]
    papers: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Method and ARM, for a legend."""
        if not self.method:
            return "with ARM" if self.arm else "without ARM"
        return f"{self.method} + ARM" if self.arm else self.method


@dataclass(frozen=True)
class TrainingLog:
    """What a run wrote: steps and values of each curve. mIoU is in percent.

    Attributes:
        name: The run.
        curves: Curve (`loss`, `lr`, `grad_norm`, `images_per_second`, ...) to steps and values.
        mean_iou: Validation set to steps and values.
    """

    name: str
    curves: Mapping[str, tuple[list[int], list[float]]]
    mean_iou: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)


def read_results(path: str | Path) -> list[Result]:
    """Read `results.json` (or the folder it lies in) of `arm-hf evaluate`, or a file of `hub_cards/results/`.

    Raises:
        ValueError: There is no such file, or it holds no results.
    """
    path = Path(path).expanduser()
    path = path / "results.json" if path.is_dir() else path
    record = _read_json(path)
    try:
        found = _of_evaluation(record) if "results" in record else _of_card(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} holds no results that are known here: {error!r}") from error
    if not found:
        raise ValueError(f"{str(path)!r} holds no results")
    return found


def read_log(path: str | Path) -> TrainingLog:
    """Read the `log.jsonl` of a training run (or the run's folder). A last line that was cut short is left out.

    Raises:
        ValueError: There is no such file, or it is no log.
    """
    path = Path(path).expanduser()
    path = path / "log.jsonl" if path.is_dir() else path
    curves: dict[str, tuple[list[int], list[float]]] = {}
    scores: dict[str, tuple[list[int], list[float]]] = {}
    lines = _read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {str(path)!r} is not a line of a training log") from error
        for key, value in entry.items():
            if key == "mean_iou" and isinstance(value, dict):
                for name, score in value.items():
                    _append(scores, name, step, None if score is None else 100 * score)
            elif key != "step":
                _append(curves, key, step, value)
    if not curves and not scores:
        raise ValueError(f"{str(path)!r} holds no line of a training log")
    return TrainingLog(path.parent.name or path.stem, curves, scores)


def read_confusion(path: str | Path, row: str | None = None) -> tuple[str, np.ndarray, list[str]]:
    """Read a row's confusion matrix from `confusion.npz` (or the folder it lies in) of `arm-hf evaluate`.

    Args:
        path: The file or the folder.
        row: Which row; may be left out if there is only one.

    Returns:
        The row's name, pixel counts (K, K + 1) with the right class down and the found one across (the last column is
        "none of the classes"), and the K class names.

    Raises:
        ValueError: There is no such file or row, or it holds something else.
    """
    path = Path(path).expanduser()
    path = path / "confusion.npz" if path.is_dir() else path
    try:
        with np.load(path, allow_pickle=False) as arrays:
            classes = [str(name) for name in arrays["classes"]]
            rows = {name.removeprefix("row "): arrays[name] for name in arrays.files if name.startswith("row ")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the confusion matrices {str(path)!r}: {error}") from error
    if row is None and len(rows) != 1:
        raise ValueError(f"{str(path)!r} holds {len(rows)} rows; choose one: {', '.join(rows)}")
    name = next(iter(rows)) if row is None else row
    if name not in rows:
        raise ValueError(f"{str(path)!r} has no row {name!r}; there are {', '.join(rows)}")
    counts = rows[name]
    if counts.shape != (len(classes), len(classes) + 1):
        raise ValueError(f"the counts of {name!r} have the shape {counts.shape} for {len(classes)} classes")
    return name, counts, classes


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the last `width` values (fewer at the beginning); what is not finite is left out of it.

    Args:
        values: In order.
        width: Most values in a mean.
    """
    kept: list[float] = []
    result = []
    for value in values:
        if math.isfinite(value):
            kept = [*kept, value][-width:]
        result.append(sum(kept) / len(kept) if kept else math.nan)
    return result


def _of_evaluation(record: Mapping[str, Any]) -> list[Result]:
    data = record["data"]["name"]
    protocol = record["protocol"]["name"]
    title = data if protocol == "plain" else f"{data} ({protocol})"
    return [
        Result(
            title,
            row["method"],
            bool(row["arm"]),
            row["mean_iou"],
            {name: entry["iou"] for name, entry in row["per_class"].items() if entry["pixels"]},
            tuple(float(entry["miou"]) for entry in row["published"]),
        )
        for row in record["results"]
    ]


def _of_card(record: Mapping[str, Any]) -> list[Result]:
    found = []
    for data, variants in record["sets"].items():
        for key, arm in (("without_arm", False), ("with_arm", True)):
            if variants.get(key):
                found.append(Result(data, "", arm, variants[key]["miou"], variants[key]["iou"]))
    return found


def _append(curves: dict[str, tuple[list[int], list[float]]], key: str, step: int, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    steps, values = curves.setdefault(key, ([], []))
    steps.append(step)
    values.append(float(value))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"cannot read {str(path)!r}: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object")
    return record
