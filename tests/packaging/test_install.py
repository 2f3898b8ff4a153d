"""Each way to use the package works: from the checkout, editable, and from a wheel outside the checkout."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOMS = {
    "arm_hf": "arm_hf",
    "modeling": "arm_hf/modeling",
    "training": "arm_hf/training",
    "hub_cards": "arm_hf/hub_cards",
}

# Dependencies are installed already; only our own files are under test.
PIP = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]

USE = """
import arm_hf, arm_hf.modeling.method, arm_hf.training, arm_hf.hub_cards, arm_hf.cli
from pathlib import Path
from transformers import AutoConfig
assert AutoConfig.for_model("arm").model_type == "arm"
assert "sclip" in arm_hf.list_methods()
assert len(arm_hf.load_label_set("voc21")) == 21
print(Path(arm_hf.__file__).resolve().parent)
print(Path(arm_hf.modeling.method.__file__).resolve().parent)
"""


def _pip(*arguments: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that make the package: building leaves its traces there, not in the checkout."""
    import shutil

    copy = tmp_path_factory.mktemp("source")
    for name in ROOMS:
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (root / name).exists():
            shutil.copy(root / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _pip("wheel", *PIP, "--wheel-dir", folder, ".", cwd=source)
    (built,) = folder.glob("arm_hf-*.whl")
    return built


def test_wheel_holds_every_file_and_no_test(source: Path, wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{target}/{path.relative_to(source / room).as_posix()}"
        for room, target in ROOMS.items()
        for path in (source / room).rglob("*")
        if path.is_file() and "egg-info" not in str(path)
    }
    assert expected - inside == set(), "files of the checkout that the wheel lacks"
    assert inside - expected == set(), "files in the wheel that are not of the package"
    assert {name.split("/")[0] for name in inside} == {"arm_hf"}


def test_wheel_is_small_enough_to_ship(wheel: Path) -> None:
    assert wheel.stat().st_size < 40e6


def test_installed_wheel_works_outside_the_checkout(
    wheel: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    site = tmp_path / "site"
    _pip("install", *PIP, "--target", site, wheel, cwd=tmp_path)
    package, methods = run_python(USE, cwd=tmp_path, path=site).split()
    assert Path(package) == (site / "arm_hf").resolve()
    assert Path(methods) == (site / "arm_hf" / "modeling").resolve()
    assert (site / "bin" / "arm-hf").exists() or (site / "Scripts").exists()


def test_checkout_wins_over_an_installed_wheel(
    wheel: Path, root: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """In the checkout's root, Python finds the checkout's arm_hf first: its sub-packages must come along."""
    site = tmp_path / "site"
    _pip("install", *PIP, "--target", site, wheel, cwd=tmp_path)
    package, methods = run_python(USE, cwd=root, path=site).split()
    assert Path(package) == root / "arm_hf"
    assert Path(methods) == root / "modeling"


def test_editable_install_works(source: Path, tmp_path: Path, run_python: Callable[..., str]) -> None:
    """In a fresh environment that sees this one's dependencies through a .pth file."""
    import sysconfig

    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    site = Path(run_python("import sysconfig; print(sysconfig.get_path('purelib'))", python=python, path=None).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _pip("--python", python, "install", *PIP, "--editable", source, cwd=tmp_path)
    package, methods = run_python(USE, cwd=tmp_path, path=None, python=python).split()
    assert Path(package) == (source / "arm_hf").resolve()
    assert Path(methods) == (source / "modeling").resolve()
    (source / "modeling" / "appears_later.py").write_text("VALUE = 1\n", encoding="utf-8")
    try:
        code = "from arm_hf.modeling.appears_later import VALUE; print(VALUE)"
        assert run_python(code, cwd=tmp_path, path=None, python=python).strip() == "1"
    finally:
        (source / "modeling" / "appears_later.py").unlink()


def test_checkout_works_without_install(root: Path, tmp_path: Path, run_python: Callable[..., str]) -> None:
    package, methods = run_python(USE, cwd=tmp_path, path=root).split()
    assert Path(package) == root / "arm_hf"
    assert Path(methods) == root / "modeling"
