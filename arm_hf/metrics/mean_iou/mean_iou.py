"""`evaluate.load("mean_iou")` in constant memory: the same call, the same numbers, counts instead of pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import evaluate
import numpy as np
from PIL import Image

from .confusion_matrix import ConfusionMatrix

_DESCRIPTION = """
IoU is the area of overlap between predicted and true segmentation divided by the area of their union; the mean IoU is
its average over the classes. Maps are counted when they are added and not kept: memory does not grow with the images.
"""

_CITATION = """
@inproceedings{cheng2021boundary,
  title = {Boundary {IoU}: Improving Object-Centric Image Segmentation Evaluation},
  author = {Cheng, Bowen and Girshick, Ross and Doll{\\'a}r, Piotr and Berg, Alexander C. and Kirillov, Alexander},
  booktitle = {CVPR},
  year = {2021}
}
"""

_INPUTS = """
Args:
    predictions: Predicted maps, (height, width) each, of any sizes: arrays, tensors, lists, PIL images or paths.
    references: True maps of the same sizes.
    num_labels (int): Number of classes.
    ignore_index (int): True label of pixels that do not count.
    nan_to_num (int, optional): Takes the place of NaN, the figure of a class that occurs nowhere.
    label_map (dict, optional): New label for a true label, applied to the labels as they are in the maps.
    reduce_labels (bool): Make true label 0 to 255 and lower the others by 1, as for ADE20K; 255 remains.

Returns:
    mean_iou, mean_accuracy, overall_accuracy, fw_iou (IoU weighted by the pixels of each class) as floats,
    per_category_iou and per_category_accuracy as arrays of shape (num_labels,). If the metric was loaded with
    `boundary_radius`, also boundary_iou and per_category_boundary_iou.

Examples:

    >>> import numpy as np
    >>> from arm_hf import metrics
    >>> mean_iou = metrics.load("mean_iou")
    >>> mean_iou.add(prediction=np.array([[0, 1], [1, 1]]), reference=np.array([[0, 0], [1, 255]]))
    >>> mean_iou.compute(num_labels=2, ignore_index=255)["mean_iou"]
    0.5
"""


@dataclass(frozen=True)
class _Settings:
    """What true labels mean; None is not said yet."""

    num_labels: int | None
    ignore_index: int | None
    label_map: Mapping[int, int] | None = None
    reduce_labels: bool | None = None

    def or_else(self, other: _Settings) -> _Settings:
        """These settings, and the other's where these say nothing."""
        mine = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **mine)

    def matrix(self, boundary_radius: float | None) -> ConfusionMatrix:
        """Counts of nothing yet."""
        if self.num_labels is None or self.ignore_index is None:
            raise ValueError("num_labels and ignore_index are needed, for compute or (for boundaries) when loading")
        return ConfusionMatrix(self.num_labels, self.ignore_index, boundary_radius)

    def relabel(self, labels: np.ndarray) -> np.ndarray:
        """The true labels as `label_map` and `reduce_labels` have them."""
        changed = labels.copy()
        for old, new in (self.label_map or {}).items():
            changed[labels == old] = new
        if self.reduce_labels:
            changed[changed == 0] = 255
            changed -= 1
            changed[changed == 254] = 255
        return changed


class MeanIoU(evaluate.Metric):
    """mean_iou of the hub, counted as maps arrive.

    Args:
        boundary_radius: Width of boundaries as a share of the image's diagonal (Cheng et al. take 0.02) to measure
            boundary IoU, too. The settings below must then be given here, for boundaries are found when maps are added.
        num_labels: Number of classes, for `compute`.
        ignore_index: True label of pixels that do not count.
        label_map: New label for a true label.
        reduce_labels: Make true label 0 to 255 and lower the others by 1.

    With `num_process` above 1 every process must call `compute`; the counts are added over all of them (`accelerate`),
    and process 0 gets the figures.
    """

    def __init__(
        self,
        *args: Any,
        boundary_radius: float | None = None,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool = False,
        **kwargs: Any,
    ) -> None:
        self._settings = _Settings(num_labels, ignore_index, label_map, reduce_labels)
        self._boundary_radius = boundary_radius
        self._reset()
        super().__init__(*args, **kwargs)

    def _reset(self) -> None:
        self._pairs: Counter[tuple[int, int]] = Counter()  # (prediction, reference) as given: pixels
        self._added = 0
        self._edges = None if self._boundary_radius is None else self._settings.matrix(self._boundary_radius)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def __len__(self) -> int:
        """Number of maps added since the last `compute`."""
        return self._added

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one pair of maps.

        Args:
            prediction: Predicted map, (H, W).
            reference: True map of the same size.
            kwargs: As the base class has them.
        """
        _refuse(kwargs, "prediction and reference")
        predictions, references = _to_map(prediction, "prediction"), _to_map(reference, "reference")
        if predictions.shape != references.shape:
            raise ValueError(f"a prediction of shape {predictions.shape} meets a reference of {references.shape}")
        self._pairs.update(_count_pairs(predictions.ravel(), references.ravel()))
        if self._edges is not None:
            self._edges.update(predictions, self._settings.relabel(references))
        self._added += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count several pairs of maps.

        Args:
            predictions: Predicted maps.
            references: True maps of the same sizes.
            kwargs: As the base class has them.
        """
        _refuse(kwargs, "predictions and references")
        if len(predictions) != len(references):
            raise ValueError(
                f"Mismatch in the number of predictions ({len(predictions)}) and references ({len(references)})"
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Give the figures of all maps since the last `compute`, and start anew.

        Args:
            predictions: Further predicted maps to count first.
            references: Their true maps.
            kwargs: `num_labels`, `ignore_index` and the other settings of the metric.
        """
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references belong together; one of them is missing")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._added and self.num_process == 1:
            raise ValueError("no maps were added")
        figures = self._compute(**kwargs)
        self._reset()
        return figures

    def _compute(
        self,
        *,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        nan_to_num: float | None = None,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool | None = None,
    ) -> dict[str, Any] | None:
        settings = _Settings(num_labels, ignore_index, label_map, reduce_labels).or_else(self._settings)
        if self._edges is not None and settings != self._settings:
            raise ValueError(f"boundaries were found with {self._settings}; figures with {settings} would not fit them")
        matrix = settings.matrix(self._boundary_radius)
        if self._pairs:
            values = np.array(list(self._pairs), dtype=np.int64)  # (P, 2)
            times = np.array(list(self._pairs.values()), dtype=np.int64)
            matrix.add_pairs(values[:, 0], settings.relabel(values[:, 1]), times)
        if self._edges is not None:
            matrix.boundary = self._edges.boundary
        if self.num_process > 1:
            matrix = self._sum_over_processes(matrix)
        if self.process_id > 0:
            return None
        figures = matrix.compute()
        if nan_to_num is not None:
            figures = {name: np.nan_to_num(value, nan=nan_to_num) for name, value in figures.items()}
        return figures

    def _sum_over_processes(self, matrix: ConfusionMatrix) -> ConfusionMatrix:
        from accelerate import PartialState

        running = PartialState().num_processes
        if running != self.num_process:
            raise ValueError(f"the metric was loaded for {self.num_process} processes, but {running} are running")
        return matrix.reduce()


def _refuse(unknown: Mapping[str, Any], known: str) -> None:
    if unknown:
        raise ValueError(f"unknown inputs {', '.join(unknown)}; the inputs are {known}")


def _to_map(given: Any, what: str) -> np.ndarray:
    if isinstance(given, str):
        with Image.open(given) as image:
            given = np.asarray(image)
    values = np.asarray(given)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"a {what} must be a map (height, width) of whole numbers, got {values.shape} {values.dtype}")
    return values.astype(np.int64)


def _count_pairs(predictions: np.ndarray, references: np.ndarray) -> dict[tuple[int, int], int]:
    """How often each pair of values occurs, for (N,) values."""
    if predictions.size == 0:
        return {}
    span = int(max(predictions.max(), references.max())) + 1
    if span <= 1024 and predictions.min() >= 0 and references.min() >= 0:
        table = np.bincount(references * span + predictions)
        cells = np.flatnonzero(table)
        found: Iterable[Sequence[int]] = zip((cells % span).tolist(), (cells // span).tolist(), strict=True)
        counts = table[cells]
    else:
        pairs, counts = np.unique(np.stack([predictions, references]), axis=1, return_counts=True)
        found = pairs.T.tolist()
    return {(first, second): count for (first, second), count in zip(found, counts.tolist(), strict=True)}
