"""Table of the worst differences from the authors' numbers: python -m tests.goldens.report [SHARED_FOLDER].

Without the folder the committed last-block numbers are compared; with it the whole image tower.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import CLIPModel

from tests.goldens.parity import CORE, Difference, compare_last_block, compare_whole_tower, last_block_clip


def table(differences: Iterable[Difference]) -> str:
    """Markdown: one row per variant, the worst over all inputs, each beside what is allowed."""
    rows: dict[str, dict[str, Difference]] = {}
    for difference in differences:
        kinds = rows.setdefault(difference.variant, {})
        if difference.kind not in kinds or difference.error > kinds[difference.kind].error:
            kinds[difference.kind] = difference
    lines = ["| variant | worst differences (allowed) |", "|---|---|"]
    for variant, kinds in rows.items():
        cells = (f"{kind} {found.error:.1e} ({found.tolerance:.0e})" for kind, found in kinds.items())
        lines.append(f"| {variant} | {', '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    with np.load(CORE) as core:
        print("Last block alone, committed numbers\n\n" + table(compare_last_block(last_block_clip(core), core)))
    if len(sys.argv) > 1:
        goldens = Path(sys.argv[1]) / "goldens"
        clip = CLIPModel.from_pretrained(goldens / "tiny_clip_hf").eval()
        found: list[Difference] = []
        for where in ("sq64", "sq96"):
            with np.load(goldens / f"self_attention/dense_{where}.npz") as golden:
                found += compare_whole_tower(clip, golden, where)
        print("\nWhole image tower\n\n" + table(found))


if __name__ == "__main__":
    main()
