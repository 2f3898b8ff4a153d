"""Rebuild `resclip.npz` from the folder of reference numbers: python -m tests.goldens.make_resclip SHARED_FOLDER.

It holds what ResCLIP's last block needs beside `last_block.npz` (pixels, mean attention of the middle layers), the
authors' results from there, and their label matrices on synthetic grids.
"""

import sys
from pathlib import Path

import numpy as np

RESCLIP = Path(__file__).parent / "resclip.npz"
VARIANTS = tuple(
    f"resclip.{base}.{preset}.{parts}"
    for base in ("naclip", "clearclip", "sclip")
    for preset in ("voc20", "voc21")
    for parts in ("rcs", "sfr", "rcs_sfr")
)
GRIDS = ("5x8", "7x11")


def build(shared: Path) -> dict[str, np.ndarray]:
    """Collect the arrays."""
    folder = shared / "goldens/self_attention"
    golden, units = np.load(folder / "dense_sq64.npz"), np.load(folder / "units.npz")
    arrays = {"pixel_values": golden["pixel_values"], "rcs.attn": golden["rcs.attn"]}
    for variant in VARIANTS:
        kinds = ("cos",) if variant.endswith(".rcs") else ("cos", "cos_fp32sfr", "labels")
        for kind in kinds:
            array = golden[f"{variant}.{kind}"]
            arrays[f"{variant}.{kind}"] = array.astype(np.int8) if kind == "labels" else array
    for grid in GRIDS:
        arrays[f"sfr.{grid}.std5"] = units[f"sfr.{grid}.std5"]
        for kind in ("labels", "path_ok"):
            arrays[f"sfr.{grid}.{kind}"] = units[f"sfr.{grid}.{kind}"].astype(np.int8)
    return arrays


def main() -> None:
    """Write the file and say how large it is."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__.splitlines()[0])
    np.savez_compressed(RESCLIP, **build(Path(sys.argv[1])))
    print(f"{RESCLIP}: {RESCLIP.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
