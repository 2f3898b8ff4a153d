"""Training as users start it: real processes, one and two, killed at any moment, from a checkout and from a wheel."""

import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml

from arm_hf import ARMModel

Losses = Callable[[Path], dict[int, float]]

pytestmark = pytest.mark.slow


def start(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start Python with one thread and no accelerator."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ACCELERATE"))}
    clean |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **(env or {})}
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 600) -> str:
    """Wait for the end and return what was printed."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


def run(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run to a good end."""
    process = start(command, cwd, env)
    printed = finish(process)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture
def with_output(flags: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """The flags with another output folder, and more of them."""
    return lambda name, *more: [*flags, "--output-dir", str(tmp_path / name), *more]


@pytest.mark.parametrize(
    "variant",
    [(), ("--cache-features", "--pixel-weighting", "region"), ("--lora",)],
    ids=["plain", "cache and weights", "lora"],
)
def test_two_processes_give_the_curve_of_one(
    variant: tuple[str, ...], with_output: Callable[..., list[str]], root: Path, losses: Losses, tmp_path: Path
) -> None:
    """The same global batch: four images, two a process, or two accumulated twice."""
    data = with_output("")[3]
    more = ("--batch-size", "4", "--epochs", "3", "--val-data", data, "--seed", "3", *variant)
    run(["training/train.py", *with_output("one", *more)], root)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "training/train.py"]
    apart = ("--cache-dir", str(tmp_path / "cache2"))
    run([*torchrun, *with_output("two", *more, *apart)], root)
    run([*torchrun, *with_output("parts", *more, *apart, "--gradient-accumulation-steps", "2")], root)
    one = losses(tmp_path / "one")
    assert len(one) == 6
    for other in ("two", "parts"):
        assert losses(tmp_path / other) == pytest.approx(one, abs=1e-4)
    scores = [(tmp_path / name / "log.jsonl").read_text().count("mean_iou") for name in ("one", "two")]
    assert scores == [3, 3]


def test_two_processes_stop_together_with_one_message(with_output: Callable[..., list[str]], root: Path) -> None:
    """An image that only one of them reads is broken."""
    flags = with_output("broken", "--epochs", "9")
    (Path(flags[3]) / "images" / "photo3.png").write_bytes(b"no image")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "training/train.py"]
    process = start([*torchrun, *flags], root)
    printed = finish(process)
    assert process.returncode != 0
    lines = {
        line.split("error: ")[1] for line in printed.splitlines() if line.startswith("train.py") and "error" in line
    }
    assert len(lines) == 1, printed
    assert "photo3" in lines.pop()


def test_two_processes_stop_on_a_signal_and_resume(
    with_output: Callable[..., list[str]], root: Path, losses: Losses, tmp_path: Path
) -> None:
    more = ("--epochs", "20")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "training/train.py"]
    run(["training/train.py", *with_output("whole", *more)], root)
    process, log = start([*torchrun, *with_output("stopped", *more)], root), tmp_path / "stopped" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = finish(process)
    assert "go on with --resume" in printed
    reached = torch.load(tmp_path / "stopped" / "last" / "training_state.pt", weights_only=True)["step"]
    assert reached == max(losses(tmp_path / "stopped")) < 100
    run([*torchrun, *with_output("stopped", *more, "--resume")], root)
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_kill_9_at_any_moment_loses_at_most_the_steps_since_the_last_checkpoint(
    with_output: Callable[..., list[str]], root: Path, losses: Losses, tmp_path: Path
) -> None:
    more = ("--epochs", "12", "--checkpoint-every", "2", "--dropout", "0.1", "--val-data", with_output("")[3])
    whole, killed = with_output("whole", *more), with_output("killed", *more, "--resume")
    run(["training/train.py", *whole], root)
    state, log = tmp_path / "killed" / "last" / "training_state.pt", tmp_path / "killed" / "log.jsonl"
    moments, saved, kills = random.Random(0), 0, 0
    for _ in range(12):
        process = start(["training/train.py", *killed], root)
        while process.poll() is None and not (log.exists() and len(losses_so_far(log)) > saved + 2):
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 0.6))
        if process.poll() is not None:
            break
        done = max(losses_so_far(log), default=0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        step = torch.load(state, weights_only=True)["step"] if state.exists() else 0
        assert done - step <= 2 + 1, "a checkpoint is written every second step"
        assert step >= saved
        saved = step
        if step:
            ARMModel.from_pretrained(tmp_path / "killed" / "last")
        if kills == 4:
            break
    assert kills >= 2
    run(["training/train.py", *killed], root)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*.part"))


def losses_so_far(log: Path) -> list[int]:
    """Steps in the log of a process that is still writing it."""
    import json

    steps = []
    for line in log.read_text().splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except json.JSONDecodeError:
            continue
    return steps


@pytest.mark.parametrize(
    "command",
    [["training/train.py"], ["-m", "accelerate.commands.launch", "training/train.py"]],
    ids=["python", "accelerate launch"],
)
def test_it_starts_from_a_checkout(
    command: list[str], with_output: Callable[..., list[str]], root: Path, losses: Losses, tmp_path: Path
) -> None:
    """With a config file and flags, as the README says."""
    flags = with_output("run")
    values = dict(zip([flag[2:].replace("-", "_") for flag in flags[:-3:2]], flags[1:-3:2], strict=True))
    values["data"] = [values["data"]]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**values, "cpu": True, "epochs": 7}))
    run(
        [*command, "--config", str(tmp_path / "mine.yaml"), "--output-dir", str(tmp_path / "run"), "--epochs", "1"],
        root,
    )
    assert len(losses(tmp_path / "run")) == 5


def test_it_starts_from_an_installed_wheel(
    with_output: Callable[..., list[str]], root: Path, losses: Losses, tmp_path: Path
) -> None:
    import shutil

    source = tmp_path / "source"
    for name in ("arm_hf", "modeling", "training", "hub_cards"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(root / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    site = tmp_path / "site"
    run(["-m", "pip", "install", *options, "--target", str(site), str(source)], tmp_path)
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    launch = ["-m", "accelerate.commands.launch", "-m", "arm_hf.training.train", "--config", "arm-clip-b16"]
    run(
        [*launch, *with_output("run", "--class-names", "own", "--val-data", "--epochs", "1")],
        tmp_path,
        {"PYTHONPATH": paths},
    )
    assert len(losses(tmp_path / "run")) == 5


def test_the_mini_recipe_learns_on_real_photos(shared: Path, root: Path, losses: Losses, tmp_path: Path) -> None:
    folder = shared / "data" / "coco_stuff171"
    more = ["--max-steps", "8", "--val-images", "2", "--cache-dir", str(tmp_path / "cache"), "--templates", "single"]
    (tmp_path / "set").mkdir()
    for name in ("images", "labels", "classes.json", "val.txt"):
        (tmp_path / "set" / name).symlink_to(folder / name)
    names = (folder / "train.txt").read_text().split()[:12]
    (tmp_path / "set" / "train.txt").write_text("\n".join(names))
    data = ["--data", str(tmp_path / "set"), "--val-data", str(tmp_path / "set")]
    run(["training/train.py", "--config", "arm-clip-mini", *data, *more, "--output-dir", str(tmp_path / "run")], root)
    curve = losses(tmp_path / "run")
    assert curve
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert ARMModel.from_pretrained(tmp_path / "run" / "best").config.clip_name_or_path == str(
        tmp_path / "run" / "clip"
    )
