"""Folders of images with one label per pixel: `images/`, `labels/`, `classes.json`, lists of names (`val.txt`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from arm_hf.modeling.images import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class LabelledFolder:
    """Images with one label per pixel.

    Attributes:
        classes: Names; a label is an index into them.
        background_index: The class that means "none of the others", or None.
        ignore_index: Label of pixels that do not count.
        pairs: Image file and label file, one by one.
    """

    classes: tuple[str, ...]
    background_index: int | None
    ignore_index: int
    pairs: tuple[tuple[Path, Path], ...]


def open_labelled_folder(root: str | Path, split: str = "val", limit: int | None = None) -> LabelledFolder:
    """Read what a labelled folder holds: `classes.json`, `SPLIT.txt` (a name per line), `images/` and `labels/`.

    Args:
        root: The folder. `classes.json` has the keys `classes` and, if need be, `background_index`, `ignore_index`.
        split: Which list of names.
        limit: Take only the first so many.

    Raises:
        ValueError: Something is missing or malformed; the message names it.
    """
    root = Path(root).expanduser()
    record = _read_classes(root / "classes.json")
    names = [line.strip() for line in _read_text(root / f"{split}.txt").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{str(root / f'{split}.txt')!r} names no images")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of images must be at least 1, got {limit}")
    pairs = []
    for name in names[:limit]:
        candidates = [root / "images" / f"{name}{extension}" for extension in IMAGE_EXTENSIONS]
        image = next((path for path in candidates if path.is_file()), None)
        if image is None:
            raise ValueError(
                f"there is no image {str(root / 'images' / name)!r} (.jpg, .png, ...) that {split}.txt names"
            )
        labels = root / "labels" / f"{name}.png"
        if not labels.is_file():
            raise ValueError(f"there is no label map {str(labels)!r} for the image {str(image)!r}")
        pairs.append((image, labels))
    return LabelledFolder(*record, tuple(pairs))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(
            f"cannot read {str(path)!r}: {reason}; a labelled folder holds images/, labels/, classes.json and val.txt"
        ) from error


def _read_classes(path: Path) -> tuple[tuple[str, ...], int | None, int]:
    try:
        record = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    classes = record.get("classes") if isinstance(record, dict) else None
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f'{str(path)!r} must hold {{"classes": ["name", ...]}}')
    background, ignore = record.get("background_index"), record.get("ignore_index", 255)
    if background is not None and (not isinstance(background, int) or not 0 <= background < len(classes)):
        raise ValueError(f"background_index in {str(path)!r} must be 0 to {len(classes) - 1}, got {background!r}")
    if not isinstance(ignore, int):
        raise ValueError(f"ignore_index in {str(path)!r} must be a number, got {ignore!r}")
    return tuple(classes), background, ignore


def read_label_map(path: Path, folder: LabelledFolder, size: tuple[int, int]) -> np.ndarray:
    """The label of every pixel, (H, W) int64.

    Args:
        path: A PNG of one channel (grey or palette).
        folder: Says which values are allowed.
        size: Width and height of the image.

    Raises:
        ValueError: The file is unreadable, of another size, has colours, or holds a label that no class has.
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"cannot read the label map {str(path)!r}: {error}") from error
    if labels.ndim != 2:
        raise ValueError(f"the label map {str(path)!r} must have one channel with class indices, got {labels.shape[2]}")
    if (labels.shape[1], labels.shape[0]) != size:
        raise ValueError(
            f"the label map {str(path)!r} is {labels.shape[1]} x {labels.shape[0]}, its image {size[0]} x {size[1]}"
        )
    labels = labels.astype(np.int64)
    wrong = np.unique(labels[(labels != folder.ignore_index) & ((labels < 0) | (labels >= len(folder.classes)))])
    if wrong.size:
        raise ValueError(
            f"the label map {str(path)!r} holds {', '.join(map(str, wrong[:5]))}; allowed are 0 to "
            f"{len(folder.classes) - 1} and {folder.ignore_index} (ignored)"
        )
    return labels
