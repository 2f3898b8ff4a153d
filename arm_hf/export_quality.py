"""What 8-bit weights cost: mIoU of the exported graphs in 32 and in 8 bits on the same labelled photos."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arm_hf.folders import atomic_path
from arm_hf.metrics import ConfusionMatrix
from arm_hf.onnx_runner import IMAGE_GRAPH, OnnxSegmenter, int8_name


@dataclass(frozen=True)
class Quality:
    """Result of one kind of weights.

    Attributes:
        mean_iou: In percent, over the classes that occur.
        seconds: Mean time for a photo, words not counted.
        agreement: Share of pixels with the label that 32 bits give.
    """

    mean_iou: float
    seconds: float
    agreement: float


def compare_weights(
    folder: str | os.PathLike, data: Any, threads: int | None = None, progress: bool = False
) -> dict[str, Quality]:
    """Measure "float32" and "int8" graphs.

    Args:
        folder: What `arm-hf export --format onnx --int8` wrote.
        data: A `SegmentationData`; every class is one word.
        threads: Threads of onnxruntime.
        progress: Show a progress bar.
    """
    from tqdm import tqdm

    runners = {
        name: OnnxSegmenter(folder, int8, threads=threads) for name, int8 in (("float32", False), ("int8", True))
    }
    labels = {name: [name] for name in data.classes}
    embeddings = {name: runner.class_embeddings(data.classes) for name, runner in runners.items()}
    matrices = {name: ConfusionMatrix(len(data.classes), data.ignore_index) for name in runners}
    seconds, same, pixels = dict.fromkeys(runners, 0.0), dict.fromkeys(runners, 0), 0
    count = 0
    for row in tqdm(data.dataset, disable=not progress, unit="image"):
        image, expected = data.read(row)
        maps = {}
        for name, runner in runners.items():
            began = time.perf_counter()
            maps[name] = runner(image, labels, embeddings[name]).labels
            seconds[name] += time.perf_counter() - began
            matrices[name].update(maps[name], expected)
        for name in runners:
            same[name] += int(np.count_nonzero(maps[name] == maps["float32"]))
        pixels += expected.size
        count += 1
    return {
        name: Quality(100 * matrices[name].compute()["mean_iou"], seconds[name] / count, same[name] / pixels)
        for name in runners
    }


def save_quality(folder: str | os.PathLike, data: Any, qualities: Mapping[str, Quality]) -> Path:
    """Write `int8.json` beside the graphs, and return its path.

    Args:
        folder: What `arm-hf export --format onnx --int8` wrote.
        data: What was measured on.
        qualities: From `compare_weights`.
    """
    graphs = {"float32": IMAGE_GRAPH, "int8": int8_name(IMAGE_GRAPH)}
    record = {
        "data": data.name,
        "split": data.split,
        "images": len(data),
        "weights": {
            name: {**asdict(quality), "image_graph_bytes": (Path(folder) / graphs[name]).stat().st_size}
            for name, quality in qualities.items()
        },
    }
    path = Path(folder) / "int8.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
