"""Training on cached features: the same numbers, no pass through CLIP, and a cache that knows what it was made of."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from arm_hf.modeling.trunk import VisionTower
from arm_hf.training.views import Views

Run = Callable[..., int]
Losses = Callable[[Path], dict[int, float]]


@pytest.fixture
def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of every pass through CLIP's blocks."""
    passes: list[int] = []
    run = VisionTower.run

    def counted(self: VisionTower, pixel_values, *args, **kwargs):
        passes.append(len(pixel_values))
        return run(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(VisionTower, "run", counted)
    return passes


def test_cached_features_give_the_same_losses_and_then_clip_is_not_run(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, count_passes: list[int]
) -> None:
    assert run_training(*flags) == 0
    assert len(count_passes) == 10  # two epochs of five steps
    count_passes.clear()
    cached = [*flags, "--cache-features", "--cache-views", "2", "--cache-dtype", "float32", "--overwrite"]
    assert run_training(*cached, "--output-dir", str(tmp_path / "cached")) == 0
    assert sum(count_passes) == 20 + 1, "every view of every image once, and a blank one for the shapes"
    count_passes.clear()
    assert run_training(*cached, "--output-dir", str(tmp_path / "again")) == 0
    assert not count_passes
    assert losses(tmp_path / "cached") == losses(tmp_path / "again")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)

    half = [*flags, "--cache-features", "--cache-views", "2", "--output-dir", str(tmp_path / "half")]
    assert run_training(*half) == 0
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "run"), rel=1e-2)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
def test_a_cache_is_used_for_the_same_features_alone(run_training: Run, flags: list[str], tmp_path: Path) -> None:
    data, clip = Path(flags[flags.index("--data") + 1]), Path(flags[flags.index("--clip") + 1])
    cached = [*flags, "--cache-features", "--max-steps", "1", "--overwrite"]

    def caches() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    assert run_training(*cached) == 0
    for same in (("--learning-rate", "1e-2"), ("--loss", "cross_entropy"), ("--epochs", "9"), ("--ffn-ratio", "none")):
        assert run_training(*cached, *same) == 0
        assert caches() == 1, same
    others = (("--fusion-layers", "2", "7"), ("--method", "clip"), ("--seed", "1"), ("--resize-max", "72"))
    for number, other in enumerate(others):
        assert run_training(*cached, *other) == 0
        assert caches() == 2 + number, other
    image = data / "images" / "photo5.png"
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 10**9))
    assert run_training(*cached) == 0
    assert caches() == 2 + len(others)
    record = json.loads((clip / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").write_text(json.dumps({**record, "image_mean": [0.4, 0.4, 0.4]}))
    assert run_training(*cached) == 0
    assert caches() == 3 + len(others)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_broken_off_cache_is_completed(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = [*flags, "--cache-features", "--cache-views", "2", "--max-steps", "8"]
    assert run_training(*cached) == 0
    other = [*cached, "--cache-dir", str(tmp_path / "other"), "--output-dir", str(tmp_path / "two")]
    read, seen = Views.__getitem__, []

    def die(self: Views, key):
        seen.append(key)
        if len(seen) == 13:
            raise Killed
        return read(self, key)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("arm_hf.training.feature_cache.SYNC_EVERY", 1)
        patch.setattr(Views, "__getitem__", die)
        run_training(*other)
    read_again: list = []
    monkeypatch.setattr(Views, "__getitem__", lambda self, key: (read_again.append(key), read(self, key))[1])
    assert run_training(*other, "--overwrite") == 0
    assert len(read_again) == 20 - 8, "one batch of eight was on disk"
    assert losses(tmp_path / "two") == losses(tmp_path / "run")


def test_the_cache_is_bounded(
    run_training: Run, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    cached = [*flags, "--cache-features", "--max-steps", "1", "--overwrite"]
    assert run_training(*cached, "--cache-limit-gb", "0.0001") == 2
    error = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert "the features of 10 views need 0.000148 GB, but cache_limit_gb is 0.0001" in error[0]
    assert not list((tmp_path / "cache").rglob("records.bin"))
    assert run_training(*cached, "--cache-limit-gb", "0.0002") == 0
    assert run_training(*cached, "--cache-limit-gb", "0.0002", "--seed", "1") == 2
    assert "of other runs" in capfd.readouterr().err


def test_a_full_disk_while_caching_is_one_clear_line(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cached = [*flags, "--cache-features", "--cache-dtype", "float32", "--overwrite"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
    try:
        assert run_training(*cached) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (error,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "cannot write the feature cache" in error
    assert "File too large" in error
    assert run_training(*cached) == 0
    assert len(losses(tmp_path / "run")) == 10


def test_a_bad_image_stops_the_caching(run_training: Run, flags: list[str], capfd: pytest.CaptureFixture) -> None:
    (Path(flags[flags.index("--data") + 1]) / "images" / "photo3.png").write_bytes(b"no image")
    assert run_training(*flags, "--cache-features") == 2
    assert "photo3" in capfd.readouterr().err


def test_cache_entries_are_read_by_worker_processes(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path
) -> None:
    cached = [*flags, "--cache-features", "--max-steps", "4"]
    assert run_training(*cached) == 0
    assert run_training(*cached, "--workers", "2", "--output-dir", str(tmp_path / "two")) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "two")


def test_runs_of_other_layers_and_seeds_share_a_cache_that_holds_them(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, count_passes: list[int]
) -> None:
    shared = [*flags, "--cache-features", "--cache-dtype", "float32", "--cache-layers", "1", "2", "3", "7"]
    shared += ["--view-seed", "0", "--max-steps", "3"]
    assert run_training(*shared) == 0
    count_passes.clear()
    for seed, layers in (("1", ("1", "2")), ("0", ("7", "1"))):
        changed = ("--seed", seed, "--fusion-layers", *layers)
        assert run_training(*shared, *changed, "--output-dir", str(tmp_path / "shared" / seed)) == 0
        assert not count_passes
        alone = [*flags, *changed, "--view-seed", "0", "--max-steps", "3"]
        assert run_training(*alone, "--output-dir", str(tmp_path / "alone" / seed)) == 0
        found, expected = losses(tmp_path / "shared" / seed), losses(tmp_path / "alone" / seed)
        assert found == pytest.approx(expected, rel=1e-5)
        count_passes.clear()
    assert len(list((tmp_path / "cache").iterdir())) == 1
