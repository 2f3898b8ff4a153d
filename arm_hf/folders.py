"""Many pictures in, many files out: what to read, what the results are called, and writing them safely."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from PIL import Image

from arm_hf.legend import Segment
from arm_hf.modeling.images import IMAGE_EXTENSIONS, UnreadableImage, load_image

__all__ = [
    "ImageFile",
    "OutputFiles",
    "Skipped",
    "UnreadableImage",
    "Written",
    "already_there",
    "atomic_path",
    "collect_images",
    "new_folder",
    "output_folder",
    "plan_outputs",
    "read_image",
]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|image/)")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture to work on.

    Attributes:
        source: Its path or address, or the place in a table that `data` was read from.
        name: What people call it: the path inside the folder that was given, or the file's name.
        data: The encoded picture, where it is no file of its own.
        fetch: Whether the source is an address that the user gave. One that a data set names is not fetched.
    """

    source: str
    name: str
    data: bytes | None = field(default=None, repr=False)
    fetch: bool = False


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """Where the results of one picture go: label map, legend, and the picture for people, which may be left out."""

    labels: Path
    legend: Path
    overlay: Path | None

    def paths(self) -> tuple[Path, ...]:
        """Return those that are written."""
        return (self.labels, self.legend) if self.overlay is None else (self.labels, self.legend, self.overlay)

    @classmethod
    def named(cls, out: Path, name: str, overlay: bool = True) -> OutputFiles:
        """Return `NAME.png`, `NAME.json` and, if wanted, `NAME_overlay.png` in a folder.

        Args:
            out: The folder.
            name: Path in it, without an ending.
            overlay: Whether there is a picture for people.
        """
        return cls(out / f"{name}.png", out / f"{name}.json", out / f"{name}_overlay.png" if overlay else None)


@dataclass(frozen=True)
class Written:
    """A picture that was segmented: its files, its size (width, height) and its classes, the largest first.

    `scores` holds the mean probability of each class inside its own area, in the order of `segments`; `num_bytes` is
    the size of the files together.
    """

    file: ImageFile
    outputs: OutputFiles
    size: tuple[int, int]
    segments: list[Segment]
    scores: list[float]
    num_bytes: int


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be read, and why, in one line."""

    file: ImageFile
    reason: str


def read_image(picture: str | os.PathLike | ImageFile) -> Image.Image:
    """Return the picture as an upright 8-bit RGB image.

    Raises:
        UnreadableImage: One line that names the file and says what is wrong with it.
    """
    if not isinstance(picture, ImageFile):
        return load_image(picture)
    if picture.data is None:
        if not picture.fetch:
            require_no_address(picture.source)
        return load_image(picture.source)
    file = io.BytesIO(picture.data)
    file.name = picture.source  # what an error calls it
    return load_image(file)


def require_no_address(source: str) -> None:
    """Make sure that what a data set names as a picture's file is none: nothing is fetched unless the user says so.

    Raises:
        UnreadableImage: It is an address.
    """
    if _ADDRESS.match(source):
        raise UnreadableImage(
            f"cannot read image {source!r}: it is an address that the data set names, and nothing is fetched from "
            "there; download the pictures first"
        )


def collect_images(inputs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> list[ImageFile]:
    """Return the pictures that the user means, each once.

    Args:
        inputs: Files, folders and `http(s)` addresses. A folder stands for the image files in it and in its
            sub-folders, sorted by path; hidden files and files of other kinds do not count. A file given by name counts
            whatever its name is.
        out: Folder of the results. It is left out when it lies inside one of the folders.

    Raises:
        ValueError: If one of the inputs does not exist, a folder holds no pictures, or `out` is one of the folders.
    """
    if not inputs:
        raise ValueError("no images were given; name files, folders or addresses")
    hidden = Path(out).resolve() if out is not None else None
    found: dict[str, ImageFile] = {}  # by what they really are, so that a file given twice counts once
    for given in [os.fspath(item) for item in inputs]:
        if given.startswith(("http://", "https://")):
            found.setdefault(given, ImageFile(given, _name_of(given), fetch=True))
            continue
        path = Path(given).expanduser()
        if path.is_dir():
            if path.resolve() == hidden:
                raise ValueError(f"the results cannot go into the image folder {given!r} itself; choose another folder")
            members = list(_walk(path, hidden))
            if not members:
                raise ValueError(f"there are no images in {given!r} ({', '.join(IMAGE_EXTENSIONS)})")
        elif path.exists():
            members = [path]
        else:
            raise ValueError(f"there is no file or folder {given!r}")
        for member in members:
            name = member.relative_to(path).as_posix() if member != path else member.name
            found.setdefault(str(member.resolve()), ImageFile(str(member), name))
    return list(found.values())


def output_folder(out: str | os.PathLike) -> Path:
    """Return the folder of the results, which need not exist.

    Raises:
        ValueError: If it, or a folder above it, is a file.
    """
    folder = Path(out).expanduser()
    existing_part = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not existing_part.is_dir():
        raise ValueError(f"the results cannot go to {str(folder)!r}: {str(existing_part)!r} is a file")
    return folder


def plan_outputs(
    files: Sequence[ImageFile],
    out: str | os.PathLike,
    overwrite: bool = False,
    overlay: bool = True,
    share: slice = slice(None),
) -> list[OutputFiles]:
    """Return where the results of each picture go, and make sure that this is possible before any work begins.

    `sub/cat.jpg` of a folder becomes `sub/cat.png`, `sub/cat.json` and `sub/cat_overlay.png` in `out`. Where two
    pictures would meet, the later one is named after its whole file name (`cat.png` -> `cat_png.png`), then after its
    folder too, then by number. A name depends on the earlier pictures alone, so every process finds the same.

    Args:
        files: The pictures, those of all processes.
        out: Folder of the results; it need not exist.
        overwrite: Whether results that are there already may be replaced.
        overlay: Whether the picture for people is written.
        share: The pictures of this process: only their results are looked for on the disk and returned.

    Raises:
        ValueError: If results are there already and `overwrite` is off, one of the results would replace one of the
            pictures, or `out` is a file.
    """
    out = output_folder(out)
    taken: set[str] = set()
    plan = []
    for file in files:
        for name in _names(file):
            # The overlay's name is kept free in any case: names must not depend on whether overlays are wanted.
            outputs = OutputFiles.named(out, name)
            # Two names that differ in case alone are one file on many disks.
            keys = {str(path).casefold() for path in outputs.paths()}
            if taken.isdisjoint(keys):
                taken |= keys
                plan.append(OutputFiles.named(out, name, overlay))
                break
    plan = plan[share]
    sources = {os.path.realpath(file.source) for file in files}
    there = [path for outputs in plan for path in outputs.paths() if path.exists()]
    for path in there:
        if os.path.realpath(path) in sources:
            raise ValueError(f"a result would replace the image {str(path)!r}; choose another folder for the results")
    if there and not overwrite:
        raise already_there(there[0], len(there))
    return plan


def already_there(path: Path, count: int = 1) -> ValueError:
    """Return the error that says that results would be replaced.

    Args:
        path: One of the results.
        count: How many there are.
    """
    what = f"{str(path)!r} exists" if count == 1 else f"{str(path)!r} and {count - 1} more exist"
    return ValueError(
        f"{what} already; go on where a run was cut off (--resume), allow overwriting (--overwrite) or choose another "
        "folder"
    )


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder; it becomes `path` when all went well and vanishes otherwise.

    So nobody ever sees a half-written file under the final name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt, too, must leave nothing behind
        temporary.unlink(missing_ok=True)
        _name_file(error, path)
        raise


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder beside it; it becomes `folder` when all went well and vanishes otherwise.

    Raises:
        ValueError: If `folder` is a file, or a folder with something in it.
    """
    final = output_folder(folder)
    if final.exists() and any(final.iterdir()):
        raise ValueError(f"{str(final)!r} is not empty; choose another folder")
    final.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
        if final.exists():
            final.rmdir()
        os.replace(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name_file(error, final)
        raise


def _name_file(error: BaseException, path: Path) -> None:
    """Let the error of a full disk say which file it is about; Python names the file only where it cannot be opened."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _walk(folder: Path, left_out: Path | None) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).resolve() != left_out
        )
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or not name.lower().endswith(IMAGE_EXTENSIONS):
                continue
            if path.is_file() or not path.exists():  # no pipe, which would wait; a dangling link is an error later
                yield path


def _name_of(address: str) -> str:
    """The last part of an address's path, as one file name of every system; else the server's name."""
    parts = urlsplit(address)
    name = re.sub(r"[\\\x00-\x1f:*?\"<>|]", "_", PurePosixPath(unquote(parts.path)).name)
    return name if name.strip(".") else (parts.hostname or "address")


def _names(file: ImageFile) -> Iterator[str]:
    """Yield names for the results, the plainest first, without end."""
    path = PurePosixPath(file.name)
    stem = str(path.with_suffix("")) if path.stem else path.name
    full = f"{stem}_{path.suffix[1:]}" if path.suffix else stem
    yield stem
    yield full
    parent = Path(file.source).absolute().parent.name if "://" not in file.source else urlsplit(file.source).netloc
    if parent:
        yield f"{parent}_{stem}" if "/" not in stem else f"{parent}/{stem}"
    number = 2
    while True:
        yield f"{full}_{number}"
        number += 1
