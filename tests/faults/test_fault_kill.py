"""Commands that are killed, interrupted or told to end at random moments of their work: nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm process"),
]

KILLS, SIGNALS = 4, 4


@dataclass
class Server:
    """Commands in forked copies of a warm process (`fork_server.py`)."""

    process: subprocess.Popen
    output: Path

    def start(self, program: str, arguments: list, unchecked: bool = False) -> int:
        """Start a command and return its process id."""
        request = {"program": program, "arguments": list(map(str, arguments)), "output": str(self.output)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**request, "unchecked": unchecked}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self, process: int, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        assert process > 1, process
        with suppress(ProcessLookupError):
            os.kill(process, number)

    def end(self) -> tuple[int, str]:
        """Wait for it; exit code (the negative signal where one ended it) and what it printed."""
        return self._answer(), self.output.read_text(errors="replace")

    def _answer(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server ended"
        return int(line)


@pytest.fixture(scope="module")
def server(tmp_path_factory, environment) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    (folder / "temporary").mkdir()
    process = subprocess.Popen(
        command,
        env={**environment, "TMPDIR": str(folder / "temporary"), "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    yield Server(process, folder / "printed.txt")
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=60)


@dataclass
class Work:
    """A command that can be stopped.

    Attributes:
        program: "arm-hf" or "train".
        arguments: Of it, given the folder of the results.
        same: Compares the results of two runs; fails where they differ.
        again: Further arguments that let it go on.
        unchecked: Leave out the fresh processes that `publish` starts.
    """

    program: str
    arguments: Callable[[Path], list]
    same: Callable[[Path, Path], None]
    again: tuple = ()
    unchecked: bool = False


def same_files(one: Path, other: Path) -> None:
    """All files alike, byte by byte, but for the log of the work itself."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for name in names:
        if name.name != "manifest.jsonl":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def same_numbers(one: Path, other: Path) -> None:
    """Evaluations with the same figures; times differ."""
    figures = []
    for folder in (one, other):
        results = json.loads((folder / "results.json").read_text())
        for row in results["results"]:
            del row["seconds_per_image"]
        figures.append((results["results"], (folder / "images.csv").read_text()))
        assert not (folder / ".partial").exists()
    assert figures[0] == figures[1]


def same_training(one: Path, other: Path) -> None:
    """Trainings with the same losses and weights, bit by bit."""
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    losses = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]
    first, second = (load_file(folder / "last" / "model.safetensors") for folder in (one, other))
    assert all(first[name].equal(second[name]) for name in first)


def same_export(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


@pytest.fixture
def work(models, labelled, training_flags, tmp_path, draw) -> dict[str, Work]:
    photos, data = tmp_path / "photos", labelled(24)
    photos.mkdir()
    for number in range(24):
        draw(200 + number, 150, number).save(photos / f"{number:02}.jpg")
    model = ("--model", models / "full")
    on_cpu = ("--device", "cpu", "--out")
    segment = ["segment", photos, "--labels", "cat,dog", *model, "--batch-size", 2, "--workers", 1, *on_cpu]
    evaluate = ["evaluate", "--data", data, "--methods", "clip,sclip", *model, "--save-every", 1, "--pictures", 1]
    steps = ("--max-steps", 30, "--checkpoint-every", 2, "--dropout", 0.1)
    cache = ("--max-steps", 2, "--cache-features", "--cache-views", 3, "--cache-dtype", "float32", "--resume")
    return {
        "segment": Work("arm-hf", lambda out: [*segment, out], same_files, ("--resume",)),
        "evaluate": Work("arm-hf", lambda out: [*evaluate, *on_cpu, out], same_numbers),
        "train": Work("train", lambda out: training_flags(data, out, *steps, "--resume"), same_training),
        "cache": Work(
            "train", lambda out: training_flags(data, out, *cache, "--cache-dir", out / "cache"), same_training
        ),
        "export": Work("arm-hf", lambda out: ["export", "--format", "torch", *model, "--out", out], same_export),
        "publish": Work(
            "arm-hf",
            lambda out: ["publish", models / "full", "--repo-id", "o/arm", "--dry-run", "--keep", out],
            same_files,
            unchecked=True,
        ),
    }


NAMES = ("segment", "evaluate", "train", "cache", "export", "publish")


def unbroken(server: Server, task: Work, out: Path) -> float:
    """Run to the end; the seconds it took."""
    began = time.monotonic()
    server.start(task.program, task.arguments(out), task.unchecked)
    code, printed = server.end()
    assert code == 0, printed
    return time.monotonic() - began


def whole(case: Any, out: Path) -> None:
    """All files with their final names are complete."""
    for path in sorted(out.rglob("*")) if out.exists() else ():
        parts = path.relative_to(out).parts
        if path.is_file() and not any(part.endswith(".part") for part in parts):
            case.parses(path)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(faults, server, work, tmp_path, name):
    task, moments = work[name], random.Random(name)
    seconds = unbroken(server, task, tmp_path / "unbroken")
    out, more, finished = tmp_path / "killed", (), False
    for number in range(KILLS):
        with faults.case("kill -9", f"{name}, kill {number}") as case:
            process = server.start(task.program, [*task.arguments(out), *more], task.unchecked)
            time.sleep(moments.uniform(0.2, 0.8) * seconds)
            server.stop(process, signal.SIGKILL)
            code, printed = server.end()
            whole(case, out)
            assert code in (-signal.SIGKILL, 0), printed
            case.right()
            more, finished = task.again, code == 0
        if finished:
            break
    with faults.case("kill -9", f"{name}, and then to the end") as case:
        if not finished:
            server.start(task.program, [*task.arguments(out), *more], task.unchecked)
            code, printed = server.end()
            assert code == 0, printed
        case.whole(out)
        task.same(tmp_path / "unbroken", out)
        case.right()


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_at_random_moments(faults, server, work, tmp_path, name):
    task, moments = work[name], random.Random(name)
    seconds = unbroken(server, task, tmp_path / "unbroken")
    for number in range(SIGNALS):
        asked, expected = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[number % 2]
        out = tmp_path / f"out{number}"
        with faults.case("signals", f"{name}, {asked.name} {number}") as case:
            process = server.start(task.program, task.arguments(out), task.unchecked)
            time.sleep(moments.uniform(0.05, 0.9) * seconds)
            server.stop(process, asked)
            code, printed = server.end()
            assert "Traceback" not in printed, printed
            if out.exists() and name != "cache":
                case.whole(out)
            assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
            if code == 0:
                case.right()
                continue
            assert code == expected, printed
            said = [line for line in printed.splitlines() if "interrupted" in line or line.startswith("stopped by")]
            assert len(said) == 1, printed
            case.line(said[0])


def test_told_to_end_while_starting(faults, environment, models, tmp_path, draw):
    """A real process, while Python still loads libraries: it ends at once, by itself or by the signal."""
    draw(64, 48).save(tmp_path / "photo.png")
    arguments = ["segment", tmp_path / "photo.png", "--labels", "cat", "--model", models / "clip"]
    for number, delay in enumerate((0.3, 1.0, 2.0, 3.0)):
        asked = (signal.SIGTERM, signal.SIGINT)[number % 2]
        out = tmp_path / f"out{number}"
        with faults.case("signals", f"{asked.name} after {delay} s") as case:
            process = subprocess.Popen(
                [sys.executable, "-m", "arm_hf.cli", *map(str, arguments), "--out", str(out)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
            time.sleep(delay)
            process.send_signal(asked)
            _, printed = process.communicate(timeout=120)
            # Python ends itself by SIGINT where the interrupt met code that C++ had started.
            assert process.returncode in (0, 130, 143, -asked, -signal.SIGINT), printed
            if out.exists():
                case.whole(out)
            case.right()


def test_records_of_the_results_agree(faults, server, work, tmp_path):
    """After kills and going on, every picture is recorded as done, and no record names a file that is not there."""
    task, out = work["segment"], tmp_path / "out"
    seconds = unbroken(server, task, tmp_path / "unbroken")
    process = server.start(task.program, task.arguments(out))
    time.sleep(0.6 * seconds)
    server.stop(process, signal.SIGKILL)
    server.end()
    with faults.case("kill -9", "segment: the manifest") as case:
        server.start(task.program, [*task.arguments(out), "--resume"])
        code, printed = server.end()
        assert code == 0, printed
        lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        done = {line["image"] for line in lines if "legend" in line}
        legends = {json.loads(path.read_text())["image"] for path in out.glob("*.json")}
        assert done <= legends and len(legends) == 24
        assert all((out / line[kind]).exists() for line in lines if "legend" in line for kind in ("labels", "legend"))
        assert np.unique([line["image"] for line in lines if "legend" in line]).size == len(done)
        case.right()
