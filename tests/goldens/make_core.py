"""Rebuild `last_block.npz` from the folder of reference numbers: python -m tests.goldens.make_core SHARED_FOLDER.

Weights are stored as float16; the script stops if a weight cannot be represented exactly.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.goldens.parity import CORE, VARIANTS

LAST_BLOCK = "vision_model.encoder.layers.11."
OTHER_WEIGHTS = (
    "vision_model.post_layernorm.weight",
    "vision_model.post_layernorm.bias",
    "visual_projection.weight",
    "vision_model.embeddings.position_embedding.weight",
)


def exact_half(name: str, values: np.ndarray) -> np.ndarray:
    """The values as float16; ValueError if that changes one of them."""
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(values.dtype), values):
        raise ValueError(f"{name} is not representable in float16")
    return half


def build(shared: Path) -> dict[str, np.ndarray]:
    """Collect the arrays."""
    weights = load_file(shared / "goldens/tiny_clip_hf/model.safetensors")
    folder = shared / "goldens/self_attention"
    core = np.load(folder / "core.npz")
    arrays = {"text_features": core["text_features"], "ns80x128/pos_embed": core["ns80x128/pos_embed"]}
    for key, values in weights.items():
        if key.startswith(LAST_BLOCK) or key in OTHER_WEIGHTS:
            arrays["weights/" + key.replace(LAST_BLOCK, "vision_model.encoder.layers.0.")] = exact_half(key, values)
    for where in ("sq64", "sq96"):
        golden = np.load(folder / f"dense_{where}.npz")
        arrays[f"{where}/penultimate"] = golden["penultimate"]
        for variant in VARIANTS:
            for kind in ("feat", "cos"):
                arrays[f"{where}/{variant}.{kind}"] = golden[f"{variant}.{kind}"]
    arrays["sq64/pos_embed"] = exact_half("sq64/pos_embed", np.load(folder / "dense_sq64.npz")["pos_embed"])
    return arrays


def main() -> None:
    """Write the file and say how large it is."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__.splitlines()[0])
    np.savez_compressed(CORE, **build(Path(sys.argv[1])))
    print(f"{CORE}: {CORE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
