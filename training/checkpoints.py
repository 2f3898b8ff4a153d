"""The folder of a run: models that `from_pretrained` loads, and the state that a broken-off run goes on from.

    options.yaml             the options of the run
    log.jsonl                a line per `log_every` steps and per validation
    last/, best/             ARM alone, as ARMModel.from_pretrained and the pipeline load it
    last/training_state.pt   all that the next step depends on
    clip/                    the towers, where they came out of an ARM checkpoint that holds its own

Every file is written under another name and renamed when it is whole. The training state is one file and says all, so
a process that is killed at any moment leaves a run that can be resumed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from arm_hf.folders import atomic_path
from arm_hf.modeling.modeling_arm import ARMModel

from .lora import ADAPTER_FOLDER
from .options import TrainingOptions, save_options

STATE_NAME = "training_state.pt"


class RunFolder:
    """Reads and writes one run.

    Args:
        options: Of the run; `output_dir`, `resume` and `overwrite` are read here.
    """

    def __init__(self, options: TrainingOptions):
        self.options = options
        self.root = Path(options.output_dir).expanduser()
        self.last, self.best, self.log = self.root / "last", self.root / "best", self.root / "log.jsonl"
        self.saved_step = 0

    def check(self) -> None:
        """Raise ValueError when a run is there already and nothing says what should become of it."""
        taken = self.log.exists() or (self.last / STATE_NAME).exists()
        if taken and not (self.options.resume or self.options.overwrite):
            raise ValueError(
                f"{str(self.root)!r} holds a run already; go on with it (--resume), replace it (--overwrite), or "
                "choose another --output-dir"
            )

    def prepare(self) -> None:
        """Make the folder; take away the run that is overwritten, and what a killed process left half-written."""
        with _named("the run's folder", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if self.options.overwrite:
                for folder in (self.last, self.best):
                    shutil.rmtree(folder, ignore_errors=True)
                self.log.unlink(missing_ok=True)
            for left in (*self.root.glob(".*.part"), *self.last.glob(".*.part")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            with atomic_path(self.root / "options.yaml") as path:
                save_options(self.options, path)

    def save_tower(self, model: ARMModel, *parts: Any) -> None:
        """Keep the CLIP of a model whose config names none, so that checkpoints can hold ARM alone.

        Args:
            model: Its `clip` is kept.
            parts: Tokenizer and image processor.
        """
        folder = self.root / "clip"
        with _named("CLIP's weights", folder):
            for part in (model.clip, *parts):
                part.save_pretrained(folder)

    def save_model(self, folder: Path, model: ARMModel, *parts: Any, adapter: Any = None) -> None:
        """Write ARM with the tokenizer and the image processor, and the adapter if CLIP has one.

        Args:
            folder: `last` or `best`.
            model: Its ARM is kept.
            adapter: LoRA of the CLIP, or None.
            parts: Tokenizer and image processor.

        Raises:
            OSError: The disk is full, for example; what was there before is intact.
        """
        fresh = self.root / f".{folder.name}.{os.getpid()}.part"
        try:
            with _named("the model", folder, self.saved_step):
                for part in (model, *parts):
                    part.save_pretrained(fresh)
                if adapter is not None:
                    adapter.save_pretrained(fresh / ADAPTER_FOLDER)
                for path in sorted(fresh.rglob("*")):
                    target = folder / path.relative_to(fresh)
                    if path.is_file():
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(path, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the training state.

        Raises:
            OSError: The disk is full, for example; the state before is intact.
        """
        content = io.BytesIO()  # torch hides why it could not write to a file
        torch.save({**state, "options": self.options.of_the_run()}, content)
        with (
            _named("the training state", self.last, self.saved_step),
            atomic_path(self.last / STATE_NAME) as path,
            path.open("wb") as file,
        ):
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        self.saved_step = state["step"]

    def load_state(self) -> dict[str, Any] | None:
        """The state of the run that is resumed, or None when it has none yet.

        Raises:
            ValueError: That run was made with other options.
            OSError: The file cannot be read.
        """
        path = self.last / STATE_NAME
        if not self.options.resume or not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise many kinds for a damaged file
            raise OSError(f"cannot read {str(path)!r}: {' '.join(str(error).split())[:200]}") from error
        now, before = self.options.of_the_run(), state.pop("options")
        other = [
            f"{name} {before.get(name)!r} (now {now.get(name)!r})" for name in now if now[name] != before.get(name)
        ]
        if other:
            raise ValueError(
                f"the run in {str(self.root)!r} was made with {', '.join(other)}; resume it with the same options, or "
                "start a new run (--init-arm takes over its weights)"
            )
        self.saved_step = state["step"]
        return state

    def write_log(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        with _named("the log", self.log, self.saved_step), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop the lines after a step, which are computed again, and a line that was cut short."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue
        with _named("the log", self.log), atomic_path(self.log) as path:
            path.write_text("".join(kept), encoding="utf-8")


@contextmanager
def _named(what: str, path: Path, saved_step: int = 0) -> Iterator[None]:
    """Say what could not be written, and what is still there."""
    try:
        yield
    except Exception as error:
        # tokenizers raises a bare Exception for a full disk.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        rest = f"; the checkpoint of step {saved_step} is intact, make room and go on with --resume" * bool(saved_step)
        raise OSError(f"cannot write {what} to {str(path)!r}: {reason}{rest}") from error
