"""Fills the tables of the front page from the registry and from measured results, so that nobody types them.

    python -m arm_hf.hub_cards.readme_tables

replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in README.md.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arm_hf.hub_cards.build_card import HERE, read_json, rows


def methods_table() -> str:
    """Every registered method with what it computes and its paper, as a Markdown table."""
    from arm_hf.modeling.dense_clip import BUILT_IN_METHODS, get_method

    lines = ["| method | what it computes | paper |", "|---|---|---|"]
    for name in BUILT_IN_METHODS:
        method = get_method(name)
        lines.append(f"| `{name}` | {method.summary} | {method.paper} |")
    return "\n".join(lines)


def results_table(results: Mapping[str, Any]) -> str:
    """mIoU in percent of the embedded model on validation photos, with and without ARM, as a Markdown table."""
    lines = ["| validation photos of | photos | classes present | mIoU | mIoU with ARM |", "|---|---|---|---|---|"]
    for row in rows(dict(results)):
        figures = " | ".join("-" if value is None else f"{value:.1f}" for value in (row.alone, row.with_arm))
        lines.append(f"| {row.title} | {row.images} | {row.classes_present} | {figures} |")
    return "\n".join(lines)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between their markers.

    Args:
        text: The page.
        tables: Markdown by the name of the markers.

    Raises:
        ValueError: A marker pair is missing.
    """
    for name, table in tables.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, flags=re.DOTALL)
        if found is None:
            raise ValueError(f"the text has no <!-- {name} --> ... <!-- /{name} --> to fill")
        text = f"{text[: found.start(1)]}{table}\n{text[found.end(1) :]}"
    return text


def main() -> None:
    """Writes the tables of README.md."""
    parser = argparse.ArgumentParser(
        prog="python -m arm_hf.hub_cards.readme_tables", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "arm-clip-mini.json")
    arguments = parser.parse_args()
    measured = read_json(arguments.results, "training/pretrain_mini.py --results")
    text = arguments.readme.read_text(encoding="utf-8")
    filled = fill(text, {"methods": methods_table(), "results": results_table(measured)})
    arguments.readme.write_text(filled, encoding="utf-8")
    print(f"Written: {arguments.readme}")


if __name__ == "__main__":
    main()
