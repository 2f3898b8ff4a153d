"""The README's quick start as a new user runs it: the wheel in an empty environment, outside the checkout, offline.

    python tests/packaging/quick_start.py [--wheel FILE] [--venv DIR]

Makes the wheel, installs it with all that it needs into a fresh virtual environment (some minutes, several GB), and
runs the README's first `arm-hf segment` and its Python example on a sample photo there. Ends with 1 and a line that
says what is wrong. `make quickstart` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MODEL = "arm-clip-mini"


class Failed(Exception):
    """The quick start does not do what the README says."""


def readme_command(readme: str) -> list[str]:
    """The first `arm-hf segment` of the README's shell blocks.

    Raises:
        Failed: There is none.
    """
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:2] == ["arm-hf", "segment"]:
                return words
    raise Failed("the README shows no `arm-hf segment`")


def readme_example(readme: str) -> str:
    """The first Python block of the README that uses the embedded model.

    Raises:
        Failed: There is none.
    """
    for block in re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL):
        if MODEL in block:
            return block
    raise Failed(f"the README shows no Python example with {MODEL}")


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None, seconds: float = 1800) -> str:
    """Run a command and return what it printed.

    Raises:
        Failed: It ends with another code than 0, or takes too long.
    """
    shown = shlex.join(map(str, command))
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{shown} took more than {seconds:.0f} s") from error
    if done.returncode != 0:
        raise Failed(f"{shown} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def clean_environment(home: Path) -> dict[str, str]:
    """What a new user has: no setting of Python, no model in the cache, and here no network either."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS"))}
    return {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def copy_source(target: Path) -> Path:
    """The files that make the package, copied: what an earlier build left in the checkout stays out of the wheel."""
    for name in ("arm_hf", "modeling", "training", "hub_cards"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target / name)
    return target


def install(wheel: Path, venv: Path, cwd: Path) -> Path:
    """Make an empty environment, put the wheel into it, and return the folder of its commands."""
    run(sys.executable, "-m", "venv", venv, cwd=cwd)
    commands = venv / ("Scripts" if os.name == "nt" else "bin")
    pip = (commands / "python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--no-compile", wheel, cwd=cwd)
    run(*pip, "check", cwd=cwd)
    return commands


def check_package(python: Path, venv: Path, folder: Path, env: Mapping[str, str]) -> None:
    """Make sure that the package in use is the installed one."""
    code = "import arm_hf, arm_hf.modeling.method as m; print(arm_hf.__file__); print(m.__file__)"
    for place in run(python, "-c", code, cwd=folder, env=env).split("\n")[:2]:
        if not Path(place).resolve().is_relative_to(venv.resolve()):
            raise Failed(f"the package in use is not the installed one: {place}")


def check_command(commands: Path, words: list[str], folder: Path, env: Mapping[str, str]) -> list[str]:
    """Run the README's command on `photo.jpg` and return the classes that it found."""
    if "photo.jpg" not in words or "--out" not in words:
        raise Failed(f"the README's command names no photo.jpg, or no --out: {shlex.join(words)}")
    print(run(commands / words[0], *words[1:], cwd=folder, env=env), end="")
    out = folder / words[words.index("--out") + 1]
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    missing = {"photo.png", "photo.json", "photo_overlay.png"} - found
    if missing:
        raise Failed(f"the command wrote no {', '.join(sorted(missing))} into {out.name}/")
    legend = json.loads((out / "photo.json").read_text(encoding="utf-8"))
    with Image.open(folder / "photo.jpg") as photo, Image.open(out / "photo.png") as labels:
        if labels.size != photo.size:
            raise Failed(f"the label map is {labels.size}, the photo {photo.size}")
        values = {value for _, value in labels.getcolors(65536) or ()}
    if {segment["id"] for segment in legend["segments"]} != values:
        raise Failed(f"legend and label map differ: {legend['segments']}, {sorted(map(str, values))}")
    if len(values) < 2:
        raise Failed("the command found fewer than two classes in the sample photo")
    return [segment["label"] for segment in legend["segments"]]


def main() -> None:
    """Runs all of it, and says what was done and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="this wheel instead of a new one")
    parser.add_argument("--venv", type=Path, help="make the environment here and keep it; it must not exist")
    arguments = parser.parse_args()
    if arguments.venv is not None and arguments.venv.exists():
        sys.exit(f"{arguments.venv} is there already")

    sys.path.insert(0, str(ROOT))
    from arm_hf.sample_photos import drawn_scene, from_sklearn

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="arm-hf-quick-start-") as temporary:
        place = Path(temporary)
        folder, venv = place / "empty", (arguments.venv or place / "venv").absolute()
        folder.mkdir()
        env = clean_environment(place / "home")
        try:
            wheel = arguments.wheel
            if wheel is None:
                pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
                run(*pip, "wheel", "--no-deps", "--wheel-dir", place / "dist", copy_source(place / "source"), cwd=place)
                (wheel,) = (place / "dist").glob("arm_hf-*.whl")
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB; installing it into an empty environment ...")
            commands = install(wheel.absolute(), venv, folder)
            installed = time.monotonic()
            print(f"installed in {installed - started:.0f} s", flush=True)
            check_package(commands / "python", venv, folder, env)
            try:
                photo = from_sklearn("china.jpg")()
            except (ImportError, OSError):
                photo = drawn_scene()
            photo.save(folder / "photo.jpg", quality=92)
            words = readme_command(readme)
            print("$", shlex.join(words), flush=True)
            labels = check_command(commands, words, folder, env)
            print("the README's Python example:", flush=True)
            printed = run(commands / "python", "-c", readme_example(readme), cwd=folder, env=env)
            print(printed, end="")
            if not printed.strip():
                raise Failed("the README's Python example printed nothing")
        except Failed as error:
            sys.exit(f"quick start failed: {error}")
        print(f"quick start: found {', '.join(labels)}; {time.monotonic() - installed:.0f} s after the installation")


if __name__ == "__main__":
    main()
