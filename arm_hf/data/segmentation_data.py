"""Images with one label per pixel, as rows of a `datasets` data set that hold paths and are decoded when read."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from arm_hf.folders import require_no_address
from arm_hf.modeling.images import IMAGE_FORMATS, load_image

FEATURES = datasets.Features(
    {
        "name": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "labels": datasets.Image(decode=False),
    }
)

NOT_ALLOWED = -1  # in a lookup: no class, and not to be ignored either


@dataclass(frozen=True)
class SegmentationData:
    """A split of a data set.

    Attributes:
        name: Layout (`"voc21"`), a folder's name, or a hub id.
        split: `"train"`, `"val"`, ...
        classes: Names; a label that `read` returns is an index into them.
        ignore_index: Label of pixels that do not count: 255, or 65535 with more than 255 classes.
        background_index: The class that means "none of the others", or None.
        dataset: Columns `name`, `image` and `labels`; the last two hold `{"path", "bytes"}`, one of them None.
        lookup: Label of each value in the files, int32 (-1: not allowed); None: the values are the labels.
        matlab_key: The variable that holds the labels, where these are `.mat` files.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    ignore_index: int
    background_index: int | None
    dataset: datasets.Dataset | datasets.IterableDataset
    lookup: np.ndarray | None = field(default=None, repr=False, compare=False)
    matlab_key: str | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Number of images; a streamed data set does not know it (TypeError)."""
        return len(self.dataset)

    def read(self, row: Mapping[str, Any]) -> tuple[Image.Image, np.ndarray]:
        """Decode one row.

        Args:
            row: One of `dataset`.

        Returns:
            The upright RGB image, and its labels, (H, W) int32: indices into `classes`, or `ignore_index`.

        Raises:
            ValueError: A file cannot be read, the two differ in size, or a label is neither a class nor to be ignored.
                The message names the file.
        """
        image = load_image(_source(row["image"]))
        values = self._read_values(row)
        if (values.shape[1], values.shape[0]) != image.size:
            values = _turn_like(values, row["image"])
        if (values.shape[1], values.shape[0]) != image.size:
            raise ValueError(
                f"the label map {_label(row)} is {values.shape[1]} x {values.shape[0]}, its image "
                f"{image.size[0]} x {image.size[1]} (width x height)"
            )
        return image, self.translate(values, _label(row))

    def read_labels(self, row: Mapping[str, Any]) -> np.ndarray:
        """Decode the labels alone, (H, W) int32, as they lie in the file; raises as `read` does."""
        return self.translate(self._read_values(row), _label(row))

    def translate(self, values: np.ndarray, origin: str) -> np.ndarray:
        """Turn the values of a file, (H, W) of any integer type, into labels, (H, W) int32.

        Args:
            values: As stored.
            origin: What to call the file in an error.

        Raises:
            ValueError: A value stands for nothing.
        """
        if self.lookup is None:
            labels = values.astype(np.int32)
            wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= len(self.classes)))
            allowed = f"0 to {len(self.classes) - 1} and {self.ignore_index} (ignored)"
        else:
            size = len(self.lookup)
            inside = (values >= 0) & (values < size)
            labels = np.where(inside, self.lookup[np.where(inside, values, 0)], NOT_ALLOWED).astype(np.int32)
            wrong = labels == NOT_ALLOWED
            allowed = ranges(np.flatnonzero(self.lookup != NOT_ALLOWED))
        if wrong.any():
            found = np.unique(values[wrong])
            held = ", ".join(map(str, found[:5])) + (", ..." if found.size > 5 else "")
            raise ValueError(f"the label map {origin} holds {held}; allowed in {self.name} are {allowed}")
        return labels

    def select(self, indices: Iterable[int]) -> SegmentationData:
        """The rows at `indices`, in that order.

        Raises:
            ValueError: The data set is streamed: it has no indices.
        """
        if not isinstance(self.dataset, datasets.Dataset):
            raise ValueError(f"{self.name} is streamed and cannot be indexed; open it with streaming=False")
        return dataclasses.replace(self, dataset=self.dataset.select(list(indices)))

    def shard(self, num_shards: int, index: int) -> SegmentationData:
        """Every `num_shards`-th row from `index` on: what one of `num_shards` processes works on.

        Args:
            num_shards: How many share the rows.
            index: Which of them, from 0.

        Raises:
            ValueError: `index` is not one of 0 to `num_shards` - 1.
        """
        if not 0 <= index < num_shards:
            raise ValueError(f"a shard of {num_shards} has an index from 0 to {num_shards - 1}, got {index}")
        if isinstance(self.dataset, datasets.Dataset):
            return self.select(range(index, len(self.dataset), num_shards))
        from datasets.distributed import split_dataset_by_node

        return dataclasses.replace(self, dataset=split_dataset_by_node(self.dataset, index, num_shards))

    def _read_values(self, row: Mapping[str, Any]) -> np.ndarray:
        source = _source(row["labels"])
        if self.matlab_key is not None:
            return _read_matlab(source, self.matlab_key, _label(row))
        try:
            with _open(source) as image:
                values = np.asarray(image)
        except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read the label map {_label(row)}: {error}") from error
        if values.ndim != 2:
            raise ValueError(
                f"the label map {_label(row)} must have one channel with class indices, got {values.shape[2]}"
            )
        return values.astype(np.int32)


def make_dataset(names: Sequence[str], images: Sequence[Path], labels: Sequence[Path]) -> datasets.Dataset:
    """A data set of paths; nothing is read or copied.

    Args:
        names: Of the rows.
        images: File of each image.
        labels: File of each label map.
    """
    columns = {
        "name": list(names),
        "image": [{"path": str(path), "bytes": None} for path in images],
        "labels": [{"path": str(path), "bytes": None} for path in labels],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def default_ignore_index(num_classes: int) -> int:
    """255, as everywhere; 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65535


def find_background(classes: Sequence[str]) -> int | None:
    """Index of the class named `background`."""
    return list(classes).index("background") if "background" in classes else None


def ranges(values: Sequence[int] | np.ndarray) -> str:
    """Ascending numbers for people: `0 to 10, 12, 255`."""
    numbers = np.asarray(values)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run))


def _source(cell: Mapping[str, Any]) -> str | bytes:
    if cell["bytes"] is not None:
        return cell["bytes"]
    require_no_address(cell["path"])
    return cell["path"]


def _open(source: str | bytes) -> Image.Image:
    """One of the formats of pixels: others would start foreign programs on what a data set brings."""
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def _label(row: Mapping[str, Any]) -> str:
    """The label file's name, or the row's where the labels come as bytes."""
    cell = row["labels"]
    return repr(cell["path"]) if cell["bytes"] is None else f"of {row['name']!r}"


def _turn_like(values: np.ndarray, cell: Mapping[str, Any]) -> np.ndarray:
    """Turn labels that lie as the file's pixels do, where the image is shown turned (EXIF)."""
    source = _source(cell)
    with _open(source) as image:
        exif, size = image.getexif(), image.size
    if size != (values.shape[1], values.shape[0]) or exif.get(_ORIENTATION, 1) == 1:
        return values
    flat = Image.fromarray(values)
    flat.getexif()[_ORIENTATION] = exif[_ORIENTATION]
    return np.asarray(ImageOps.exif_transpose(flat))


_ORIENTATION = 0x0112


def _read_matlab(source: str | bytes, key: str, origin: str) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"the label map {origin} is a MATLAB file; reading it needs scipy: pip install scipy"
        ) from error
    try:
        values = loadmat(io.BytesIO(source) if isinstance(source, bytes) else source, variable_names=[key])[key]
    except KeyError as error:
        raise ValueError(f"the label map {origin} has no variable {key!r}") from error
    except Exception as error:  # scipy raises many kinds for a broken file
        raise ValueError(f"cannot read the label map {origin}: {error}") from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{key!r} in {origin} must be a table of whole numbers, got {values.dtype} {values.shape}")
    return values.astype(np.int32)
