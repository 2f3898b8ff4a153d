"""Is a data set complete and sound? What is missing, malformed or out of range, and where to get it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from . import open_data
from .layouts import LAYOUTS, Layout
from .plain_folder import PlainFolder
from .segmentation_data import SegmentationData
from .standard_trees import TreeFiles, candidates, find_tree, get_layout


@dataclass
class SplitReport:
    """What was found in one split.

    Attributes:
        split: Its name.
        listed: Number of images that should be there.
        read: Number of pairs that were decoded.
        num_classes: K.
        pixels: Pixels of each class, (K,), in the pairs that were decoded.
        problems: One line each.
    """

    split: str
    listed: int = 0
    read: int = 0
    num_classes: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for people."""
        seen = int((self.pixels > 0).sum())
        state = "no problems" if not self.problems else f"{len(self.problems)} problem(s)"
        return (
            f"{self.split}: {self.listed} images, {self.read} read, {seen} of {self.num_classes} classes seen; {state}"
        )


@dataclass
class DataReport:
    """What was found in a data set.

    Attributes:
        source: Where.
        layout: Which standard data set it is, or None.
        splits: One report each.
    """

    source: str
    layout: Layout | None
    splits: list[SplitReport]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(report.problems for report in self.splits)

    def lines(self, most: int = 10) -> list[str]:
        """Text for people, with at most so many problems of each split."""
        what = f"{self.layout.name} ({self.layout.title})" if self.layout is not None else "a folder of its own"
        lines = [f"{self.source}: {what}"]
        for report in self.splits:
            lines.append(f"  {report.summary()}")
            lines += [f"    {problem}" for problem in report.problems[:most]]
            if len(report.problems) > most:
                lines.append(f"    ... and {len(report.problems) - most} more")
        if not self.sound and self.layout is not None:
            lines += download_lines(self.layout)
        return lines


def download_lines(layout: Layout) -> list[str]:
    """What to get for a layout, and where to put it."""
    return [
        f"  to download for {layout.name}, into folders below the one you name:",
        *(f"    {line}" for line in layout.downloads),
    ]


def check_folder(
    folder: str | Path,
    splits: Sequence[str] | None = None,
    layout: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> DataReport:
    """Check a folder with `classes.json`, or a standard tree.

    Args:
        folder: As for `open_data`.
        splits: Which ones; otherwise every list of a folder of one's own, or train and val of a tree.
        layout: As for `open_data`; a tree that is not there yet is reported as missing.
        limit: Decode only the first so many pairs of each split.
        workers: Number of threads that decode; as many as there are processors, otherwise.
        progress: Wraps the pairs of each split, such as `tqdm`.

    Raises:
        ValueError: There is no such layout or split, or the folder is no data set at all.
    """
    root = Path(folder).expanduser()
    if layout is None and (root / "classes.json").exists():
        names = splits or sorted(path.stem for path in root.glob("*.txt"))
        if not names:
            raise ValueError(f"there is no list of names (train.txt, val.txt) in {str(root)!r}")
        reports = [_check_split(PlainFolder(root, split), None, limit, workers, progress) for split in names]
        return DataReport(str(folder), None, reports)
    names = splits or ("train", "val")
    known = get_layout(layout) if layout is not None else _recognise(root, names)
    reports = []
    for split in names:
        files = find_tree(root, split, known.name)
        if files is None:
            reports.append(SplitReport(split, problems=[_absence(known, split, root)], num_classes=known.num_classes))
        else:
            reports.append(_check_split(files, known, limit, workers, progress))
    return DataReport(str(folder), known, reports)


def check_hub(
    source: str, split: str, limit: int | None, progress: Callable[[Iterable], Iterable] = iter, **columns: Any
) -> DataReport:
    """Check a split of a hub data set, streamed; `columns` are those arguments of `open_data`.

    Args:
        source: Hub id.
        split: Which split.
        limit: Decode only the first so many rows.
        progress: Wraps the rows, such as `tqdm`.
        columns: Other arguments of `open_data`.

    Raises:
        ValueError: As `open_data` does.
    """
    data = open_data(source, split, streaming=True, **columns)
    report = SplitReport(split, num_classes=len(data.classes), pixels=np.zeros(len(data.classes), dtype=np.int64))
    _read_all(data, islice(data.dataset, limit), report, 1, progress)
    report.listed = report.read + len(report.problems)
    if report.listed == 0:
        report.problems.append("there are no images")
    return DataReport(source, LAYOUTS.get(columns.get("layout") or ""), [report])


def _recognise(root: Path, splits: Sequence[str]) -> Layout:
    found = [find_tree(root, split) for split in splits]
    known = next((files.layout for files in found if files is not None), None)
    if known is None:
        raise ValueError(
            f"{str(root)!r} is no data set that is recognised: it holds no classes.json; to learn what it lacks of a "
            f"standard one, name its layout: {', '.join(LAYOUTS)}"
        )
    return known


def _absence(layout: Layout, split: str, root: Path) -> str:
    """Which folders are missing, for the place that has the most of what it needs."""
    places = candidates(layout, split, root)
    best = max(places, key=lambda files: files.images[0].is_dir() + 2 * files.labels[0].is_dir())
    lacking = [folder for folder in (best.images[0], best.labels[0]) if not folder.is_dir()]
    if not lacking:
        return f"there are no label maps *{best.labels[1]} in {str(best.labels[0])!r}"
    return " and ".join(f"there is no folder {str(folder)!r}" for folder in lacking)


def _check_split(
    files: PlainFolder | TreeFiles,
    layout: Layout | None,
    limit: int | None,
    workers: int | None,
    progress: Callable[[Iterable], Iterable],
) -> SplitReport:
    report = SplitReport(files.split)
    try:
        names, images, labels = files.names(), files.found_images(), files.found_labels()
        report.listed = len(names)
        report.problems += [f"there is no image for {name!r}" for name in names if name not in images]
        report.problems += [f"there is no label map for {name!r}" for name in names if name not in labels]
        if isinstance(files, TreeFiles) and not files.tree.names:
            report.problems += [f"there is no label map for {name!r}" for name in images if name not in labels]
        data = files.open([name for name in names if name in images and name in labels])
    except ValueError as error:
        report.problems.append(str(error))
        return report
    published = layout.sizes.get(files.split) if layout is not None else None
    if published is not None and report.listed < published:
        report.problems.append(f"there are {report.listed} images, published are {published}")
    report.num_classes = len(data.classes)
    report.pixels = np.zeros(len(data.classes), dtype=np.int64)
    _read_all(data, islice(data.dataset, limit), report, workers or os.cpu_count() or 1, progress)
    return report


def _read_all(
    data: SegmentationData,
    rows: Iterable[Any],
    report: SplitReport,
    workers: int,
    progress: Callable[[Iterable], Iterable],
) -> None:
    """Decode the rows; count pixels and note what cannot be decoded."""

    def read(row: Any) -> np.ndarray | str:
        try:
            _, labels = data.read(row)
        except ValueError as error:
            return str(error)
        return np.bincount(labels[labels != data.ignore_index], minlength=len(data.classes))

    with ThreadPoolExecutor(workers) as threads:
        for result in progress(threads.map(read, rows)):
            if isinstance(result, str):
                report.problems.append(result)
            else:
                report.read += 1
                report.pixels += result
