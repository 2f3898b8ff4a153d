"""Faults that are handed to the product one by one: every case is counted, and a table says what became of all.

    pytest tests/faults --fault-table FILE

A case ends with the right answer or with one clear line. Everything else fails the test, after all of its cases ran.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from tests.faults.ledger import LINE, LOST, RIGHT, TRACEBACK, WRONG, Ledger, ledger_of


class Failed(AssertionError):
    """A case went wrong, in one of the ways that the table counts."""

    def __init__(self, outcome: str, text: str):
        super().__init__(text)
        self.outcome = outcome


@dataclass
class Done:
    """A command that ended: exit code, output, error output, and the traceback if one got out."""

    code: int
    out: str
    err: str
    crash: str = ""


@dataclass
class Case:
    """One fault; a test says what it led to."""

    outcome: str = ""

    def right(self) -> None:
        """The answer was right."""
        self.outcome = RIGHT

    def line(self, text: str) -> None:
        """The answer was this line."""
        if "Traceback" in text:
            raise Failed(TRACEBACK, text)
        if not text.strip() or len(text.strip().splitlines()) != 1:
            raise Failed(WRONG, f"not one line: {text!r}")
        self.outcome = LINE

    def command(self, done: Done, *codes: int) -> None:
        """The command ended with one of these exit codes (by default any), and with one line if it failed."""
        if done.crash or "Traceback" in done.err:
            raise Failed(TRACEBACK, done.crash or done.err)
        if codes and done.code not in codes:
            raise Failed(WRONG, f"exit code {done.code}: {done.out}\n{done.err}")
        if done.code == 0:
            return self.right()
        errors = [line for line in done.err.splitlines() if line.startswith(("arm-hf: ", "train.py: "))]
        others = [line for line in done.err.splitlines() if line.strip() and line not in errors]
        progress = [line for line in others if "it/s" not in line and "%|" not in line and "?" not in line]
        if len(errors) != 1 or progress:
            raise Failed(WRONG, f"not one line: {done.err!r}")
        self.line(errors[0])

    def whole(self, folder: Path) -> None:
        """Every file below a folder is complete, and nothing temporary is left."""
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(".part"):
                raise Failed(LOST, f"{path} is left")
            if path.is_file():
                self.parses(path)

    def parses(self, path: Path) -> None:
        """A file can be read to its end."""
        try:
            match path.suffix:
                case ".png" | ".jpg":
                    with Image.open(path) as image:
                        image.load()
                case ".json":
                    json.loads(path.read_text(encoding="utf-8"))
                case ".jsonl":
                    for line in path.read_text(encoding="utf-8").splitlines():
                        json.loads(line)
                case ".npz":
                    with np.load(path) as arrays:
                        [arrays[name] for name in arrays]
                case ".safetensors":
                    with safe_open(path, "pt") as file:
                        [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
                case ".pt":
                    torch.load(path, weights_only=True)
                case ".pt2":
                    torch.export.load(path)
                case ".onnx":
                    import onnx

                    onnx.checker.check_model(onnx.load(path))
        except Exception as error:
            raise Failed(LOST, f"{path}: {type(error).__name__}: {error}") from error


def require(condition: Any, text: str, outcome: str = WRONG) -> None:
    """Fail the case unless a condition holds."""
    if not condition:
        raise Failed(outcome, text)


class Faults:
    """Counts the cases of a test."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.failures = ledger, []

    @contextlib.contextmanager
    def case(self, group: str, name: str) -> Iterator[Case]:
        """A case; what goes wrong in it is noted, and the test goes on.

        Args:
            group: Row of the table.
            name: What the fault is.
        """
        case, text = Case(), "nothing was found out"
        try:
            yield case
            outcome = case.outcome or WRONG
        except Failed as error:
            outcome, text = error.outcome, str(error)
        except AssertionError as error:
            outcome, text = WRONG, str(error)
        except Exception:
            outcome, text = TRACEBACK, traceback.format_exc()
        self.ledger.count(group, outcome)
        if outcome not in (RIGHT, LINE):
            self.failures.append(f"{group}: {name}: {outcome}\n{text[-3000:]}")

    def note(self, text: str) -> None:
        """A figure that belongs under the table."""
        self.ledger.notes.append(text)


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    """The cases of this test; fails it at its end if one of them went wrong."""
    found = Faults(ledger_of(request.config))
    yield found
    if found.failures:
        pytest.fail("\n\n".join(found.failures), pytrace=False)


@pytest.fixture
def cli() -> Iterator[Callable[..., Done]]:
    """Runs `arm-hf ARGUMENTS` in this process."""
    from transformers.utils import logging

    from arm_hf.cli import main

    before = logging.get_verbosity()

    def run(*arguments: Any) -> Done:
        out, err, crash, code = io.StringIO(), io.StringIO(), "", 0
        argv, sys.argv = sys.argv, ["arm-hf", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            crash = traceback.format_exc()
        finally:
            sys.argv = argv
        return Done(code, out.getvalue(), err.getvalue(), crash)

    yield run
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def training(models: Path) -> Iterator[Callable[..., Done]]:
    """Runs a short training on the small CLIP in this process: data, folder of the run, further options."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from arm_hf.training.train import main

    def run(*arguments: Any) -> Done:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        out, err, crash, code = io.StringIO(), io.StringIO(), "", 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(list(map(str, arguments)))
        except Exception:
            crash = traceback.format_exc()
        return Done(code, out.getvalue(), err.getvalue(), crash)

    yield run
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def training_flags(models: Path) -> Callable[..., list[str]]:
    """The command line of a short training on the small CLIP: data, folder of the run, further options."""

    def flags(data: Path, out: Path, *more: Any) -> list[str]:
        return [
            *("--clip", str(models / "clip"), "--data", str(data), "--output-dir", str(out)),
            *("--crop-size", "64", "--resize-min", "64", "--resize-max", "80", "--shortest-edge", "64"),
            *("--fusion-layers", "1", "2", "--templates", "single", "--batch-size", "2"),
            *("--workers", "0", "--log-every", "1", "--cpu", *map(str, more)),
        ]

    return flags


@pytest.fixture(scope="session")
def environment(root: Path) -> dict[str, str]:
    """Of a process that runs this package."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_clip_config: CLIPConfig,
    tiny_tokenizer: CLIPTokenizer,
    tiny_image_processor: CLIPImageProcessor,
) -> Path:
    """Folders of small models: `clip`, and an ARM on it as `lean`, `full` and `packed`."""
    from arm_hf import ARMModel

    root = tmp_path_factory.mktemp("models")
    vision = {**tiny_clip_config.vision_config.to_dict(), "num_hidden_layers": 3, "hidden_size": 64}
    vision["intermediate_size"] = 128
    text = {**tiny_clip_config.text_config.to_dict(), "num_hidden_layers": 1, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(projection_dim=64, vision_config=vision, text_config=text)).eval()
        for weight in clip.parameters():
            if weight.ndim >= 2:
                weight.mul_(2.0)
        for part in (clip, tiny_tokenizer, tiny_image_processor):
            part.save_pretrained(root / "clip")
        model = ARMModel.from_clip(root / "clip", fusion_layers=(1, 2), ffn_ratio=1.0, templates="single").eval()
    forms: dict[str, dict[str, Any]] = {
        "lean": {},
        "full": {"self_contained": True},
        "packed": {"weight_packing": "int8"},
    }
    for form, options in forms.items():
        model.save_pretrained(root / form, **options)
        for part in (tiny_tokenizer, tiny_image_processor):
            part.save_pretrained(root / form)
    return root


@pytest.fixture
def pipe(models: Path) -> Any:
    """A pipeline with the small ARM."""
    from arm_hf.loading import load_pipeline

    return load_pipeline(str(models / "full"), device="cpu")


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """Draws a picture of coloured blocks: width, height, seed."""
    return scene


@pytest.fixture
def labelled(tmp_path: Path) -> Callable[..., Path]:
    """Writes a labelled folder: `images/`, `labels/`, `classes.json`, `train.txt`, `val.txt`."""

    def write(
        count: int, classes: Sequence[str] = ("background", "cat", "sky"), names: Sequence[str] | None = None
    ) -> Path:
        folder = tmp_path / "labelled"
        (folder / "images").mkdir(parents=True)
        (folder / "labels").mkdir()
        names = names or [f"{number:03}" for number in range(count)]
        for number, name in enumerate(names):
            scene(96, 64, number).save(folder / "images" / f"{name}.png")
            rng = np.random.default_rng(number)
            blocks = rng.integers(0, len(classes), (4, 6)).repeat(16, 0).repeat(16, 1)
            Image.fromarray(blocks.astype(np.uint8)).save(folder / "labels" / f"{name}.png")
        record = {"classes": list(classes), "background_index": 0, "ignore_index": 255}
        (folder / "classes.json").write_text(json.dumps(record))
        for split in ("train", "val"):
            (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 100 kB; skips where none can be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
