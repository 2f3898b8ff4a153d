"""A folder of one's own: `images/`, `labels/`, `classes.json`, and a list of names per split (`train.txt`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_hf.modeling.images import IMAGE_EXTENSIONS

from .segmentation_data import SegmentationData, default_ignore_index, find_background, make_dataset

_HINT = "; such a folder holds images/, labels/, classes.json and a list of names per split, as val.txt"


@dataclass(frozen=True)
class PlainFolder:
    """One split: `SPLIT.txt` names, a line each, the image `images/NAME.*` and the label map `labels/NAME.png`.

    Attributes:
        root: Holds `classes.json` with the keys `classes` and, if need be, `background_index` and `ignore_index`.
        split: Which list of names.
        label_folder: Another folder with labels of the same images.
        label_names: Its classes, in place of those in `classes.json`; a class named `background` is the background.
    """

    root: Path
    split: str
    label_folder: str = "labels"
    label_names: Sequence[str] | None = None

    def names(self) -> list[str]:
        """The names in the list.

        Raises:
            ValueError: There is no such list, or it names nothing, or a name twice.
        """
        return read_names(self.root / f"{self.split}.txt")

    def found_images(self) -> dict[str, Path]:
        """The images that are there, by name."""
        return index_folder(self.root / "images", IMAGE_EXTENSIONS)

    def found_labels(self) -> dict[str, Path]:
        """The label maps that are there, by name."""
        return index_folder(self.root / self.label_folder, (".png",))

    def open(self, names: Sequence[str] | None = None) -> SegmentationData:
        """The split, or those images of it.

        Raises:
            ValueError: Something is missing or malformed; the message names it.
        """
        classes, background, ignore = read_classes(self.root / "classes.json")
        if self.label_names is not None:
            classes, background = tuple(self.label_names), find_background(self.label_names)
        if names is None:
            names = self.names()
        images = find_pairs(names, self.found_images(), "image", self.root / "images", self.split)
        labels = find_pairs(names, self.found_labels(), "label map", self.root / self.label_folder, self.split)
        dataset = make_dataset(names, images, labels)
        return SegmentationData(self.root.resolve().name, self.split, classes, ignore, background, dataset)


def read_names(path: Path) -> list[str]:
    """The lines of a list, without empty ones.

    Raises:
        ValueError: There is no such list, or it names nothing, or a name twice.
    """
    names = [line.strip() for line in read_text(path, _HINT).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{str(path)!r} names no images")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{str(path)!r} names {twice!r} twice")
    return names


def index_folder(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files with one of these endings, by path in the folder without the ending.

    Args:
        folder: Searched with all folders below it.
        endings: Such as `(".png",)`, in lower case.

    Raises:
        ValueError: There is no such folder, or two files differ in their ending alone.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    found: dict[str, Path] = {}
    for parent, _, files in os.walk(folder, followlinks=True):
        prefix = Path(parent).relative_to(folder).as_posix()
        for file in files:
            ending = next((ending for ending in endings if file.lower().endswith(ending.lower())), None)
            if ending is None or file.startswith("."):
                continue
            name = file[: -len(ending)] if prefix == "." else f"{prefix}/{file[: -len(ending)]}"
            path = Path(parent, file)
            if found.setdefault(name, path) != path:
                raise ValueError(f"{str(found[name])!r} and {str(path)!r} have the same name; keep one of them")
    return found


def find_pairs(names: Sequence[str], found: dict[str, Path], what: str, folder: Path, listed: str) -> list[Path]:
    """The file of each name.

    Args:
        names: What the list names.
        found: Files by name.
        what: What the files are, for the message.
        folder: Where they should be, for the message.
        listed: Name of the list, for the message.

    Raises:
        ValueError: There is none; the message names the first and says how many are missing.
    """
    missing = [name for name in names if name not in found]
    if missing:
        more = f"; {len(missing)} of {len(names)} are missing" if len(missing) > 1 else ""
        raise ValueError(f"there is no {what} {str(folder / missing[0])!r} that the list {listed!r} names{more}")
    return [found[name] for name in names]


def read_text(path: Path, hint: str = "") -> str:
    """The file's text; `hint` ends the error.

    Args:
        path: A UTF-8 file.
        hint: Added to the error.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"cannot read {str(path)!r}: {reason}{hint}") from error


def read_classes(path: Path) -> tuple[tuple[str, ...], int | None, int]:
    """Classes, index of the background, and label of ignored pixels, from `classes.json`.

    Raises:
        ValueError: The file is missing or says something else.
    """
    try:
        record: Any = json.loads(read_text(path, _HINT))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    classes = record.get("classes") if isinstance(record, dict) else None
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f'{str(path)!r} must hold {{"classes": ["name", ...]}}')
    background, ignore = record.get("background_index"), record.get("ignore_index", default_ignore_index(len(classes)))
    if background is not None and (not _is_int(background) or not 0 <= background < len(classes)):
        raise ValueError(f"background_index in {str(path)!r} must be 0 to {len(classes) - 1}, got {background!r}")
    if not _is_int(ignore) or 0 <= ignore < len(classes):
        raise ValueError(f"ignore_index in {str(path)!r} must be a number that no class has, got {ignore!r}")
    return tuple(classes), background, ignore


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
