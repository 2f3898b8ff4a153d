"""Plots with matplotlib: training curves, bars of results, IoU per class, confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arm_hf.folders import atomic_path
from arm_hf.plot_data import Result, TrainingLog, smooth

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("plots need matplotlib; install it with: pip install 'arm_hf[plots]'") from error

# Okabe and Ito's colours that can be read on white, for every kind of eye.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
PLAIN, REFINED, PAPER = "#56B4E9", "#D55E00", "#222222"
_GRID = {"color": "#dddddd", "linewidth": 0.8}
_PAPERS = "the papers' (their CLIP and data)"
_MOST_NUMBERED = 25  # classes up to which a confusion matrix shows its numbers


def training_curves(logs: Sequence[TrainingLog], keys: Sequence[str] = ("loss", "lr"), width: int = 20) -> Figure:
    """One panel for each key and one for the validation mIoU, one colour for each run.

    Args:
        logs: The runs.
        keys: Curves to show; those that no run has are left out.
        width: Values of a running mean that is drawn over the curve of the loss; 1 draws the curve alone.

    Raises:
        ValueError: None of the runs has any of the keys, or the width is below 1.
    """
    if width < 1:
        raise ValueError(f"the width of the running mean must be at least 1, got {width}")
    panels = [key for key in keys if any(key in log.curves for log in logs)]
    scored = any(log.mean_iou for log in logs)
    if not panels and not scored:
        known = sorted({key for log in logs for key in log.curves})
        raise ValueError(f"no run has {', '.join(keys)}; there are {', '.join(known)}")
    figure, axes = _panels(len(panels) + scored)
    for axis, key in zip(axes, panels, strict=False):
        for number, log in enumerate(logs):
            if key not in log.curves:
                continue
            steps, values = log.curves[key]
            smoothed = key == "loss" and width > 1 and len(values) > width
            axis.plot(steps, values, color=_line(number), alpha=0.3 if smoothed else 1.0, linewidth=1.2)
            if smoothed:
                axis.plot(steps, smooth(values, width), color=_line(number), linewidth=2.0)
        axis.set_title(key, loc="left")
        if key == "lr":
            axis.yaxis.set_major_formatter("{x:g}")
    if scored:
        _validation_panel(axes[-1], logs)
    for axis in axes:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(logs) > 1:
        handles = [axes[0].plot([], [], color=_line(number), linewidth=2.0)[0] for number in range(len(logs))]
        _legend_below(figure, handles, [log.name for log in logs])
    return figure


def result_bars(results: Sequence[Result], papers: bool = False) -> Figure:
    """mIoU as bars: a panel for each data set and a row for each method, or, without methods, a row for each data set.

    Args:
        results: The rows; ARM and its host share a place.
        papers: Mark the papers' numbers. They are for the CLIP and the whole data set that each paper names, so bars
            and marks are comparable only where these are the same.

    Raises:
        ValueError: There is no result with an mIoU.
    """
    results = [result for result in results if result.mean_iou is not None]
    if not results:
        raise ValueError("there is no mIoU to plot")
    by_data = any(result.method for result in results)
    groups = list(dict.fromkeys(result.data if by_data else "" for result in results))
    members = {group: [r for r in results if not by_data or r.data == group] for group in groups}
    places = {
        group: list(dict.fromkeys(r.method if by_data else r.data for r in found)) for group, found in members.items()
    }
    longest = max(len(name) for names in places.values() for name in names)
    rows = max(len(names) for names in places.values())
    figure, axes = _panels(len(groups), height=1.3 + 0.55 * rows, width=3.6 + 0.08 * longest)
    handles: dict[str, Any] = {}
    for axis, group in zip(axes, groups, strict=True):
        refined = {r.arm for r in members[group]}
        thick = 0.38 if len(refined) == 2 else 0.6
        for result in members[group]:
            assert result.mean_iou is not None
            place = places[group].index(result.method if by_data else result.data)
            shift = 0.0 if len(refined) == 1 else (thick / 2 if result.arm else -thick / 2)
            color, name = (REFINED, "with ARM") if result.arm else (PLAIN, "without ARM")
            handles[name] = axis.barh(place + shift, result.mean_iou, thick, color=color)
            axis.annotate(
                f"{result.mean_iou:.1f}",
                (result.mean_iou, place + shift),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
            if papers and result.papers:
                marks = axis.plot(
                    result.papers,
                    [place + shift] * len(result.papers),
                    marker="D",
                    linestyle="",
                    markersize=5,
                    markerfacecolor="none",
                    color=PAPER,
                )
                handles[_PAPERS] = marks[0]
        axis.set_yticks(range(len(places[group])), places[group])
        axis.invert_yaxis()
        axis.set_title(group or "mIoU in %", loc="left")
        if group:
            axis.set_xlabel("mIoU in %")
        highest = max(
            [r.mean_iou or 0.0 for r in members[group]] + [m for r in members[group] for m in r.papers if papers]
        )
        axis.set_xlim(0, max(1.0, 1.15 * highest))
        axis.grid(axis="y", visible=False)
    order = sorted(handles, key=["without ARM", "with ARM", _PAPERS].index)
    _legend_below(figure, [handles[name] for name in order], order)
    return figure


def class_bars(results: Sequence[Result], most: int = 60) -> Figure:
    """IoU of every class as points on a line, the best of the first row above; one colour for each row.

    Args:
        results: Rows of one data set.
        most: Show at most so many classes: those where the first row is best and worst.

    Raises:
        ValueError: The rows are of several data sets, or no class occurs.
    """
    sets = list(dict.fromkeys(result.data for result in results))
    if len(sets) != 1:
        raise ValueError(f"classes can be compared on one data set only, got {', '.join(sets) or 'none'}")
    first = results[0].per_class
    names = sorted(first, key=lambda name: -_number(first[name]))
    if not names:
        raise ValueError(f"no class occurs in the labels of {sets[0]}")
    left_out = max(0, len(names) - most)
    if left_out:
        names = names[: most // 2] + names[len(names) - (most - most // 2) :]
    figure, (axis,) = _panels(1, height=1.4 + 0.24 * len(names), width=7.5)
    handles = []
    for place, name in enumerate(names):
        values = [_number(result.per_class.get(name)) for result in results]
        axis.plot([min(values), max(values)], [place, place], color="#bbbbbb", linewidth=2, zorder=1)
    for number, result in enumerate(results):
        values = [_number(result.per_class.get(name)) for name in names]
        handles.append(axis.scatter(values, range(len(names)), s=34, color=_line(number), zorder=2))
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xlabel("IoU in %")
    note = f" ({left_out} in the middle left out)" if left_out else ""
    axis.set_title(f"{sets[0]}: IoU of each class{note}", loc="left")
    _legend_below(figure, handles, [_with_mean(result) for result in results])
    return figure


def confusion_plot(counts: np.ndarray, classes: Sequence[str], title: str = "", most: int = 40) -> Figure:
    """A confusion matrix in percent of each right class: what its pixels were taken for.

    Args:
        counts: Pixels, (K, K) or (K, K + 1), the right class down, the found one across; a further column is "none of
            the classes".
        classes: The K names.
        title: What was measured.
        most: Show at most so many classes, those with the most pixels.

    Raises:
        ValueError: The shapes do not fit, or no class occurs.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2 or len(counts) != len(classes) or counts.shape[1] - len(classes) not in (0, 1):
        raise ValueError(f"counts must be (K, K) or (K, K + 1) with K = {len(classes)}, got {counts.shape}")
    totals = counts.sum(axis=1)
    present = [int(index) for index in np.argsort(-totals, kind="stable") if totals[index] > 0]
    if not present:
        raise ValueError("no class occurs in the labels")
    rows = sorted(present[:most])
    shares = counts[np.ix_(rows, rows)]
    # Classes that are not shown and "none of the classes", so that every row adds up to 100.
    other = totals[rows] - shares.sum(axis=1)
    row_names = [classes[index] for index in rows]
    column_names = list(row_names)
    if other.any():
        shares, column_names = np.column_stack([shares, other]), [*row_names, "other"]
    shares = 100 * shares / totals[rows][:, None]
    side = 2.2 + (0.42 if len(rows) <= _MOST_NUMBERED else 0.26) * len(column_names)
    figure, (axis,) = _panels(1, height=side, width=side + 0.8)
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(column_names)), column_names, rotation=55, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), row_names)
    axis.grid(visible=False)
    axis.set_xlabel("found")
    axis.set_ylabel("right")
    left_out = len(present) - len(rows)
    note = f"; the {len(rows)} classes with the most pixels of {len(present)}" if left_out else ""
    axis.set_title(f"{title}\n% of the pixels of each class{note}".strip(), loc="left", fontsize=11)
    if len(rows) <= _MOST_NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                color = "white" if share > 55 else "#222222"
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(picture, ax=axis, fraction=0.035, pad=0.02)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in one step; the ending of the name (.png, .svg, .pdf) chooses the format.

    Args:
        figure: What to write.
        path: Where to.

    Raises:
        ValueError: matplotlib does not write that format.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"a plot is written as .png, .svg or .pdf, not as {Path(path).name!r}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, facecolor="white")


def _panels(count: int, height: float = 3.4, width: float = 4.6) -> tuple[Figure, list[Any]]:
    """A figure with axes side by side, three in a row at most."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, columns * width), rows * height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.set_axisbelow(True)
        axis.grid(**_GRID)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _validation_panel(axis: Any, logs: Sequence[TrainingLog]) -> None:
    styles = ("-", "--", ":", "-.")
    names = list(dict.fromkeys(name for log in logs for name in log.mean_iou))
    # The mean of one set is that set.
    if len(names) == 2 and "mean" in names:
        names.remove("mean")
    for number, log in enumerate(logs):
        for name in names:
            if name not in log.mean_iou:
                continue
            steps, values = log.mean_iou[name]
            # Of one run the sets have the colours, of several runs the line styles.
            color = _line(number if len(logs) > 1 else names.index(name))
            style = styles[names.index(name) % len(styles)] if len(logs) > 1 else "-"
            axis.plot(steps, values, style, color=color, marker="o", markersize=3.5, linewidth=1.8, label=name)
    axis.set_title("validation mIoU in %", loc="left")
    if len(names) > 1:
        handles, labels = axis.get_legend_handles_labels()
        first = dict(zip(reversed(labels), reversed(handles), strict=True))
        axis.legend([first[name] for name in names], names, frameon=False, fontsize=9)


def _legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    letters = 10 * figure.get_figwidth()  # that fit side by side
    columns = max(1, int(letters // (max(len(name) for name in names) + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)), frameon=False)


def _line(number: int) -> str:
    return LINES[number % len(LINES)]


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def _with_mean(result: Result) -> str:
    return result.name if result.mean_iou is None else f"{result.name}: mIoU {result.mean_iou:.1f}"
