"""The checkout itself: its layout, its Makefile, and words that do not belong in it."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "arm_hf",
    "hub_cards",
    "modeling",
    "pyproject.toml",
    "setup.py",
    "tests",
    "training",
}

# Machine paths, package indexes, unfinished work. Files that look for such words themselves are left out of the search.
SEARCHERS = (
    "hub_cards/lint.py",
    "tests/hub/test_publishing.py",
    "tests/hub_cards/test_lint.py",
    "tests/packaging/test_repository.py",
)
UNWANTED = {
    "a machine's path": r"(?<![\w.])/(?:root|work|home|Users|mnt|opt)/\w",
    "a package index": r"index-url|pythonhosted|find-links|/simple\b",
    "unfinished work": r"\b(?:TODO|FIXME|XXX)\b",
    "a swallowed error": r"except Exception:\s*\n\s*pass\b",
}


@pytest.fixture(scope="module")
def tracked(root: Path) -> list[Path]:
    """Files that git knows, or that it would know after `git add`."""
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [root / name for name in names if (root / name).is_file()]


def test_top_level_is_exactly_the_house(root: Path, tracked: list[Path]) -> None:
    assert {path.relative_to(root).parts[0] for path in tracked} == TOP_LEVEL


def test_no_unwanted_words(root: Path, tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        if path.relative_to(root).as_posix() in SEARCHERS or path.suffix in {
            ".png",
            ".jpg",
            ".npz",
            ".safetensors",
            ".json",
        }:
            continue
        text = path.read_text(encoding="utf-8")
        found += [
            f"{path.relative_to(root)}: {what}: {match.group()!r}"
            for what, pattern in UNWANTED.items()
            for match in re.finditer(pattern, text)
        ]
    assert not found


def test_modeling_files_can_travel(root: Path) -> None:
    """Flat, single-dot imports with names: what transformers copies into a hub repository."""
    files = sorted((root / "modeling").glob("*.py"))
    assert files
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                if node.level > 1 or (node.level == 1 and (not node.module or "." in node.module)):
                    wrong.append(f"{path.name}:{node.lineno}: relative imports are `from .file import name`")
                if node.level == 1 and node.module and not (path.parent / f"{node.module}.py").is_file():
                    wrong.append(f"{path.name}:{node.lineno}: no file {node.module}.py")
                names = [node.module or ""] if node.level == 0 else []
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            ours = {"arm_hf", "modeling", "training", "hub_cards"}
            wrong += [f"{path.name}:{node.lineno}: absolute import of {n}" for n in names if n.split(".")[0] in ours]
    assert not wrong
    others = [p.name for p in (root / "modeling").iterdir() if p.suffix != ".py" and p.name != "__pycache__"]
    assert not others, f"only .py files travel: {others}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("command", [["make"], ["make", "help"]])
def test_make_prints_every_target(root: Path, command: list[str]) -> None:
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"make ([a-z-]+) ", printed))
    text = (root / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE).group(1).split())  # type: ignore[union-attr]
    assert listed == phony - {"types"}
    assert {"demo", "install", "test", "test-slow", "check", "style", "bench", "wheel", "card", "clean"} <= listed


def test_version_is_kept_in_one_place(root: Path) -> None:
    import arm_hf

    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {arm_hf.__version__}\n" in citation
