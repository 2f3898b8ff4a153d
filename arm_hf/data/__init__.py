"""Images with one label per pixel: folders of one's own, the standard trees, and data sets of the hub.

```python
>>> from arm_hf.data import open_data
>>> data = open_data("VOCdevkit", "val", layout="voc21")  # doctest: +SKIP
>>> image, labels = data.read(data.dataset[0])  # doctest: +SKIP

```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import datasets

from .hub import looks_like_hub_id, open_hub_data
from .layouts import LAYOUTS
from .plain_folder import PlainFolder
from .segmentation_data import SegmentationData
from .standard_trees import candidates, find_tree, get_layout

__all__ = ["LAYOUTS", "SegmentationData", "open_data"]

_STREAM_SHARDS = 64  # of a streamed local data set: how many processes and workers can share it without skipping rows


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
    """Open a split of a data set. No image is read and nothing is copied.

    Args:
        source: A folder with `images/`, `labels/`, `classes.json` and lists of names (`val.txt`); the root of a
            standard tree, or the folder above it; or a data set of the hub, `owner/name` or
            `owner/name:configuration`.
        split: `"train"`, `"val"`; whatever else the data set has.
        layout: Which standard data set a folder is, one of `LAYOUTS`; recognised by its folders otherwise, where
            several fit (VOC with and without background) the first in `LAYOUTS`. For the hub: the layout whose label
            values, as published, and classes the label maps have.
        streaming: Give an `IterableDataset`: of the hub's files only what is read is downloaded.
        image_column: Of a hub data set: the column with the images.
        label_column: Of a hub data set: the column with the label maps. Of a folder with `images/`: another folder than
            `labels`.
        label_names: Names of the classes, in the order of the label values.

    Raises:
        ValueError: Something is missing, malformed or unclear; the message names it.
        OSError: The hub cannot be reached.
    """
    root = Path(source).expanduser()
    if not root.exists():
        if not looks_like_hub_id(str(source)):
            raise ValueError(f"there is no folder {str(source)!r}, and a data set of the hub is called owner/name")
        return open_hub_data(
            str(source),
            split,
            image_column=image_column,
            label_column=label_column,
            label_names=label_names,
            layout=layout,
            streaming=streaming,
        )
    data = _open_folder(root, split, layout, image_column, label_column, label_names, streaming)
    if streaming and isinstance(data.dataset, datasets.Dataset):
        shards = min(_STREAM_SHARDS, len(data.dataset))
        data = dataclasses.replace(data, dataset=data.dataset.to_iterable_dataset(num_shards=shards))
    return data


def _open_folder(
    root: Path,
    split: str,
    layout: str | None,
    image_column: str | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    streaming: bool,
) -> SegmentationData:
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is not a folder")
    if image_column is not None:  # Parquet or an image folder, say
        return open_hub_data(
            str(root),
            split,
            image_column=image_column,
            label_column=label_column,
            label_names=label_names,
            layout=layout,
            streaming=streaming,
        )
    if layout is None and (root / "classes.json").exists():
        return PlainFolder(root, split, label_column or "labels", label_names).open()
    if label_column is not None:
        raise ValueError(f"label_column is for hub data sets and folders with classes.json, not for {str(root)!r}")
    files = find_tree(root, split, layout)
    if files is not None:
        return dataclasses.replace(files, label_names=label_names).open()
    if layout is not None:
        wanted = candidates(get_layout(layout), split, root)[0]
        raise ValueError(
            f"{layout} is not in {str(root)!r}: there are no images {str(wanted.images[0])!r} with labels "
            f"{str(wanted.labels[0])!r}; arm-hf data {root} --layout {layout} says what to download"
        )
    raise ValueError(
        f"{str(root)!r} is no data set with a split {split!r}: it holds neither classes.json nor the folders of one of "
        f"{', '.join(LAYOUTS)}"
    )
