"""Data sets of the hub, and any folder that `datasets.load_dataset` reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets

from .label_values import make_lookup
from .segmentation_data import FEATURES, SegmentationData, default_ignore_index, find_background
from .standard_trees import background_index, check_names, class_names, get_layout

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def looks_like_hub_id(source: str) -> bool:
    """Whether it has the form `owner/name`, or `owner/name:configuration`."""
    return _HUB_ID.fullmatch(source) is not None


def open_hub_data(
    source: str,
    split: str,
    *,
    image_column: str | None,
    label_column: str | None,
    label_names: Sequence[str] | None = None,
    layout: str | None = None,
    streaming: bool = False,
) -> SegmentationData:
    """Open a split of a hub data set; see `open_data`.

    Args:
        source: `owner/name` or `owner/name:configuration`, or a folder that `datasets` can load.
        split: Which split.
        image_column: Column of the images.
        label_column: Column of the label maps.
        label_names: Names of the classes, in the order of the label values.
        layout: Layout whose values, as published, the label maps have.
        streaming: Download only what is read.

    Raises:
        ValueError: A column is missing or holds no images, or nothing says what the labels mean.
        OSError: The data set cannot be had.
    """
    if image_column is None or label_column is None:
        raise ValueError(f"name the columns of {source!r} that hold images and label maps (image_column, label_column)")
    if label_names is None and layout is None:
        raise ValueError(f"say what the labels of {source!r} are: label_names, or the layout they follow")
    repository, _, configuration = source.partition(":")
    dataset = datasets.load_dataset(repository, configuration or None, split=split, streaming=streaming)
    features = dataset.features
    for column in (image_column, label_column):
        if features is not None and column not in features:
            raise ValueError(f"{source!r} has no column {column!r}; it has {', '.join(features)}")
        if features is not None and not isinstance(features[column], datasets.Image):
            raise ValueError(f"the column {column!r} of {source!r} must hold images, it holds {features[column]}")

    dataset = dataset.select_columns([image_column, label_column])
    for column in (image_column, label_column):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    dataset = dataset.rename_columns({image_column: "image", label_column: "labels"})
    if streaming:
        dataset = dataset.map(_name_row, with_indices=True, features=FEATURES)
    else:
        dataset = dataset.add_column("name", [_row_name(index) for index in range(len(dataset))])
        if len(dataset) == 0:
            raise ValueError(f"the split {split!r} of {source!r} is empty")

    if layout is None:
        assert label_names is not None
        classes, lookup = tuple(label_names), None
        ignore_index, background = default_ignore_index(len(classes)), find_background(classes)
    else:
        known = get_layout(layout)
        classes = class_names(known) if label_names is None else check_names(known, label_names)
        ignore_index = default_ignore_index(len(classes))
        background = background_index(known)
        lookup = make_lookup(known.trees[0].values, ignore_index)
    return SegmentationData(source, split, classes, ignore_index, background, dataset, lookup)


def _row_name(index: int) -> str:
    return f"{index:08d}"


def _name_row(row: dict, index: int) -> dict:
    return {"name": _row_name(index), **row}
