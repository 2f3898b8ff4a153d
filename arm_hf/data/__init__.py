"""Images with one label per pixel: folders of one's own, the standard trees, and hub data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .plain_folder import open_plain_folder
from .segmentation_data import SegmentationData

__all__ = ["SegmentationData", "open_data"]


def open_data(
    source: str | Path,
    split: str = "val",
    *,
    layout: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
) -> SegmentationData:
    """Open a split of a data set; no image is read, nothing is copied.

    Args:
        source: A folder with `images/`, `labels/`, `classes.json` and lists of names.
        split: Which list of names.
        layout: Not used for such a folder.
        streaming: Give an `IterableDataset`.
        image_column: Not used for such a folder.
        label_column: Another folder with labels.
        label_names: Its classes.

    Raises:
        ValueError: Something is missing or malformed; the message names it.
    """
    root = Path(source).expanduser()
    data = open_plain_folder(root, split, label_column or "labels", label_names)
    if streaming:
        import dataclasses

        data = dataclasses.replace(data, dataset=data.dataset.to_iterable_dataset())
    return data
