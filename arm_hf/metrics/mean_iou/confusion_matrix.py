"""mIoU and its relatives from one confusion matrix that grows with the classes, not with the images.

IoU, accuracy and their means are those of `evaluate.load("mean_iou")` (and of mmsegmentation): pixels are summed over
all images before anything is divided, pixels whose reference is `ignore_index` do not count, and a class that neither
prediction nor reference holds is NaN and no part of a mean. Frequency-weighted IoU: Long et al., "Fully Convolutional
Networks for Semantic Segmentation", CVPR 2015, section 5. Boundary IoU: Cheng et al., "Boundary IoU: Improving
Object-Centric Image Segmentation Evaluation", CVPR 2021.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np


class ConfusionMatrix:
    """Counts of pixels by reference and prediction.

    Args:
        num_classes: K. A reference or prediction outside of 0..K-1 is no class: it agrees with nothing and costs
            the class that the other one names.
        ignore_index: Reference of pixels that do not count.
        boundary_radius: How far from a region's edge pixels belong to its boundary, as a share of the image's diagonal
            (the paper takes 0.02, and 0.005 where images are large and carefully labelled, as in Cityscapes); None
            leaves the boundary IoU out.

    Attributes:
        counts: (K + 1, K + 1) int64, reference by prediction; the last of each are those that are no class.
        boundary: (3, K) int64: boundary pixels of the reference, of the prediction, and of both.

    Raises:
        ValueError: There is no class, or the radius is not a share.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, boundary_radius: float | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"the number of classes must be at least 1, got {num_classes}")
        if boundary_radius is not None and not 0 < boundary_radius < 1:
            raise ValueError(f"boundary_radius is a share of the diagonal, above 0 and below 1, got {boundary_radius}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.boundary_radius = boundary_radius
        self.counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
        self.boundary = np.zeros((3, num_classes), dtype=np.int64)

    @property
    def matrix(self) -> np.ndarray:
        """Pixels whose reference and prediction both are classes, (K, K), reference by prediction."""
        return self.counts[:-1, :-1]

    def update(self, predictions: np.ndarray, references: np.ndarray) -> None:
        """Count one image.

        Args:
            predictions: Class of every pixel, (H, W) of any integer type.
            references: The right class of every pixel, likewise.

        Raises:
            ValueError: The two differ in shape, are no maps, or do not hold whole numbers.
        """
        predictions, references = np.asarray(predictions), np.asarray(references)
        if predictions.shape != references.shape or predictions.ndim != 2:
            raise ValueError(
                f"prediction and reference must be (H, W) of one size, got {predictions.shape} and {references.shape}"
            )
        for name, values in (("predictions", predictions), ("references", references)):
            if not np.issubdtype(values.dtype, np.integer):
                raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
        self.add_pairs(predictions.ravel(), references.ravel())
        if self.boundary_radius is not None:
            self._add_boundaries(predictions, references)

    def add_pairs(self, predictions: np.ndarray, references: np.ndarray, times: np.ndarray | None = None) -> None:
        """Count pixels: their predictions and references, (N,), and how often each pair occurs (once).

        Args:
            predictions: Predicted label of each pixel, (N,).
            references: True label of each, (N,).
            times: How often each pair occurs, (N,); once by default.
        """
        size = self.num_classes + 1
        keep = references != self.ignore_index
        cells = self._rows(references[keep]) * size + self._rows(predictions[keep])
        if times is None:
            added = np.bincount(cells, minlength=size * size)
        else:
            added = np.zeros(size * size, dtype=np.int64)
            np.add.at(added, cells, times[keep])
        self.counts += added.reshape(size, size)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of other images.

        Raises:
            ValueError: The other one counts something else.
        """
        if self._settings() != other._settings():
            raise ValueError(f"cannot add counts of {other._settings()} to those of {self._settings()}")
        self.counts += other.counts
        self.boundary += other.boundary

    def reduce(self) -> ConfusionMatrix:
        """The sum over all processes (`accelerate`); every one of them must call this, and gets the same.

        Raises:
            RuntimeError: Several processes were launched, but `accelerate` has not joined them.
        """
        import torch
        from accelerate import PartialState
        from accelerate.utils import reduce

        state, launched = PartialState(), int(os.environ.get("WORLD_SIZE", "1"))
        if state.num_processes != launched:
            raise RuntimeError(
                f"{launched} processes were launched, accelerate knows of {state.num_processes}; make an "
                "accelerate.Accelerator() first"
            )
        flat = torch.from_numpy(np.concatenate([self.counts.ravel(), self.boundary.ravel()])).to(state.device)
        summed = reduce(flat, "sum").cpu().numpy()
        total = ConfusionMatrix(**self._settings())
        total.counts = summed[: self.counts.size].reshape(self.counts.shape)
        total.boundary = summed[self.counts.size :].reshape(self.boundary.shape)
        return total

    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**self._settings(), "counts": self.counts.tolist(), "boundary": self.boundary.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ConfusionMatrix:
        """The matrix that gave `state`.

        Raises:
            ValueError: It is no such state.
        """
        try:
            restored = cls(state["num_classes"], state["ignore_index"], state["boundary_radius"])
            counts = np.asarray(state["counts"], dtype=np.int64)
            boundary = np.asarray(state["boundary"], dtype=np.int64)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no state of a confusion matrix: {error!r}") from error
        if counts.shape != restored.counts.shape or boundary.shape != restored.boundary.shape:
            raise ValueError(f"the state has counts of shape {counts.shape}, expected {restored.counts.shape}")
        restored.counts, restored.boundary = counts, boundary
        return restored

    def compute(self) -> dict[str, Any]:
        """The figures so far.

        Returns:
            Fractions: `mean_iou`, `mean_accuracy`, `overall_accuracy`, `fw_iou`, and per class, (K,), NaN where there
            is nothing to divide by: `per_category_iou`, `per_category_accuracy`. With a boundary radius also
            `boundary_iou` (the mean) and `per_category_boundary_iou`.
        """
        both = np.diag(self.matrix).astype(np.float64)
        reference = self.counts[:-1].sum(axis=1).astype(np.float64)
        predicted = self.counts[:, :-1].sum(axis=0).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = both / (reference + predicted - both)
            accuracy = both / reference
            overall = both.sum() / reference.sum()
            frequency_weighted = np.nansum(reference * iou) / reference.sum()
        figures = {
            "mean_iou": _mean(iou),
            "mean_accuracy": _mean(accuracy),
            "overall_accuracy": float(overall),
            "fw_iou": float(frequency_weighted),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
        if self.boundary_radius is not None:
            of_reference, of_prediction, of_both = self.boundary.astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                boundary_iou = of_both / (of_reference + of_prediction - of_both)
            figures |= {"boundary_iou": _mean(boundary_iou), "per_category_boundary_iou": boundary_iou}
        return figures

    def _settings(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "boundary_radius": self.boundary_radius,
        }

    def _rows(self, values: np.ndarray) -> np.ndarray:
        """Index of each value in `counts`: itself, or the last for what is no class."""
        values = values.astype(np.int64)
        return np.where((values >= 0) & (values < self.num_classes), values, self.num_classes)

    def _add_boundaries(self, predictions: np.ndarray, references: np.ndarray) -> None:
        """Count boundary pixels; an ignored pixel is part of no region, neither of the reference nor predicted."""
        assert self.boundary_radius is not None
        ignored = references == self.ignore_index
        maps = [np.where(ignored, -1, self._rows(values)) for values in (references, predictions)]
        pixels = boundary_pixels(references.shape[0], references.shape[1], self.boundary_radius)
        edges = [near_edge(values, pixels) & (values >= 0) & (values < self.num_classes) for values in maps]
        for row, mask in enumerate((edges[0], edges[1], edges[0] & edges[1] & (maps[0] == maps[1]))):
            self.boundary[row] += np.bincount(maps[row % 2][mask], minlength=self.num_classes)


def boundary_pixels(height: int, width: int, radius: float) -> int:
    """Width of a boundary in whole pixels, at least 1: a share of the image's diagonal.

    Args:
        height: Of the image.
        width: Of the image.
        radius: Share of its diagonal.
    """
    return max(1, round(radius * float(np.hypot(height, width))))


def near_edge(labels: np.ndarray, distance: int) -> np.ndarray:
    """Whether a pixel lies within `distance` of another label or of the outside, (H, W) bool.

    That is each region without what is left of it after `distance` erosions by a 3 x 3 square, for all regions at once:
    the square of 2 `distance` + 1 pixels around the pixel leaves the image or holds two labels. It holds two labels if
    any two neighbours in it differ, which tables of sums answer at a cost that does not depend on `distance`.

    Args:
        labels: (H, W), whole numbers.
        distance: In pixels, at least 1.
    """
    height, width = labels.shape
    top, bottom = np.arange(height) - distance, np.arange(height) + distance
    left, right = np.arange(width) - distance, np.arange(width) + distance
    outside = ((top < 0) | (bottom >= height))[:, None] | ((left < 0) | (right >= width))[None]
    top, bottom = top.clip(0), bottom.clip(max=height - 1)
    left, right = left.clip(0), right.clip(max=width - 1)
    changes = _box_sums(labels[:, 1:] != labels[:, :-1], top, bottom + 1, left, right)
    changes += _box_sums(labels[1:] != labels[:-1], top, bottom, left, right + 1)
    return outside | (changes > 0)


def _box_sums(
    flags: np.ndarray, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """How many flags are set in rows top[y]..bottom[y]-1 and columns left[x]..right[x]-1, for every y and x."""
    sums = np.zeros((flags.shape[0] + 1, flags.shape[1] + 1), dtype=np.int32)
    np.cumsum(flags, axis=0, out=sums[1:, 1:], dtype=np.int32)
    np.cumsum(sums, axis=1, out=sums)
    rows = sums[bottom] - sums[top]
    return rows[:, right] - rows[:, left]


def _mean(values: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return float(np.nanmean(values))
