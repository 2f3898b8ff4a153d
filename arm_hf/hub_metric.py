"""mIoU by the metric of 🤗 evaluate itself (`evaluate.load("mean_iou")`), from label maps that were kept on disk.

Our own confusion matrix gives the same number in constant memory; this is for whoever wants the number from the hub's
code. Label maps take one small PNG per image and row until the results are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arm_hf.evaluating import Evaluation, rows_of
from arm_hf.folders import atomic_path
from arm_hf.partial_results import FOLDER

OURS, HUB = "ours", "hub"


class HubMetric:
    """The metric, and the label maps it will read.

    Args:
        source: "hub" for `evaluate.load("mean_iou")`, or the path of a metric with the same interface.
        out: Folder of the results.
        num_classes: K.
    """

    def __init__(self, source: str, out: str | Path, num_classes: int):
        self.source = source
        self.folder = Path(out) / FOLDER / "maps"
        self.dtype = np.uint8 if num_classes <= 255 else np.uint16

    def load(self) -> Any:
        """The metric.

        Raises:
            ValueError: It cannot be had; without a network the hub's cannot.
        """
        import evaluate

        try:
            return evaluate.load("mean_iou" if self.source == HUB else self.source)
        except (OSError, ImportError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"cannot load the metric mean_iou ({self.source}): {reason}; use --metric {OURS}, the same number"
            ) from error

    def keep(self, index: int, labels: Mapping[str, np.ndarray]) -> None:
        """Write the predicted labels of one image; "none of the classes" becomes a value that no class has.

        Args:
            index: Of the image.
            labels: Predicted labels by row, (H, W) each.
        """
        highest = np.iinfo(self.dtype).max
        for number, found in enumerate(labels.values()):
            with atomic_path(self._path(number, index)) as path:
                Image.fromarray(np.where(found < 0, highest, found).astype(self.dtype)).save(path, format="PNG")

    def compute(self, evaluation: Evaluation, data: Any) -> dict[str, dict[str, Any]]:
        """The metric's result for every row.

        Args:
            evaluation: What was evaluated.
            data: The data set, for the true labels.
        """
        table, protocol = evaluation.plan.table, evaluation.plan.protocol
        results = {}
        for number, row in enumerate(evaluation.plan.rows):
            metric = self.load()
            rows, _ = rows_of(data, evaluation.identity["data"]["limit"], ())
            for index, item in rows:
                with Image.open(self._path(number, index)) as image:
                    predicted = np.asarray(image).astype(self.dtype)
                reference = table(data.read(item)[1]).astype(self.dtype)
                metric.add_batch(predictions=[predicted], references=[reference])
            found = metric.compute(num_labels=len(protocol.classes), ignore_index=table.ignore_index)
            results[row.name] = {key: np.asarray(value).tolist() for key, value in found.items()}
        return results

    def _path(self, row: int, index: int) -> Path:
        return self.folder / str(row) / f"{index}.png"
