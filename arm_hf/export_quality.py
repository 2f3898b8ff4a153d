"""What 8-bit weights cost: mIoU of the exported graphs in 32 and in 8 bits on the same labelled photos."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from arm_hf.metrics import ConfusionMatrix
from arm_hf.onnx_runner import OnnxSegmenter


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
