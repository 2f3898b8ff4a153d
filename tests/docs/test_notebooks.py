"""The notebooks run from top to bottom, are stored without outputs, and are short."""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [ROOT / "arm_hf" / "guides" / "quick_start.ipynb", ROOT / "training" / "own_folder.ipynb"]
MOST_CELLS = 24

every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_of(notebook: Path) -> Iterator[str]:
    for cell in cells_of(notebook):
        if cell["cell_type"] == "code":
            yield "".join(cell["source"])


def test_all_are_here() -> None:
    rooms = [
        path for room in ("arm_hf", "modeling", "training", "hub_cards") for path in (ROOT / room).rglob("*.ipynb")
    ]
    assert sorted(rooms) == sorted(NOTEBOOKS)


@every_notebook
def test_stored_without_outputs_and_short(notebook: Path) -> None:
    cells = cells_of(notebook)
    assert cells[0]["cell_type"] == "markdown" and len(cells) <= MOST_CELLS
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@every_notebook
def test_links_lead_somewhere(notebook: Path) -> None:
    texts = ["".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "markdown"]
    targets = re.findall(r"\]\(([^)#\s]+)\)", "\n".join(texts))
    assert targets and all((notebook.parent / target).exists() for target in targets)


@pytest.mark.parametrize(
    "notebook",
    # The second one trains, as training/README.md does in the default tests.
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == "own_folder" else [])
        for path in NOTEBOOKS
    ],
)
def test_cells_run_on_a_tiny_model(notebook: Path, desk: Path) -> None:
    """Cell after cell in this process; the last line of a cell is what a notebook would show."""
    namespace: dict = {"__name__": "notebook"}
    shown = []
    for number, code in enumerate(code_of(notebook)):
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}, code cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"{notebook.name}, code cell {number}", "eval"), namespace)
            shown.append(type(value).__name__)
    assert shown.count("Image") >= 2, "a notebook shows pictures"


@pytest.mark.slow
@every_notebook
def test_runs_in_a_kernel_on_the_embedded_model(notebook: Path, tmp_path: Path, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    nbclient.NotebookClient(content, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    nbformat.write(content, tmp_path / notebook.name)
