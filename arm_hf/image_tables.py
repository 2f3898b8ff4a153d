"""Pictures inside parquet files or a data set of the Hub, read row by row without a download of the whole."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from arm_hf.folders import ImageFile, OutputFiles, collect_images
from arm_hf.manifest import Manifest, Part

HUB_PREFIX = "hf://datasets/"
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_ROWS_PER_FOLDER = 1000


def is_table(given: str) -> bool:
    """Whether an input names parquet files, a folder of them, or a data set of the Hub.

    `owner/name` is one if there is no such path here and `owner` is no folder; `hf://datasets/owner/name` always is.
    """
    if given.startswith(HUB_PREFIX) or given.endswith(".parquet"):
        return True
    if os.path.isdir(given):
        return bool(_parquet_files_in(given)) and not holds_images(given)
    looks_like_one = _REPOSITORY.fullmatch(given) is not None and not os.path.splitext(given)[1]
    return looks_like_one and not os.path.exists(given) and not os.path.isdir(given.split("/")[0])


def tables_of(inputs: Sequence[str]) -> list[str]:
    """The inputs, if they are parquet files or a data set of the Hub; nothing if they are pictures.

    Raises:
        ValueError: If a data set stands beside something else.
    """
    tables = [given for given in inputs if is_table(given)]
    on_hub = [given for given in tables if _is_on_hub(given)]
    if (tables and len(tables) < len(inputs)) or (on_hub and len(inputs) > 1):
        raise ValueError(
            f"{(on_hub or tables)[0]!r} is a data set and cannot be mixed with other inputs; run the command once for "
            "each"
        )
    return tables


class ImageTable:
    """The rows of a data set, file by file, each with one picture.

    Row r of file f has the results `FFFFF/RRRRR/rrr.*` (file, thousands of rows, rest): names need no list of all rows.

    Args:
        sources: Parquet files, patterns such as `data/*.parquet` and folders of such files; or `owner/name` or
            `hf://datasets/owner/name` alone.
        split: Split of a data set of the Hub.
        column: Column that holds the pictures; by default the only one that does.
        revision: Branch, tag or commit of a data set of the Hub.

    Raises:
        ValueError: If there is no such data set or split, or the column is missing or not clear.
    """

    def __init__(
        self, sources: Sequence[str], split: str = "train", column: str | None = None, revision: str | None = None
    ):
        from datasets import Image

        self.source = sources[0]
        self.files: list[str] | None = None
        if not _is_on_hub(self.source):
            lengths = {path: _num_rows(path) for given in sources for path in _files_of(given)}
            self.files = [path for path, length in lengths.items() if length]
            self._lengths = [length for length in lengths.values() if length]
            if not self.files:
                raise ValueError(f"{self.source!r} holds no rows")
        rows = self._open(split, revision)
        self.column = _image_column(rows, column, self.source)
        self.rows = rows.select_columns([self.column]).cast_column(self.column, Image(decode=False))
        if self.files is None:
            self.place = f"{self.source}@{revision}#{split}" if revision else f"{self.source}#{split}"
            known = (rows.info.splits or {}).get(split)
            self._num_examples = known.num_examples if known is not None and known.num_examples else None

    def _open(self, split: str, revision: str | None) -> Any:
        from datasets import load_dataset

        try:
            if self.files is not None:
                return load_dataset("parquet", data_files={"rows": self.files}, split="rows", streaming=True)
            name = self.source.removeprefix(HUB_PREFIX)
            return load_dataset(name, split=split, revision=revision, streaming=True)
        # Whatever the Hub, a builder or a broken file answers: the first words name the data set, the cause follows.
        except Exception as error:
            raise ValueError(f"cannot open the data set {self.source!r}: {' '.join(str(error).split())}") from error

    @property
    def num_tables(self) -> int:
        """Number of files that the rows lie in."""
        return self.rows.num_shards

    def _by_files(self, part: Part) -> bool:
        # Whole files where every process gets one; else all processes read all files and take turns at the rows.
        return self.num_tables >= part.count

    def total(self, part: Part) -> int | None:
        """Number of rows of one process, or `None` if nobody knows."""
        if self.files is None:
            return None if self._num_examples is None else len(range(self._num_examples)[part.share])
        if self._by_files(part):
            return sum(self._lengths[part.share])
        return sum(len(range(length)[part.share]) for length in self._lengths)

    def jobs(self, manifest: Manifest, overlay: bool = True) -> Iterator[tuple[ImageFile, OutputFiles]]:
        """Yield the pictures of one process and where their results go.

        Args:
            manifest: Of this process. Files that it knows to be done are not read; how long a file is, is noted there.
            overlay: Whether the picture for people is written.
        """
        part = manifest.part
        by_files = self._by_files(part)
        for index in range(self.num_tables)[part.share if by_files else slice(None)]:
            table = f"{index:05d}"
            length = manifest.rows_of(table)
            if by_files and length is not None and manifest.done_in(table) == length:
                manifest.num_kept += length
                continue
            number = -1
            for number, row in enumerate(self.rows.shard(num_shards=self.num_tables, index=index)):
                if not by_files and number % part.count != part.index:
                    continue
                name = f"{table}/{number // _ROWS_PER_FOLDER:05d}/{number % _ROWS_PER_FOLDER:03d}"
                place = f"{self.place}[{index}]" if self.files is None else self.files[index]
                file = _picture(row[self.column], f"{place}[{number}]", name)
                yield file, OutputFiles.named(manifest.out, name, overlay)
            if manifest.rows_of(table) != number + 1:
                manifest.add({"table": table, "rows": number + 1})


def holds_images(folder: str) -> bool:
    """Whether a folder has pictures in it or below it."""
    try:
        return bool(collect_images([folder]))
    except ValueError:
        return False


def _is_on_hub(given: str) -> bool:
    return given.startswith(HUB_PREFIX) or not (given.endswith(".parquet") or os.path.isdir(given))


def _parquet_files_in(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.parquet"), recursive=True))


def _files_of(given: str) -> list[str]:
    """The files that a path or pattern means, sorted."""
    if os.path.isdir(given):
        return _parquet_files_in(given)
    files = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    if not files:
        raise ValueError(f"there is no file or folder {given!r}")
    return files


def _num_rows(path: str) -> int:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise ValueError(f"cannot read the parquet file {path!r}: {' '.join(str(error).split())}") from error


def _image_column(rows: Any, wanted: str | None, source: str) -> str:
    names = list(rows.features or rows.column_names or ())
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{source!r} has no column {wanted!r}; its columns are {', '.join(names)}")
        return wanted
    found = [name for name in names if _holds_images((rows.features or {}).get(name))]
    if "image" in names and (len(found) != 1):
        return "image"
    if len(found) != 1:
        raise ValueError(
            f"{source!r} has {len(found)} columns with pictures ({', '.join(found) or 'none'}) among "
            f"{', '.join(names)}; name one (--image-column)"
        )
    return found[0]


def _holds_images(feature: Any) -> bool:
    """An image column, or bytes, alone or beside a path, as files written without `datasets` hold them."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _picture(value: Any, source: str, name: str) -> ImageFile:
    if value is None:
        return ImageFile(source, name, b"")
    if value.get("bytes") is None:
        return ImageFile(str(value["path"]), name)
    path = value.get("path")
    return ImageFile(source, os.path.basename(path) if path else name, value["bytes"])
