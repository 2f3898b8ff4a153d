"""Docstrings: everything public has one, it names the arguments, and its examples run.

Functions with a single argument may leave it to the summary, unless they are among the public names of `arm_hf`. The
commands (`arm_hf/commands`) describe their options by help texts. The making of the embedded model (`training/mini`)
is a recipe, no interface.
"""

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import arm_hf

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("arm_hf", "modeling", "training", "hub_cards")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.parent.name != "commands")

# What every method is given; `MethodContext` and the method's settings class say what is in them.
GIVEN_TO_METHODS = {"context", "settings"}
# Entry points whose docstring shows how they are used.
WITH_EXAMPLE = (
    "ARMConfig",
    "ARMModel",
    "Background",
    "DenseCLIP",
    "OpenVocabSegmentationPipeline",
    "ProxyFeatures",
    "correct_labels",
    "get_method",
    "list_methods",
    "load_label_set",
    "parse_labels",
    "regions_from_masks",
    "register_method",
    "resolve_model",
)


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    names = [argument.arg for argument in all_of_them if argument is not None]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Name, definition, and whether its class has a base that may document it."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member, bool(node.bases)


def missing_arguments(text: str, names: list[str]) -> list[str]:
    described = text.partition("Args:")[2]
    return [name for name in names if not re.search(rf"\b{name}\b", described)]


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
DOCUMENTED = {
    name.rpartition(".")[2]
    for tree in TREES.values()
    for name, function, _ in public_functions(tree)
    if ast.get_docstring(function)
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_everything_public_is_described(path: Path) -> None:
    tree, wrong = TREES[path], []
    if tree.body and not ast.get_docstring(tree):
        wrong.append("the module has no docstring")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            wrong.append(f"{node.name} has no docstring")
    for name, function, may_inherit in public_functions(tree):
        text = ast.get_docstring(function)
        if text is None:
            if not (may_inherit and function.name in DOCUMENTED):
                wrong.append(f"{name} has no docstring")
            continue
        names = [each for each in arguments_of(function) if each not in GIVEN_TO_METHODS]
        if len(names) > 1 and path.parent.name != "mini" and (missing := missing_arguments(text, names)):
            wrong.append(f"{name} does not describe {', '.join(missing)} in its Args")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", arm_hf.__all__)
def test_public_names_are_described_in_full(name: str) -> None:
    public: Any = getattr(arm_hf, name)
    if not (inspect.isclass(public) or inspect.isfunction(public)):
        return  # a constant
    text = inspect.getdoc(public) or ""
    assert text
    if dataclasses.is_dataclass(public):
        fields = [field.name for field in dataclasses.fields(public) if "help" not in field.metadata]
        own = [field for field in fields if field in vars(public).get("__annotations__", {})]
        described = re.split(r"(?:Args|Attributes):", text, maxsplit=1)[-1]
        unsaid = {"initializer_range"}  # of transformers' configs
        assert [field for field in own if not re.search(rf"\b{field}\b", described)] in ([], [*unsaid]), name
    elif inspect.isfunction(public):
        names = [each for each in inspect.signature(public).parameters if not each.startswith("_")]
        assert not missing_arguments(text, names), name


def module_of(path: Path) -> ModuleType:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return importlib.import_module(".".join(parts if parts[0] == "arm_hf" else ("arm_hf", *parts)))


WITH_EXAMPLES = [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_run(path: Path, desk: Path) -> None:
    module, failed = module_of(path), []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__.removeprefix("arm_hf."))
    for example in found:
        if example.examples:
            runner.run(example, out=failed.append)
    assert not runner.failures, "\n".join(failed)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_entry_points_show_how_they_are_used(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(arm_hf, name)) or "")
