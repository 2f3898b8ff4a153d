"""The images with the lowest and the highest scores: photo, right labels, and what every row found."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from arm_hf.drawing import overlay, segments
from arm_hf.evaluating import Evaluation, rows_of
from arm_hf.folders import atomic_path
from arm_hf.legend import add_legend, font_for
from arm_hf.shared_pass import SharedPass

TILE = 300
UNCOUNTED = "not counted"


def choose(evaluation: Evaluation, count: int) -> dict[str, list[int]]:
    """Indices of the worst and the best images, by the mean of their mIoU over the rows; none is in both.

    Args:
        evaluation: What was counted.
        count: Number of each.
    """
    scores = {}
    for index, record in evaluation.tally.images.items():
        values = [value for value in record["miou"].values() if value is not None]
        if values:
            scores[index] = sum(values) / len(values)
    order = sorted(scores, key=lambda index: (scores[index], index))
    half = min(count, len(order) // 2) if len(order) > 1 else len(order)
    return {"worst": order[:half], "best": order[len(order) - half :][::-1] if len(order) > 1 else []}


def write_pictures(
    pipe: Any, data: Any, evaluation: Evaluation, out: str | Path, count: int, window_batch_size: int = 16
) -> list[Path]:
    """Segment the chosen images once more and write a sheet for each into `out/pictures`.

    Args:
        pipe: The pipeline that was evaluated.
        data: The data that it was evaluated on.
        evaluation: The result.
        out: Folder of the results.
        count: Number of worst and of best images.
        window_batch_size: Windows per pass.
    """
    folder = Path(out) / "pictures"
    chosen = {
        index: f"{kind}_{place}"
        for kind, order in choose(evaluation, count).items()
        for place, index in enumerate(order, 1)
    }
    plan = evaluation.plan
    shared_pass = SharedPass(pipe, plan.rows, window_batch_size)
    written = []
    rows, _ = rows_of(data, evaluation.identity["data"]["limit"], evaluation.tally.images.keys() - chosen.keys())
    for index, row in rows:
        if index not in chosen:
            continue
        image, labels = data.read(row)
        record = evaluation.tally.images[index]
        sheet = draw_sheet(
            image, plan.table(labels), shared_pass(image).labels, plan.protocol.classes, plan.table.ignore_index, record
        )
        path = folder / f"{chosen[index]}_{re.sub(r'[^A-Za-z0-9._-]+', '_', record['name'])}.jpg"
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="JPEG", quality=88)
        written.append(path)
    return sorted(written)


def draw_sheet(
    image: Image.Image,
    references: np.ndarray,
    found: Mapping[str, np.ndarray],
    classes: tuple[str, ...],
    ignore_index: int,
    record: Mapping[str, Any],
) -> Image.Image:
    """Photo, right labels and found labels side by side.

    Args:
        image: The photo.
        references: The right labels, (H, W).
        found: Per row the labels, (H, W); -1 is "none of the classes".
        classes: Names.
        ignore_index: Label of pixels that do not count.
        record: Name and scores of the image.
    """
    uncounted = len(classes)
    id2label = {**dict(enumerate(classes)), uncounted: UNCOUNTED}
    maps = {"labels": np.where(references == ignore_index, uncounted, references)}
    for name, labels in found.items():
        score = record["miou"][name]
        title = name if score is None else f"{name}  {100 * score:.1f}"
        maps[title] = np.where(labels < 0, uncounted, labels)
    tiles = [(record["name"], image)]
    tiles += [
        (title, overlay(image, labels, id2label, alpha=0.65, names=False, legend=False))
        for title, labels in maps.items()
    ]
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    columns = min(len(tiles), max(2, math.ceil(math.sqrt(len(tiles) * size[1] / size[0] * 1.6))))
    lines = math.ceil(len(tiles) / columns)
    caption, gap = 22, 6
    sheet = Image.new("RGB", (columns * (size[0] + gap) + gap, lines * (size[1] + caption + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, picture) in enumerate(tiles):
        left = gap + number % columns * (size[0] + gap)
        top = gap + number // columns * (size[1] + caption + gap)
        font = font_for(title, 14)
        while font.getlength(title) > size[0] and len(title) > 4:
            title = title[:-2].rstrip(".") + "."
        pen.text((left + 1, top + 3), title, fill="black", font=font)
        sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, top + caption))
    everything = np.concatenate([labels.ravel() for labels in maps.values()])[None]
    return add_legend(sheet, segments(everything, id2label), shares=False)
