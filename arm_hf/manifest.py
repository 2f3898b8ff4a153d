"""The record of a run over many pictures: what is done, what this process has to do, and going on after a kill.

Every process appends one line of JSON per picture to a file of its own in the folder of the results
(`manifest.jsonl`, or `manifest.2-of-8.jsonl` for the second of eight), after the picture's files have their final
names. A line that a kill cut short does not count: its picture is looked at again. Runs are told apart by a digest of
all settings that change the label maps, which every legend holds too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from arm_hf.folders import ImageFile, OutputFiles, Skipped, Written, already_there

_NAME = "manifest*.jsonl"


@dataclass(frozen=True)
class Part:
    """The share of one process: jobs `index`, `index + count`, `index + 2 count`, ... of a fixed order.

    Attributes:
        index: Number of the process, from 0.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """Read "3/16", the third of sixteen; `None` asks the launcher (torchrun, accelerate launch).

        Raises:
            ValueError: If the text is not of this form, or the number lies outside 1..count.
        """
        if text is None:
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"a part reads NUMBER/COUNT with 1 <= NUMBER <= COUNT, such as 3/16; got {text!r}")
        return cls(int(match[1]) - 1, int(match[2]))

    @property
    def share(self) -> slice:
        """The jobs of this process among all."""
        return slice(self.index, None, self.count)

    def __str__(self) -> str:
        return f"{self.index + 1}-of-{self.count}"


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells runs apart in a record of a run (`run_record`): all of it but the package's version."""
    flat = {**record, **record.get("settings", {})}
    return {name: value for name, value in flat.items() if name not in ("settings", "arm_hf")}


def digest(record: Mapping[str, Any]) -> str:
    """Return a short name for a run."""
    text = json.dumps(settings_of(record), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Manifest:
    """The manifest of one process in the folder of the results.

    Args:
        out: Folder of the results.
        record: What tells how the label maps are made (`run_record`).
        part: The share of this process.
        existing: What happens to results that are there already: "refuse" is an error, "replace" makes them again,
            "keep" leaves out what the same run has finished.

    Attributes:
        num_kept: Pictures that were left out so far.
    """

    def __init__(self, out: Path, record: Mapping[str, Any], part: Part, existing: str = "refuse"):
        self.out, self.settings, self.part, self.existing = out, settings_of(record), part, existing
        self.run = digest(record)
        self.num_kept = 0
        self._file: TextIO | None = None
        # Hashes of (legend, source), for memory's sake; is_done looks at the files too.
        self._done: set[int] = set()
        self._done_in: Counter[str] = Counter()
        self._rows: dict[str, int] = {}
        self._cut_off: dict[Path, list[str]] = {}
        self._runs: dict[str, dict] = {}
        if existing == "keep":
            for path in sorted(out.glob(_NAME)):
                self._read(path)

    def _read(self, path: Path) -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill
                    continue
                if "settings" in record:
                    self._runs[record["run"]] = record["settings"]
                elif record.get("run") != self.run:
                    continue
                elif "legend" in record and (key := hash((record["legend"], record["source"]))) not in self._done:
                    self._done.add(key)
                    self._done_in[record["legend"].partition("/")[0]] += 1
                elif "rows" in record:
                    self._rows[record["table"]] = record["rows"]

    def left(self, jobs: Iterable[tuple[ImageFile, OutputFiles]]) -> Iterator[tuple[ImageFile, OutputFiles]]:
        """Yield the jobs that are to be done.

        Raises:
            ValueError: If results are there that must not be replaced.
        """
        for file, outputs in jobs:
            if self.existing == "keep" and self.is_done(file, outputs):
                self.num_kept += 1
                continue
            if self.existing == "refuse":
                for path in outputs.paths():
                    if path.exists():
                        raise already_there(path)
            if self.existing == "keep":
                self._remove_cut_off(outputs)
            yield file, outputs

    def _remove_cut_off(self, outputs: OutputFiles) -> None:
        """Remove the temporary files that a kill left of a picture's results; other pictures may be under way."""
        folder = outputs.legend.parent
        if folder not in self._cut_off:
            self._cut_off[folder] = [path.name for path in folder.glob(".*.part")]
        for path in outputs.paths():
            for name in self._cut_off[folder]:
                if name.startswith(f".{path.name}."):
                    (folder / name).unlink(missing_ok=True)

    def is_done(self, file: ImageFile, outputs: OutputFiles) -> bool:
        """Whether this run has finished a picture: it is recorded, or its legend says so, and its files are there.

        Args:
            file: The picture.
            outputs: Where its results go.

        Raises:
            ValueError: If results are there that come from another picture or from other settings.
        """
        legend = outputs.legend.relative_to(self.out).as_posix()
        if hash((legend, file.source)) not in self._done:
            if not outputs.legend.exists():
                return False  # a label map without its legend was cut off
            try:
                found = json.loads(outputs.legend.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise already_there(outputs.legend) from None
            if found.get("run") != self.run:
                raise ValueError(
                    f"{str(outputs.legend)!r} was made {self._difference(found.get('run'))}; go on with the same "
                    "settings, or choose another folder"
                )
            if found.get("source") != file.source:
                raise ValueError(
                    f"{str(outputs.legend)!r} belongs to {found.get('source')!r}, not to {file.source!r}; choose "
                    "another folder"
                )
        return all(path.exists() for path in outputs.paths())

    def _difference(self, run: str | None) -> str:
        before = self._runs.get(run or "")
        if before is None:
            return "by another run"
        names = sorted(name for name in {*before, *self.settings} if before.get(name) != self.settings.get(name))
        return f"with {names[0]} = {before.get(names[0])!r}, this run has {self.settings.get(names[0])!r}"

    def rows_of(self, table: str) -> int | None:
        """Number of rows of a table, if an earlier process read it to its end."""
        return self._rows.get(table)

    def done_in(self, folder: str) -> int:
        """Number of recorded pictures whose results lie in a folder right below that of the results."""
        return self._done_in[folder]

    def note(self, result: Written | Skipped) -> None:
        """Record what became of a picture."""
        record: dict[str, Any] = {"image": result.file.name, "source": result.file.source}
        if isinstance(result, Skipped):
            self.add({**record, "skipped": result.reason})
            return
        paths = dict(zip(("labels", "legend", "overlay"), result.outputs.paths(), strict=False))
        places = {name: path.relative_to(self.out).as_posix() for name, path in paths.items()}
        self.add({**record, **places, "bytes": result.num_bytes})

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record; the first one of a process opens the file and writes the settings before it."""
        if self._file is None:
            self.out.mkdir(parents=True, exist_ok=True)
            name = "manifest.jsonl" if self.part.count == 1 else f"manifest.{self.part}.jsonl"
            path = self.out / name
            cut = _ends_inside_a_line(path)
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - open as long as the run
            if cut:
                self._file.write("\n")
            self._write({"part": str(self.part), "settings": self.settings})
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps({"run": self.run, **record}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self._file.name!r}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # a line that could not be written is tried once more, and was reported
                self._file.close()


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
