"""Finding and opening the standard trees that `layouts` describes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from arm_hf.label_sets import load_label_set

from .label_values import make_lookup
from .layouts import LAYOUTS, Layout, Tree
from .plain_folder import find_pairs, index_folder, read_text
from .segmentation_data import SegmentationData, default_ignore_index, find_background, make_dataset

_NAME_LISTS = Path(__file__).parents[1] / "assets" / "class_names"


@dataclass(frozen=True)
class TreeFiles:
    """Where the files of one split lie.

    Attributes:
        root: Where the tree begins.
        images: Folder of the images, and what their names end in.
        labels: The same of the label maps.
        lists: Files with the names, all of which count; none: the label maps that are there.
        alternatives: The lists that would do.
        label_names: Names of the classes in place of the usual ones.
    """

    layout: Layout
    tree: Tree
    split: str
    root: Path
    images: tuple[Path, str]
    labels: tuple[Path, str]
    lists: tuple[Path, ...]
    alternatives: tuple[str, ...]
    label_names: Sequence[str] | None = None

    def names(self) -> list[str]:
        """The names of the split's images.

        Raises:
            ValueError: The list is missing or empty.
        """
        if not self.tree.names:
            names = sorted(self.found_labels())
            if not names:
                raise ValueError(f"there are no label maps *{self.labels[1]} in {str(self.labels[0])!r}")
            return names
        if not self.lists:
            raise ValueError(f"there is no list {' or '.join(map(repr, self.alternatives))} in {str(self.root)!r}")
        # A line is a name, or (lists of the SBD labels) the paths of image and label map.
        lines = [line.split() for file in self.lists for line in read_text(file).splitlines()]
        names = list(dict.fromkeys(PurePosixPath(words[0]).stem for words in lines if words))
        if not names:
            raise ValueError(f"{str(self.lists[0])!r} names no images")
        return names

    def found_images(self) -> dict[str, Path]:
        """The images that are there, by name."""
        return index_folder(self.images[0], (self.images[1],))

    def found_labels(self) -> dict[str, Path]:
        """The label maps that are there, by name."""
        found = index_folder(self.labels[0], (self.labels[1],))
        return {name: path for name, path in found.items() if not name.endswith(_OTHER_KINDS)}

    def is_there(self) -> bool:
        """Whether both folders exist, and that of the label maps holds one of the right kind."""
        folder, ending = self.labels
        if not (self.images[0].is_dir() and folder.is_dir()):
            return False
        others = tuple(f"{kind}{ending}" for kind in _OTHER_KINDS)
        files = (file for _, _, names in os.walk(folder, followlinks=True) for file in names)
        return any(file.endswith(ending) and not file.endswith(others) for file in files)

    def open(self, names: Sequence[str] | None = None) -> SegmentationData:
        """The split, or those images of it.

        Raises:
            ValueError: Files are missing, or there is another number of names than of classes.
        """
        layout, given = self.layout, self.label_names
        classes = check_names(layout, given) if given is not None else class_names(layout, self.root)
        if names is None:
            names = self.names()
        images = find_pairs(names, self.found_images(), "image", self.images[0], self.split)
        labels = find_pairs(names, self.found_labels(), "label map", self.labels[0], self.split)
        ignore_index = default_ignore_index(len(classes))
        return SegmentationData(
            layout.name,
            self.split,
            classes,
            ignore_index,
            background_index(layout),
            make_dataset(names, images, labels),
            make_lookup(self.tree.values, ignore_index),
            self.tree.matlab_key,
        )


_OTHER_KINDS = ("_labelTrainIds", "_instanceTrainIds")  # maps that may lie beside those called NAME.png


def get_layout(name: str) -> Layout:
    """The layout of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in LAYOUTS:
        close = difflib.get_close_matches(name, LAYOUTS, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown layout {name!r}; {guess}known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def place_files(layout: Layout, tree: Tree, split: str, root: Path) -> TreeFiles:
    """Fill in a tree's patterns; `root` is where it begins.

    Args:
        layout: The data set.
        tree: One of its trees.
        split: Which split.
        root: Where the tree begins.
    """
    folder = tree.splits[split]

    def fill(pattern: str) -> tuple[Path, str]:
        before, after = pattern.format(folder=folder, name="\0").split("\0")
        return root / before, after

    alternatives = tuple(pattern.format(folder=folder) for pattern in tree.names)
    choices = [[root / part for part in choice.split(" + ")] for choice in alternatives]
    lists = next((choice for choice in choices if all(path.is_file() for path in choice)), [])
    return TreeFiles(layout, tree, split, root, fill(tree.images), fill(tree.labels), tuple(lists), alternatives)


def candidates(layout: Layout, split: str, folder: Path) -> list[TreeFiles]:
    """Every place where the split may lie below `folder`, whether it is there or not.

    Args:
        layout: The data set.
        split: Which split.
        folder: What the user named.

    Raises:
        ValueError: The data set has no such split.
    """
    splits = list(dict.fromkeys(name for tree in layout.trees for name in tree.splits))
    if split not in splits:
        raise ValueError(f"{layout.name} has no split {split!r}; it has {', '.join(splits)}")
    return [
        place_files(layout, tree, split, folder / root)
        for tree in layout.trees
        if split in tree.splits
        for root in tree.roots
    ]


def find_tree(folder: Path, split: str, layout: str | None = None) -> TreeFiles | None:
    """The tree that `folder` holds.

    Args:
        folder: The tree's root, or the folder above it.
        split: The split that must be there.
        layout: Which data set; otherwise the first of `LAYOUTS` that fits.

    Returns:
        None if nothing fits.

    Raises:
        ValueError: There is no such layout or split; or the folder holds several trees, and `layout` does not choose.
    """
    if layout is not None:
        return next((files for files in candidates(get_layout(layout), split, folder) if files.is_there()), None)
    fitting = []
    for known in LAYOUTS.values():
        if any(split in tree.splits for tree in known.trees):
            fitting += [files for files in candidates(known, split, folder) if files.is_there()]
    if len({files.images[0] for files in fitting}) > 1:
        names = ", ".join(dict.fromkeys(files.layout.name for files in fitting))
        raise ValueError(f"{str(folder)!r} holds several data sets; name one of the layouts {names}")
    return fitting[0] if fitting else None


def class_names(layout: Layout, root: Path | None = None) -> tuple[str, ...]:
    """The names of the classes, in order.

    Args:
        layout: The data set.
        root: Where its tree begins, for data sets whose tree names the classes.

    Raises:
        ValueError: The tree must name them and does not, or not as many as there are.
    """
    if layout.label_set is not None:
        names = tuple(label.name for label in load_label_set(layout.label_set))
    elif layout.name_list is not None:
        names = tuple((_NAME_LISTS / f"{layout.name_list}.txt").read_text(encoding="utf-8").splitlines())
    elif layout.class_file is not None and root is not None:
        lines = [line.strip() for line in read_text(root / layout.class_file).splitlines() if line.strip()]
        names = tuple(line.partition(":")[2].strip() or line for line in lines)
    else:
        raise ValueError(f"the classes of {layout.name} are named in {layout.class_file} of its tree; give label_names")
    if len(names) != layout.num_classes:
        raise ValueError(f"{layout.name} has {layout.num_classes} classes, {layout.class_file} names {len(names)}")
    return names


def background_index(layout: Layout) -> int | None:
    """The class that means "none of the others"."""
    return find_background(class_names(layout)) if layout.label_set is not None else None


def check_names(layout: Layout, label_names: Sequence[str]) -> tuple[str, ...]:
    """The names, if there are as many as the layout has classes.

    Args:
        layout: The data set.
        label_names: Names for its classes.

    Raises:
        ValueError: There are not.
    """
    if len(label_names) != layout.num_classes:
        raise ValueError(f"{layout.name} has {layout.num_classes} classes, got {len(label_names)} names")
    return tuple(label_names)
