"""Measure a model on the labelled val lists through the package's own code: full-resolution mIoU, with and without ARM.

The numbers are over the classes that occur in the ground truth of a list (the lists are small): they are comparable
with each other, not with the benchmarks that the sets come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from arm_hf.label_sets import load_label_set
from arm_hf.modeling.decision import QueryMaps, decide, window_boxes
from arm_hf.modeling.prompts import Vocabulary
from arm_hf.modeling.text import TextEncoder

from .data import IGNORE, class_names, load_photo, read_list


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        name: key in the results.
        dataset: folder of the set.
        list_name: list file.
        label_set: shipped label set with the words, or None for the set's own class names.
        shift: added to every label before comparison; labels that become negative are ignored.
        ignored: further label values that are ignored.
        subset_of: a task of the same set and words whose predictions are reused.
    """

    name: str
    dataset: str
    list_name: str = "val"
    label_set: str | None = None
    shift: int = 0
    ignored: tuple[int, ...] = ()
    subset_of: str | None = None


TASKS = (
    Task("voc20", "voc2012", "val_balanced", "voc20", shift=-1),
    Task("voc21", "voc2012", "val", "voc21"),
    Task("voc21_balanced", "voc2012", "val_balanced", "voc21", subset_of="voc21"),
    Task("coco_object", "coco_object", "val", "coco_object"),
    Task("coco_stuff171", "coco_stuff171", "val", "coco_stuff171"),
    Task("msrc21", "msrc", "val", None, ignored=(21, 22)),
    Task("camvid", "camvid", "val", None),
    Task("ade150", "ade20k150", "val", "ade150"),
)


@dataclass
class Confusion:
    """Confusion counts of one task.

    Attributes:
        matrix: (K, K) int64, rows ground truth, columns prediction.
        images: photos counted.
        boundary: (K, K) the same for pixels near a border between classes.
    """

    matrix: np.ndarray
    images: int = 0
    boundary: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def empty(cls, num_classes: int) -> Confusion:
        """All counts zero."""
        shape = (num_classes, num_classes)
        return cls(np.zeros(shape, dtype=np.int64), 0, np.zeros(shape, dtype=np.int64))

    def add(self, truth: np.ndarray, predicted: np.ndarray, near_border: np.ndarray) -> None:
        """Count one photo; pixels of value 255 in `truth` are ignored."""
        size = len(self.matrix)
        valid = truth != IGNORE
        pair = truth.astype(np.int64) * size + predicted
        self.matrix += np.bincount(pair[valid], minlength=size * size).reshape(size, size)
        self.boundary += np.bincount(pair[valid & near_border], minlength=size * size).reshape(size, size)
        self.images += 1

    def summary(self) -> dict[str, float | int]:
        """mIoU over present classes, pixel accuracy and border pixel accuracy in percent."""
        counts = self.matrix
        present = counts.sum(1) > 0
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        iou = counts.diagonal()[present] / np.maximum(union[present], 1)
        border = self.boundary
        return {
            "miou": round(100 * float(iou.mean()), 2) if present.any() else 0.0,
            "pixel_accuracy": round(100 * float(counts.trace() / max(1, counts.sum())), 2),
            "border_accuracy": round(100 * float(border.trace() / max(1, border.sum())), 2),
            "images": self.images,
            "classes_present": int(present.sum()),
        }

    def per_class(self, names: Sequence[str]) -> dict[str, float]:
        """IoU in percent of every present class."""
        counts = self.matrix
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        return {
            name: round(100 * float(counts[i, i] / max(1, union[i])), 1)
            for i, name in enumerate(names)
            if counts[i].sum() > 0
        }


def border_mask(truth: np.ndarray, radius: int = 4) -> np.ndarray:
    """Pixels within `radius` of a change of label (ignored strips count as a change)."""
    import cv2

    kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return cv2.dilate(truth, kernel) != cv2.erode(truth, kernel)


def task_vocabulary(task: Task, root: Path) -> Vocabulary:
    """Words of a task as a user of the package would give them."""
    if task.label_set is not None:
        return Vocabulary.build(load_label_set(task.label_set))
    names = class_names(root, task.dataset)
    return Vocabulary.build([name for i, name in enumerate(names) if i not in task.ignored])


def task_truth(task: Task, label: np.ndarray) -> np.ndarray:
    """Label map in the task's own indices."""
    truth = label.astype(np.int64)
    for value in task.ignored:
        truth[truth == value] = IGNORE
    moved = truth + task.shift
    return np.where((truth == IGNORE) | (moved < 0), IGNORE, moved).astype(np.uint8)


class Evaluator:
    """Holds a model with its processors and measures it.

    Args:
        model: an `ARMModel`.
        tokenizer: of its text tower.
        image_processor: of its images; decides the size the network sees.
        root: folder of the sets.
        templates: prompt templates.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, root: Path, templates: str = "imagenet80"):
        self.model = model.eval()
        self.processor = image_processor
        self.root = root
        self.templates = templates
        self.text = TextEncoder(model.clip, tokenizer)

    def maps(self, features: Any, refined: Tensor | None, words: Tensor, strength: float) -> QueryMaps:
        """Scores of one image's words from one pass through the tower.

        Args:
            features: the host's features.
            refined: R_v, or None if no strength needs it.
            words: E_t.
            strength: 0 leaves ARM out, 1 is ARM as it was trained, other values multiply M_r.
        """
        padding, size = features.trunk.padding, features.trunk.padded_size
        if strength == 0 or refined is None:
            scores = self.model.dense.score_map(features, words)
            return QueryMaps(scores.values, None, None, scores.activation, scores.scale, padding, size)
        coarse = self.model.coarse_map(features, words)
        activation = "softmax" if self.model.config.coarse_form == "logits" else "sigmoid"
        return QueryMaps(coarse, refined * strength, words, activation, 1.0, padding, size)

    @torch.inference_mode()
    def run(
        self,
        tasks: Sequence[Task] = TASKS,
        strengths: Sequence[float] = (0.0, 1.0),
        size: int | None = None,
        every: int = 1,
        method: str = "clearclip",
        longest: int = 2048,
    ) -> dict[str, dict[float, tuple[Confusion, tuple[str, ...]]]]:
        """Measure.

        Args:
            tasks: what to measure; sets that are not in the data folder are skipped.
            strengths: factors on M_r to measure with; 0 is the host without ARM.
            size: short side of what the network sees, None for the processor's.
            every: use every n-th photo of each list, for quick looks.
            method: host method.
            longest: limit of the longer side.

        Returns:
            task name -> strength -> counts and class names.
        """
        tasks = [task for task in tasks if (self.root / task.dataset).is_dir()]
        vocabularies = {task.name: task_vocabulary(task, self.root) for task in tasks}
        words = {
            name: self.text.class_embeddings(vocabulary.queries, self.templates)
            for name, vocabulary in vocabularies.items()
        }
        counts = {
            task.name: {s: Confusion.empty(vocabularies[task.name].num_classes) for s in strengths} for task in tasks
        }
        members = {task.name: set(read_list(self.root, task.dataset, task.list_name)[::every]) for task in tasks}
        for task in tasks:
            if task.subset_of and every > 1:
                members[task.name] &= members[task.subset_of]
        jobs: dict[tuple[str, str], list[Task]] = {}
        for task in tasks:
            for stem in sorted(members[task.name]):
                jobs.setdefault((task.dataset, stem), []).append(task)
        options = {"do_center_crop": False, "return_tensors": "pt"}
        if size is not None:
            options["size"] = {"shortest_edge": size, "longest_edge": max(longest, size)}
        for (dataset, stem), wanted in tqdm(jobs.items(), desc="evaluate", unit="photo", mininterval=10):
            photo = load_photo(self.root, dataset, stem)
            pixels = self.processor(images=Image.fromarray(photo.image), **options)["pixel_values"]
            features = self.model.features(pixels, method)
            refined = self.model.refinement_features(features) if any(strengths) else None
            predictions: dict[tuple[str, float], np.ndarray] = {}
            for task in wanted:
                truth = task_truth(task, photo.label)
                near = border_mask(truth)
                source = task.subset_of or task.name
                for strength in strengths:
                    if (source, strength) not in predictions:
                        maps = self.maps(features, refined, words[source], strength)
                        image_size = (pixels.shape[-2], pixels.shape[-1])
                        decision = decide(
                            maps,
                            window_boxes(image_size, None, None),
                            image_size,
                            vocabularies[source].class_of_query,
                            num_classes=vocabularies[source].num_classes,
                            output_size=photo.label.shape,
                        )
                        predictions[source, strength] = decision.labels.numpy()
                    counts[task.name][strength].add(truth, predictions[source, strength], near)
        return {
            name: {s: (c, tuple(vocabularies[name].id2label.values())) for s, c in by_strength.items()}
            for name, by_strength in counts.items()
        }


def results_table(results: Mapping[str, Mapping[float, tuple[Confusion, tuple[str, ...]]]]) -> dict[str, dict]:
    """The numbers as plain containers: task -> {"without_arm": {...}, "with_arm": {...}}."""
    label = {0.0: "without_arm", 1.0: "with_arm"}
    return {
        name: {
            label.get(s, str(s)): {**c.summary(), "iou": c.per_class(names)} for s, (c, names) in by_strength.items()
        }
        for name, by_strength in results.items()
    }
