"""Writes the card of a model from its measured results, so that no figure in a card is typed by hand.

    python -m arm_hf.hub_cards.build_card

reads `results/arm-clip-mini.json` (written by `training/pretrain_mini.py --results`) and the embedded model's own
config, fills `templates/arm-clip-mini.md.j2`, and writes the README.md of the embedded model.
"""

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

SETS = {
    "voc20": "Pascal VOC, 20 classes (balanced list)",
    "voc21": "Pascal VOC, with background",
    "voc21_balanced": "Pascal VOC, with background (balanced list)",
    "coco_object": "COCO-Object, with background",
    "coco_stuff171": "COCO-Stuff 171",
    "msrc21": "MSRC-21",
    "camvid": "CamVid",
    "ade150": "ADE20K-150",
}


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON file, or FileNotFoundError with what makes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {made_by} writes it")
    return json.loads(path.read_text(encoding="utf-8"))


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a set: its name in words, and the measurements with and without ARM."""
    return [{"key": key, "title": SETS.get(key, key), **variants} for key, variants in results["sets"].items()]


def card(model: Path, results: Path, template: Path) -> str:
    """The text of a card.

    Args:
        model: Folder of the model: config.json and weights.
        results: JSON of measurements.
        template: Jinja2 template; it sees `config`, `results`, `rows`, `size_mb`; a name it lacks is an error.

    Raises:
        FileNotFoundError: The model or its results are not there.
        ImportError: jinja2 is not installed.
    """
    import jinja2

    config = read_json(model / "config.json", "training/pretrain_mini.py --out")
    measured = read_json(results, "training/pretrain_mini.py --results")
    size = sum(path.stat().st_size for path in model.iterdir() if path.is_file() and path.name != "README.md")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.from_string(template.read_text(encoding="utf-8"))
    return text.render(config=config, results=measured, rows=rows(measured), size_mb=size / 1e6)


def main() -> None:
    """Writes the card of the embedded model."""
    from arm_hf import DEFAULT_MODEL, resolve_model

    parser = argparse.ArgumentParser(prog="python -m arm_hf.hub_cards.build_card", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of the model (default: the embedded one)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / f"{DEFAULT_MODEL}.json")
    parser.add_argument("--template", type=Path, default=HERE / "templates" / f"{DEFAULT_MODEL}.md.j2")
    arguments = parser.parse_args()
    model = arguments.model or Path(resolve_model(DEFAULT_MODEL))
    path = model / "README.md"
    path.write_text(card(model, arguments.results, arguments.template), encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
