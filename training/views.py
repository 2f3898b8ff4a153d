"""Training sets as numbered views: which images make up a step, and how an image is cut.

Everything here is a function of the seed, the epoch and the image alone: not of the number of processes, of the workers
that read, or of where a run was broken off. So a resumed run sees what the unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from arm_hf.data import SegmentationData, open_data
from arm_hf.label_sets import labels_from
from arm_hf.modeling.prompts import Label

from .options import TrainingOptions

Key = tuple[int, int, int]
"""A view: number of the set, number of the image in it, and the epoch whose crop is meant."""


@dataclass(frozen=True)
class TrainingSet:
    """A data set with the words to learn.

    Attributes:
        data: Images and labels.
        words: One word per query. A background class is no query: its pixels count as ignored.
        lookup: Query index of each label of `data`, or the run's ignore index.
    """

    data: SegmentationData
    words: tuple[str, ...]
    lookup: np.ndarray


def name_classes(data: SegmentationData, names: str) -> tuple[Label, ...]:
    """The classes of a data set with their words.

    Args:
        data: The data set.
        names: A label set, a text file with one class a line, or "own" for the data set's own names.

    Raises:
        ValueError: `names` holds another number of classes.
    """
    if names == "own":
        return tuple(Label(name, (name,)) for name in data.classes)
    labels = labels_from(names)
    if len(labels) != len(data.classes):
        raise ValueError(
            f"{names!r} names {len(labels)} classes, but {data.name!r} has {len(data.classes)} "
            f"({data.classes[0]!r} to {data.classes[-1]!r}); the order and the number must be the same"
        )
    return labels


def open_sets(options: TrainingOptions, sources: Sequence[str], split: str) -> list[SegmentationData]:
    """Open data sets and make sure that they hold images.

    Args:
        options: Layout and columns.
        sources: Folders, roots of standard trees, or hub ids.
        split: Which split.

    Raises:
        ValueError: A set is missing, malformed or empty.
    """
    opened = []
    for source in sources:
        data = open_data(
            source,
            split,
            layout=options.layout,
            image_column=options.image_column,
            label_column=options.label_column,
        )
        if len(data) == 0:
            raise ValueError(f"the data set {source!r} has no images in its split {split!r}")
        opened.append(data)
    return opened


def open_training_sets(options: TrainingOptions) -> tuple[list[TrainingSet], int]:
    """The training sets of a run, and the label of pixels that are not learnt: 255, or 65535 beyond 255 classes.

    Raises:
        ValueError: No set was named, or a set is missing, malformed, smaller than a batch, or has other classes.
    """
    if not options.data:
        raise ValueError("no training data: name at least one set with --data")
    opened = open_sets(options, options.data, options.split)
    ignore_index = 255 if max(len(data.classes) for data in opened) <= 255 else 65535
    sets = []
    for data, names in zip(opened, options.class_names or ["own"] * len(opened), strict=True):
        if len(data) < options.batch_size:
            raise ValueError(
                f"{data.name!r} has {len(data)} images, fewer than one batch (batch_size {options.batch_size}); use a "
                "smaller batch or more images"
            )
        labels = name_classes(data, names)
        kept = [index for index in range(len(labels)) if index != data.background_index]
        lookup = np.full(max(data.ignore_index, len(labels)) + 1, ignore_index, np.int64)
        lookup[kept] = np.arange(len(kept))
        sets.append(TrainingSet(data, tuple(labels[index].words[0] for index in kept), lookup))
    return sets, ignore_index


@dataclass(frozen=True)
class StepPlan:
    """The images of every optimiser step.

    A step takes all its images from one set: its words are then one matrix. Steps of the sets are shuffled among each
    other; the images of an incomplete last step of an epoch are left out (others in every epoch).

    Attributes:
        sizes: Images per set.
        batch_size: Images of a step.
        seed: Of the order.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is seen once, but for the remainder."""
        return sum(size // self.batch_size for size in self.sizes)

    def epoch(self, epoch: int) -> list[list[Key]]:
        """The steps of an epoch, in order."""
        random = np.random.default_rng((self.seed, epoch))
        steps = []
        for number, size in enumerate(self.sizes):
            order = random.permutation(size).tolist()
            for start in range(0, size - self.batch_size + 1, self.batch_size):
                steps.append([(number, image, epoch) for image in order[start : start + self.batch_size]])
        return [steps[index] for index in random.permutation(len(steps))]

    def parts(self, start: int, stop: int, parts: int, process: int, processes: int) -> Iterator[list[Key]]:
        """The views that one process works off from step `start` to `stop`: `parts` lists for each step.

        Args:
            start: First step.
            stop: One past the last.
            parts: Accumulation steps.
            process: Which process this is, from 0.
            processes: How many there are.
        """
        share = self.batch_size // (parts * processes)
        steps: list[list[Key]] = []
        for step in range(start, stop):
            epoch, number = divmod(step, self.steps_per_epoch)
            if not steps or number == 0:
                steps = self.epoch(epoch)
            mine = steps[number][process::processes]
            for part in range(parts):
                yield mine[part * share : (part + 1) * share]


class Views(Dataset):
    """Crops of the training images, by key.

    An entry is a mapping of `name`, `set`, `pixels` (3, S, S) and `labels` (S, S), or of `error` where a file is unfit.

    Args:
        sets: The training sets.
        options: Size of the crops, range of the resizing, probability of mirroring, seed.
        mean: Of the image processor.
        std: Of the image processor.
    """

    def __init__(
        self, sets: Sequence[TrainingSet], options: TrainingOptions, mean: Sequence[float], std: Sequence[float]
    ):
        self.sets, self.size, self.flip = sets, options.crop_size, options.flip
        self.seed = options.seed if options.view_seed is None else options.view_seed
        self.shorter_sides = (options.resize_min, options.resize_max)
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        number, index, epoch = key
        chosen = self.sets[number]
        row = chosen.data.dataset[index]
        name = f"{chosen.data.name}/{row['name']}"
        try:
            image, labels = chosen.data.read(row)
        except (ValueError, OSError) as error:  # told by the training process: a worker's own errors are long
            return {"error": f"cannot train on {name}: {error}"}
        random = np.random.default_rng((self.seed, epoch, number, index))
        box = self._draw_box(random, image.size)
        mirrored = random.random() < self.flip
        size = (self.size, self.size)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
        classes = chosen.lookup[labels].astype(np.int32)
        classes = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST, box=box))
        if mirrored:
            pixels, classes = pixels[:, ::-1], classes[:, ::-1]
        return {
            "name": name,
            "set": number,
            "pixels": torch.from_numpy(((pixels / np.float32(255) - self.mean) / self.std).transpose(2, 0, 1).copy()),
            "labels": torch.from_numpy(classes.copy()),
        }

    def _draw_box(self, random: np.random.Generator, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """A crop in pixels of the image (left, top, right, bottom): resizing it is resizing the image and cropping."""
        low, high = self.shorter_sides
        side = self.size * min(size) / random.uniform(low, high)
        left, top = random.uniform(0, size[0] - side), random.uniform(0, size[1] - side)
        return left, top, min(left + side, size[0]), min(top + side, size[1])


def collate(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join entries into a batch: tensors stacked, names listed, the first error alone."""
    errors = [entry["error"] for entry in entries if "error" in entry]
    if errors:
        return {"error": errors[0]}
    stacked = {
        key: torch.stack([entry[key] for entry in entries])
        for key, value in entries[0].items()
        if isinstance(value, Tensor)
    }
    return {"names": [entry["name"] for entry in entries], "set": entries[0]["set"], **stacked}
