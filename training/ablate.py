"""Measure what ARM adds to training-free methods, and what each of its parts adds: Tables 2, 4, 5, 6 and Fig. 3.

    python training/ablate.py --clip CLIP --data DIR --work-dir runs/evidence --experiments hosts --seeds 0 1

Every variant is trained once per seed with `training/train.py`'s `train` on cached features, attached to the hosts, and
evaluated by `arm-hf evaluate`'s code on the val lists below DIR (folders with `images/ labels/ classes.json`). Seeds
differ in the weights ARM starts from and in the order of the views; the views themselves are the same. Finished
trainings and evaluations are found again in the work folder, so that a broken-off run goes on. The tables end up in
`evidence.json` and `evidence.md` there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if importlib.util.find_spec("arm_hf") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arm_hf.commands.common import quiet_libraries
from arm_hf.folders import atomic_path
from arm_hf.training.ablation_runs import Bench, TestSet, Training, evaluate_set, train_all, training_speed
from arm_hf.training.ablation_tables import markdown
from arm_hf.training.options import TrainingOptions, find_config, parse_options

HOSTS = ("clearclip", "sclip", "naclip", "resclip", "cliper", "gem")

SETS = (
    TestSet("coco_stuff171", "coco_stuff171", "coco_stuff171"),
    TestSet("coco_object", "coco_object", "coco_object"),
    TestSet("voc20", "voc2012", "voc20", "val_balanced"),
    TestSet("voc21", "voc2012", "voc21"),
    TestSet("camvid", "camvid", "plain", unseen=True),
    TestSet("msrc", "msrc", "plain", unseen=True),
    TestSet("ade150", "ade20k150", "ade150", unseen=True),
)
TRAINING_SETS = {"coco_stuff171": "coco_stuff171", "voc2012": "voc21"}  # folder -> label set
LAYER_PAIRS = ((1, 3), (1, 5), (1, 7), (3, 5), (3, 7), (5, 7))


@dataclass(frozen=True)
class Variant:
    """A way to train ARM.

    Attributes:
        name: In the tables.
        options: Fields of `TrainingOptions` that differ from the recipe.
        hosts: Methods it is attached to.
        sets: Names of the sets it is evaluated on.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("clearclip",)
    sets: tuple[str, ...] = ("voc20", "msrc", "camvid")


def _layers(*layers: int) -> Variant:
    return Variant(f"layers {layers[0]} and {layers[1]}", {"fusion_layers": list(layers)})


def _blocks(self_attention: int, cross_attention: int) -> Variant:
    numbers = {"num_self_attention_layers": self_attention, "num_cross_attention_layers": cross_attention}
    return Variant(f"{self_attention} self, {cross_attention} cross", numbers)


_NO_ATTENTION = {"num_self_attention_layers": 0, "num_cross_attention_layers": 0}
EXPERIMENTS: dict[str, tuple[Variant, ...]] = {
    # Table 2: one ARM, every host, every set
    "hosts": (Variant("recipe", hosts=HOSTS, sets=tuple(each.name for each in SETS)),),
    # The same without upsampling: with few photos M_r is better left on the grid of the patches
    "hosts_coarse": (
        Variant("without scale blocks", {"num_scale_blocks": 0}, HOSTS, ("voc20", "voc21", "camvid", "msrc", "ade150")),
    ),
    # Table 4
    "layers": tuple(_layers(*pair) for pair in LAYER_PAIRS),
    # Table 5
    "blocks": tuple(_blocks(*pair) for pair in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (2, 2))),
    # Table 6
    "scale": (
        Variant("neither", {**_NO_ATTENTION, "num_scale_blocks": 0}),
        Variant("scale blocks", _NO_ATTENTION),
        Variant("attention", {"num_scale_blocks": 0}),
        Variant("both"),
    ),
    "loss": (
        Variant("BCE on probabilities + M_r (paper)", {"loss": "bce", "coarse_form": "probabilities"}),
        Variant("BCE on scaled cosines + M_r", {"loss": "bce", "coarse_form": "logits"}),
        Variant("cross-entropy on scaled cosines + M_r", {"loss": "cross_entropy", "coarse_form": "logits"}),
    ),
    # Fig. 3
    "training_base": (
        Variant("on CLIP's own features", {"method": "clip"}, ("clip", "clearclip", "cliper")),
        Variant("on ClearCLIP's features", {"method": "clearclip"}, ("clip", "clearclip", "cliper")),
    ),
}


def run_experiments(
    names: Sequence[str], seeds: Sequence[int], bench: Bench, checkpoint: str | None = None
) -> list[dict[str, Any]]:
    """Train and evaluate all variants of the experiments; one record per experiment, variant, seed, set and host.

    Args:
        names: Of the experiments.
        seeds: Each variant is trained once with each.
        bench: Where and how.
        checkpoint: A model with the same CLIP that is evaluated in place of trainings.
    """

    def training(variant: Variant, seed: int) -> Training:
        return Training(variant.options, seed, checkpoint)

    variants = [(name, variant) for name in names for variant in EXPERIMENTS[name]]
    train_all(bench, [training(variant, seed) for _, variant in variants for seed in seeds])
    wanted: dict[TestSet, dict[tuple[str, str], tuple[str, Training | None]]] = {}
    present = {each.name: each for each in SETS if (bench.data / each.folder).is_dir()}
    for _, variant in variants:
        for chosen in (present[name] for name in variant.sets if name in present):
            pairs = wanted.setdefault(chosen, {})
            for chosen_arm in (None, *(training(variant, seed) for seed in seeds)):
                pairs.update({(host, bench.row(host, chosen_arm)): (host, chosen_arm) for host in variant.hosts})
    figures = dict(
        zip(
            wanted,
            bench.for_each(evaluate_set, [(s, list(pairs.values())) for s, pairs in wanted.items()]),
            strict=True,
        )
    )
    return [
        {
            "experiment": name,
            "variant": variant.name,
            "seed": seed,
            "set": chosen.name,
            "unseen": chosen.unseen,
            "host": host,
            "alone": _rounded(rows[bench.row(host, None)]),
            "with_arm": _rounded(rows[bench.row(host, training(variant, seed))]),
        }
        for name, variant in variants
        for seed in seeds
        for chosen, rows in figures.items()
        if chosen.name in variant.sets
        for host in variant.hosts
    ]


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def write_results(
    records: Sequence[Mapping[str, Any]],
    bench: Bench,
    speeds: Mapping[str, float] | None = None,
    checkpoint: str | None = None,
) -> Path:
    """Write `evidence.json` and `evidence.md`; return the latter.

    Args:
        records: Of all experiments.
        bench: Where and how.
        speeds: Of the training, from `training_speed`.
        checkpoint: What was evaluated in place of trainings.
    """
    recipe = {key: value for key, value in bench.recipe.of_the_run().items() if key not in ("clip", "data")}
    about = {
        "base": Path(bench.recipe.clip).name,
        "photos_per_set": bench.limit,
        "weight": bench.weight,
        "arm": checkpoint and Path(checkpoint).name,
        "recipe": recipe,
        "images_per_second": dict(speeds or {}),
    }
    lines = ",\n  ".join(json.dumps(record) for record in records)  # one a line, so that a change can be read
    record_file = f'{json.dumps(about, indent=1)[:-2]},\n "records": [\n  {lines}\n ]\n}}'
    for name, text in (("evidence.json", record_file), ("evidence.md", markdown({**about, "records": records}))):
        with atomic_path(bench.work / name) as path:
            path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return bench.work / "evidence.md"


def make_bench(args: argparse.Namespace) -> Bench:
    """The recipe on the base and the sets that the command line names.

    Args:
        args: Of `main`.

    Raises:
        ValueError: The recipe cannot be read.
    """
    recipe: TrainingOptions = parse_options(["--config", str(find_config(args.config))])
    recipe = replace(
        recipe,
        clip=args.clip,
        data=[str(args.data / folder) for folder in TRAINING_SETS],
        class_names=list(TRAINING_SETS.values()),
        val_data=[],
        val_class_names=[],
        view_seed=0,
        cache_features=True,
        cache_layers=sorted({layer for pair in LAYER_PAIRS for layer in pair}),
        cache_dir=str(args.work_dir / "cache"),
        max_steps=args.max_steps or recipe.max_steps,
    )
    return Bench(recipe, args.data, args.work_dir, args.limit, args.processes, args.weight)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", required=True, help="base model: folder, hub id, or an ARM checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--work-dir", type=Path, required=True, help="trainings, evaluations and tables")
    parser.add_argument("--experiments", nargs="+", choices=sorted(EXPERIMENTS), default=["hosts"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--arm", help="evaluate this trained model in place of trainings; only with --experiments hosts"
    )
    parser.add_argument("--config", default="arm-clip-mini", help="recipe: YAML file, or one of training/configs")
    parser.add_argument("--max-steps", type=int, help="steps of each training (default: the recipe's)")
    parser.add_argument("--limit", type=int, help="evaluate on the first so many photos of each list")
    parser.add_argument("--weight", type=float, default=1.0, help="factor on M_r in the evaluation")
    parser.add_argument("--processes", type=int, default=1, help="trainings, or sets, worked on at a time")
    parser.add_argument("--speed", action="store_true", help="measure images/s of the training too")
    args = parser.parse_args(arguments)
    quiet_libraries()
    if args.arm is not None:
        if args.experiments != ["hosts"]:
            parser.error("--arm is one model and goes with --experiments hosts alone")
        args.seeds = [0]
    bench = make_bench(args)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    records = run_experiments(args.experiments, args.seeds, bench, args.arm)
    speeds = training_speed(bench) if args.speed else None
    print(write_results(records, bench, speeds, args.arm).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
