"""What an evaluation knows so far: counts per row and scores per image, saved so that a killed run can go on.

Every process of every run writes one file of its own, replaced in one step (`atomic_path`), into the folder `.partial`
of the results. A later run reads them all, whatever the number of processes was, and leaves the images out that they
hold. The files go when the results are written.
"""

from __future__ import annotations

import json
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arm_hf.folders import atomic_path
from arm_hf.metrics import ConfusionMatrix

FOLDER = ".partial"


@dataclass
class Tally:
    """Counts and scores of some images.

    Attributes:
        matrices: Per row the pixels by reference and prediction.
        images: Per image index its name, per row the mIoU of the image, seconds, and seconds of the trunk.
    """

    matrices: dict[str, ConfusionMatrix]
    images: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: Iterable[str], num_classes: int, ignore_index: int, boundary_radius: float | None) -> Tally:
        """Nothing counted.

        Args:
            rows: Names of the rows.
            num_classes: K.
            ignore_index: Label of pixels that do not count.
            boundary_radius: Share of the diagonal, or None without boundaries.
        """
        return cls({row: ConfusionMatrix(num_classes, ignore_index, boundary_radius) for row in rows})

    def add(self, index: int, name: str, references: np.ndarray, found: Any) -> None:
        """Count one image.

        Args:
            index: Its place in the data set.
            name: Its name.
            references: The right labels, (H, W).
            found: What `SharedPass` gave.
        """
        record: dict[str, Any] = {"name": name, "miou": {}, "seconds": {}, "trunk_seconds": {}}
        for row, labels in found.labels.items():
            total = self.matrices[row]
            image = ConfusionMatrix(total.num_classes, total.ignore_index, total.boundary_radius)
            image.update(labels, references)
            total.merge(image)
            score = image.compute()["mean_iou"] if (references != total.ignore_index).any() else None
            record["miou"][row] = score
            record["seconds"][row] = found.seconds[row]
            record["trunk_seconds"][row] = found.trunk_seconds[row]
        self.images[index] = record

    def merge(self, other: Tally) -> None:
        """Add the counts of other images.

        Raises:
            ValueError: An image is in both.
        """
        both = self.images.keys() & other.images.keys()
        if both:
            raise ValueError(f"image {min(both)} was counted twice")
        for row, matrix in other.matrices.items():
            self.matrices[row].merge(matrix)
        self.images.update(other.images)

    def save(self, path: Path) -> None:
        """Write all of it; the file appears complete or not at all."""
        arrays: dict[str, np.ndarray] = {}
        for number, matrix in enumerate(self.matrices.values()):
            arrays[f"counts_{number}"], arrays[f"boundary_{number}"] = matrix.counts, matrix.boundary
        head = {"rows": list(self.matrices), "images": self.images}
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path, like: Tally) -> Tally:
        """Read a saved tally of the same rows.

        Args:
            path: A saved tally.
            like: An empty one of the same rows.

        Raises:
            ValueError: The file is damaged or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["rows"] != list(like.matrices):
                    raise ValueError(f"it holds {', '.join(head['rows'])}")
                matrices = {}
                for number, (row, matrix) in enumerate(like.matrices.items()):
                    counts = {"counts": arrays[f"counts_{number}"], "boundary": arrays[f"boundary_{number}"]}
                    matrices[row] = ConfusionMatrix.from_state({**matrix.state(), **counts})
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot read the saved state {str(path)!r}: {error}; remove it to go on") from error
        return cls(matrices, {int(index): record for index, record in head["images"].items()})


class PartialResults:
    """The folder of saved states of one evaluation.

    Args:
        out: Folder of the results.
        identity: Everything that determines the numbers; a run goes on only where it is the same.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.folder = out / FOLDER
        self.identity = json.loads(json.dumps(identity))
        self._file = self.folder / f"{uuid.uuid4().hex}.npz"

    def begin(self, empty: Tally, discard: bool = False) -> Tally:
        """What earlier runs have counted; called by one process before any of them saves.

        Args:
            empty: A tally of the same rows.
            discard: Throw earlier states of another evaluation away.

        Raises:
            ValueError: The folder holds the state of another evaluation.
        """
        run = self.folder / "run.json"
        if run.is_file():
            earlier = json.loads(run.read_text(encoding="utf-8"))
            differing = sorted(_differences(earlier, self.identity))
            if differing and not discard:
                raise ValueError(
                    f"{str(self.folder.parent)!r} holds an unfinished evaluation with another "
                    f"{', '.join(differing[:3])}; choose another --out, or discard it with --overwrite"
                )
            if differing:
                shutil.rmtree(self.folder)
        if not run.is_file():
            with atomic_path(run) as path:
                path.write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
        for path in sorted(self.folder.glob("*.npz")):
            empty.merge(Tally.load(path, empty))
        return empty

    def save(self, tally: Tally) -> None:
        """Write what this process has counted in this run."""
        if tally.images:
            tally.save(self._file)


def remove_partial(out: str | Path) -> None:
    """Remove all states of an evaluation whose results are written."""
    shutil.rmtree(Path(out) / FOLDER, ignore_errors=True)


def _differences(one: Any, other: Any, path: Sequence[str] = ()) -> set[str]:
    """Names of the entries in which two records differ, such as "model.dtype"."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return set().union(*(_differences(one.get(key), other.get(key), (*path, key)) for key in keys))
    return set() if one == other else {".".join(path[:2])}
