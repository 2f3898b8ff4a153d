"""Fixtures of the training tests: small labelled folders, and runs in this process."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a labelled folder of coloured discs on noise: `images/`, `labels/`, `classes.json`, `train.txt`, ..."""

    def make(
        name: str = "discs", classes: Sequence[str] = ("cat", "dog", "sky"), images: int = 10, **record: Any
    ) -> Path:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        (folder / "labels").mkdir()
        random = np.random.default_rng(len(name))
        names = [f"photo{index}" for index in range(images)]
        for index, stem in enumerate(names):
            height, width = 80 + index, 100
            y, x = np.mgrid[:height, :width]
            disc = (y - 40) ** 2 + (x - 30 - index) ** 2 < 700
            labels = np.where(disc, index % len(classes), (index + 1) % len(classes)).astype(np.uint8)
            pixels = np.asarray([(200, 40, 40), (40, 200, 40), (40, 40, 200)])[labels % 3]
            pixels = np.clip(pixels + random.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
            labels[: 5 + index] = 255
            Image.fromarray(pixels).save(folder / "images" / f"{stem}.png")
            Image.fromarray(labels).save(folder / "labels" / f"{stem}.png")
        (folder / "classes.json").write_text(json.dumps({"classes": list(classes), "ignore_index": 255, **record}))
        (folder / "train.txt").write_text("\n".join(names))
        (folder / "val.txt").write_text("\n".join(names[:4]))
        return folder

    return make


@pytest.fixture
def flags(tiny_clip_folder: Path, make_data: Callable[..., Path], tmp_path: Path) -> list[str]:
    """The command line of a run of 5 steps an epoch on the tiny CLIP."""
    return [
        *("--clip", str(tiny_clip_folder), "--data", str(make_data()), "--output-dir", str(tmp_path / "run")),
        *("--crop-size", "64", "--resize-min", "64", "--resize-max", "80", "--shortest-edge", "64"),
        *("--templates", "single", "--batch-size", "2", "--learning-rate", "1e-3", "--epochs", "2"),
        *("--workers", "0", "--log-every", "1", "--cache-dir", str(tmp_path / "cache"), "--cpu"),
    ]


@pytest.fixture
def run_training() -> Iterator[Callable[..., int]]:
    """Runs the trainer's command line in this process and returns its exit code."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from arm_hf.training.train import main

    def run(*arguments: str) -> int:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return main(arguments)

    yield run
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def read_log() -> Callable[[Path], list[dict]]:
    """The lines of a run's log."""

    def read(run: Path) -> list[dict]:
        return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def losses(read_log: Callable[[Path], list[dict]]) -> Callable[[Path], dict[int, float]]:
    """Step to loss, as logged; a step that is logged twice fails."""

    def read(run: Path) -> dict[int, float]:
        lines = [(line["step"], line["loss"]) for line in read_log(run) if "loss" in line]
        assert len(dict(lines)) == len(lines)
        return dict(lines)

    return read
