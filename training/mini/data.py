"""The labelled photos: which sets, which lists, decoded once into memory as small uint8 arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from tqdm.auto import tqdm

IGNORE = 255
# share of the training views that a set supplies
TRAIN_SETS = {
    "voc2012": 0.32,
    "voc2012_extra": 0.09,
    "coco_stuff171": 0.20,
    "coco_object": 0.11,
    "msrc": 0.18,
    "camvid": 0.07,
    "ade20k150": 0.03,
}


@dataclass
class Photo:
    """One decoded photo.

    Attributes:
        dataset: name of its set.
        stem: file name without ending.
        image: (H, W, 3) uint8.
        label: (H, W) uint8, index of the class or 255.
    """

    dataset: str
    stem: str
    image: np.ndarray
    label: np.ndarray


def class_names(root: Path, dataset: str) -> list[str]:
    """Names of the classes of a set, index = label value."""
    return json.loads((root / dataset / "classes.json").read_text(encoding="utf-8"))["classes"]


def read_list(root: Path, dataset: str, name: str) -> list[str]:
    """Stems of a list file such as "train" or "val_balanced"."""
    return (root / dataset / f"{name}.txt").read_text(encoding="utf-8").split()


def load_photo(root: Path, dataset: str, stem: str, longest: int | None = None, labels: str = "labels") -> Photo:
    """Decode one photo and its label map.

    Args:
        root: folder of the sets.
        dataset: set.
        stem: file name without ending.
        longest: reduce to this longer side; labels by nearest neighbour. None keeps the size.
        labels: which label folder.
    """
    image: Image.Image = Image.open(root / dataset / "images" / f"{stem}.jpg").convert("RGB")
    label: Image.Image = Image.open(root / dataset / labels / f"{stem}.png")
    if label.size != image.size:
        raise ValueError(f"{dataset}/{stem}: photo is {image.size}, label map is {label.size}")
    if longest is not None and max(image.size) > longest:
        factor = longest / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image, label = image.resize(size, Resampling.BICUBIC), label.resize(size, Resampling.NEAREST)
    return Photo(dataset, stem, np.asarray(image), np.asarray(label))


def load_photos(
    root: Path, datasets: Sequence[str], list_name: str, longest: int | None, workers: int = 2
) -> list[Photo]:
    """Decode all photos of a list of several sets, in a fixed order."""
    jobs = [(name, stem) for name in datasets if (root / name).is_dir() for stem in read_list(root, name, list_name)]
    if not jobs:
        raise FileNotFoundError(f"no photos: {root} holds none of {list(datasets)} with a {list_name}.txt")
    with ThreadPoolExecutor(workers) as pool:
        todo = pool.map(lambda job: load_photo(root, job[0], job[1], longest=longest), jobs)
        return list(tqdm(todo, total=len(jobs), desc="decode", unit="photo"))


class BalancedSampler:
    """Choose a set by its share, then a class of it (rarer ones as often as common ones), then a photo that shows it.

    Args:
        photos: the training photos.
        shares: set -> share of the views; missing sets are skipped and the rest rescaled.
        skip: (set, class) pairs that are never chosen as the wanted class, e.g. the background.
        class_power: a class is drawn in proportion to its number of photos to this power: 0 draws rare classes as often
            as common ones, 1 draws photos evenly.
        min_pixels: share of a photo that a class must cover to count as shown.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        shares: dict[str, float],
        skip: AbstractSet[tuple[str, int]] = frozenset(),
        class_power: float = 0.4,
        min_pixels: float = 0.002,
    ) -> None:
        self.members: dict[str, dict[int, list[int]]] = {}
        for index, photo in enumerate(photos):
            values, counts = np.unique(photo.label, return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                if value != IGNORE and (photo.dataset, value) not in skip and count >= min_pixels * photo.label.size:
                    self.members.setdefault(photo.dataset, {}).setdefault(value, []).append(index)
        self.sets = [name for name in shares if name in self.members]
        share = np.array([shares[name] for name in self.sets])
        self.share = share / share.sum()
        self.class_share = {}
        for name in self.sets:
            weight = np.array([len(members) for members in self.members[name].values()], dtype=float) ** class_power
            self.class_share[name] = weight / weight.sum()

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """One (photo index, wanted class)."""
        name = self.sets[rng.choice(len(self.sets), p=self.share)]
        classes = list(self.members[name])
        wanted = classes[rng.choice(len(classes), p=self.class_share[name])]
        members = self.members[name][wanted]
        return members[rng.integers(len(members))], wanted
