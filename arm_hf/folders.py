"""Many pictures in, many files out: what to read, what the results are called, and writing them safely."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from PIL import Image

from arm_hf.modeling.images import IMAGE_EXTENSIONS, UnreadableImage, load_image

__all__ = [
    "ImageFile",
    "OutputFiles",
    "UnreadableImage",
    "atomic_path",
    "collect_images",
    "plan_outputs",
    "read_image",
]


@dataclass(frozen=True)
class ImageFile:
    """A picture to work on.

    Attributes:
        source: Its path or address.
        name: What people call it: the path inside the folder that was given, or the file's name.
    """

    source: str
    name: str


@dataclass(frozen=True)
class OutputFiles:
    """Where the results of one picture go: label map, legend, and the picture for people."""

    labels: Path
    legend: Path
    overlay: Path

    def paths(self) -> tuple[Path, Path, Path]:
        """Return all three."""
        return self.labels, self.legend, self.overlay


def read_image(path: str | os.PathLike) -> Image.Image:
    """Return the picture as an upright 8-bit RGB image.

    Raises:
        UnreadableImage: One line that names the file and says what is wrong with it.
    """
    return load_image(path)


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
            name = PurePosixPath(unquote(urlsplit(given).path)).name or urlsplit(given).netloc
            found.setdefault(given, ImageFile(given, name))
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


def plan_outputs(files: Sequence[ImageFile], out: str | os.PathLike, overwrite: bool = False) -> list[OutputFiles]:
    """Return where the results of each picture go, and make sure that this is possible before any work begins.

    `sub/cat.jpg` of a folder becomes `sub/cat.png`, `sub/cat.json` and `sub/cat_overlay.png` in `out`. Where two
    pictures would meet, the later one is named after its whole file name (`cat.png` -> `cat_png.png`), then after its
    folder too, then by number.

    Args:
        files: The pictures.
        out: Folder of the results; it need not exist.
        overwrite: Whether results that are there already may be replaced.

    Raises:
        ValueError: If results are there already and `overwrite` is off, one of the results would replace one of the
            pictures, or `out` is a file.
    """
    out = Path(out).expanduser()
    existing_part = next(part for part in (out, *out.absolute().parents) if part.exists())
    if not existing_part.is_dir():
        raise ValueError(f"the results cannot go to {str(out)!r}: {str(existing_part)!r} is a file")
    taken: set[str] = set()
    plan = []
    for file in files:
        for name in _names(file):
            outputs = OutputFiles(out / f"{name}.png", out / f"{name}.json", out / f"{name}_overlay.png")
            # Two names that differ in case alone are one file on many disks.
            keys = {str(path).casefold() for path in outputs.paths()}
            if taken.isdisjoint(keys):
                taken |= keys
                plan.append(outputs)
                break
    sources = {os.path.realpath(file.source) for file in files}
    there = [path for outputs in plan for path in outputs.paths() if path.exists()]
    for path in there:
        if os.path.realpath(path) in sources:
            raise ValueError(f"a result would replace the image {str(path)!r}; choose another folder for the results")
    if there and not overwrite:
        what = f"{str(there[0])!r} exists" if len(there) == 1 else f"{str(there[0])!r} and {len(there) - 1} more exist"
        raise ValueError(f"{what} already; allow overwriting (--overwrite) or choose another folder")
    return plan


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
    except BaseException:  # an interrupt, too, must leave nothing behind
        temporary.unlink(missing_ok=True)
        raise


def _walk(folder: Path, left_out: Path | None) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).resolve() != left_out
        )
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS):
                yield Path(parent, name)


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
