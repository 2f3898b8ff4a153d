"""Disks that are full or read-only, and outputs that are in the way: one clear line, and nothing half-written."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GROUP = "disk"
EXPORT = pytest.param("export", marks=pytest.mark.slow)  # tracing takes seconds
COMMANDS = ("segment", "evaluate", "compare", "coherence", EXPORT, "publish", "train", "cache")


@pytest.fixture
def commands(cli, training, training_flags, models, labelled, tmp_path, draw, monkeypatch) -> dict[str, Callable]:
    """What writes: each takes where its results go and runs in this process."""
    photos, data = tmp_path / "photos", labelled(4)
    photos.mkdir()
    for number in range(4):
        draw(64, 48, number).save(photos / f"{number}.png")
    monkeypatch.setattr("arm_hf.publishing.check", lambda built: "left out here")  # two fresh processes
    model = ("--model", models / "full")

    def train(out: Path, *more: str):
        return training(*training_flags(data, out, "--max-steps", 2, "--checkpoint-every", 1, *more))

    options = ("--device", "cpu", "--out")
    return {
        "segment": lambda out: cli("segment", photos, "--labels", "cat,sky", *model, *options, out),
        "evaluate": lambda out: cli("evaluate", "--data", data, *model, "--pictures", 1, *options, out),
        "compare": lambda out: cli(
            "compare", photos / "0.png", "--labels", "cat", "--methods", "clip", *model, *options, out / "grid.png"
        ),
        "coherence": lambda out: cli("coherence", data, *model, *options, out / "numbers.json"),
        "export": lambda out: cli("export", "--format", "torch", *model, "--out", out),
        "publish": lambda out: cli("publish", models / "full", "--repo-id", "o/arm", "--dry-run", "--keep", out),
        "train": train,
        "cache": lambda out: train(tmp_path / "run", "--cache-features", "--cache-dir", str(out), "--overwrite"),
    }


@pytest.mark.parametrize("name", [name if isinstance(name, str) else "export" for name in COMMANDS])
def test_the_output_is_a_file_or_below_one(faults, commands, tmp_path, name):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for out in (taken, taken / "below", taken / "far" / "below"):
        with faults.case(GROUP, f"{name} into {out.relative_to(tmp_path)}") as case:
            case.command(commands[name](out), 1, 2)
            assert taken.read_text() == "mine"


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """No file may grow longer: stands for a full disk where none can be mounted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_can_grow(faults, commands, tmp_path, monkeypatch, name):
    for limit in (10, 20_000) if name != "export" else (700,):
        out = tmp_path / f"out{limit}"
        with faults.case(GROUP, f"{name} with files of at most {limit} bytes") as case:
            with files_up_to(limit):
                done = commands[name](out)
            case.command(done, 0, 1)
            assert limit > 100 or done.code == 1
            if out.exists() and name != "cache":
                case.whole(out)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(faults, commands, tiny_disk, name):
    ballast = tiny_disk / "ballast"
    for room in (0, 8, 40) if name != "export" else (8,):  # kB
        out = tiny_disk / f"{name}{room}"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        os.truncate(ballast, max(0, ballast.stat().st_size - room * 1024))
        with faults.case(GROUP, f"{name} with {room} kB left") as case:
            done = commands[name](out)
            case.command(done, 0, *((2,) if name == "cache" else (1,)))  # a cache is measured before it is begun
            assert room or done.code != 0
            assert "No space" in done.err or "GB free" in done.err or done.code == 0, done.err
            if out.exists() and name != "cache":
                case.whole(out)
        ballast.unlink()
        subprocess.run(["rm", "-rf", *map(str, tiny_disk.iterdir())], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk(faults, commands, tiny_disk, name):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    try:
        with faults.case(GROUP, f"{name} on a read-only disk") as case:
            done = commands[name](tiny_disk / "out")
            case.command(done, 1, 2)
            assert "Read-only" in done.err, done.err
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(tiny_disk)], check=True)


def test_a_full_disk_for_temporary_files(faults, commands, tiny_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tiny_disk))
    with faults.case(GROUP, "publish without room for temporary files") as case:
        case.command(commands["publish"](tmp_path / "kept"), 1)
        assert not (tmp_path / "kept").exists() and not list(tiny_disk.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_takes_nothing(faults, environment, tmp_path):
    """The list of labels needs no torch: real processes are cheap."""
    for arguments in (["labels"], ["labels", "ade150"], ["--help"]):
        with faults.case(GROUP, f"{' '.join(arguments)} > /dev/full") as case, open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "arm_hf.cli", *arguments]
            done = subprocess.run(
                command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
            )
            assert done.returncode == 1, done
            assert "No space" in done.stderr
            case.line(done.stderr)
    with faults.case(GROUP, "labels | true") as case:
        command = f"{sys.executable} -m arm_hf.cli labels ade150 | true"
        done = subprocess.run(command, shell=True, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert done.stderr == ""
        case.right()
