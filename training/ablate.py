"""Measure what ARM adds to training-free methods, and what each of its parts adds: Tables 2, 4, 5, 6 and Fig. 3.

    python training/ablate.py --clip CLIP --data DIR --work-dir runs/evidence --experiments hosts --seeds 0 1

Every variant is trained once per seed with `training/train.py`'s `train` on cached features, attached to the hosts, and
evaluated by `arm-hf evaluate`'s code on the val lists below DIR (folders with `images/ labels/ classes.json`). Finished
trainings and evaluations are found again in the work folder, so that a broken-off run goes on. The tables end up in
`evidence.json` and `evidence.md` there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if importlib.util.find_spec("arm_hf") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arm_hf.commands.common import quiet_libraries
from arm_hf.folders import atomic_path
from arm_hf.training.options import TrainingOptions, find_config, parse_options

HOSTS = ("clearclip", "sclip", "naclip", "resclip", "cliper", "gem")
HOST_OPTIONS = {"resclip": {"pamr_iterations": 0}}  # as in its paper; its code's PAMR over all classes takes most time
ALONE = "alone"


@dataclass(frozen=True)
class TestSet:
    """A list of labelled photos and the protocol they are read with.

    Attributes:
        name: In the tables.
        folder: Below the data folder.
        protocol: Of `arm-hf protocols`, or "plain".
        split: List of names.
        unseen: Whether neither ARM nor a base trained from tags has seen a label map of it.
    """

    name: str
    folder: str
    protocol: str
    split: str = "val"
    unseen: bool = False


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
    hosts: tuple[str, ...] = ("cliper",)
    sets: tuple[str, ...] = ("coco_stuff171", "voc20", "msrc", "camvid")


def _layers(*layers: int) -> Variant:
    return Variant(f"layers {layers[0]} and {layers[1]}", {"fusion_layers": list(layers)})


def _blocks(self_attention: int, cross_attention: int) -> Variant:
    numbers = {"num_self_attention_layers": self_attention, "num_cross_attention_layers": cross_attention}
    return Variant(f"{self_attention} self, {cross_attention} cross", numbers)


_NO_ATTENTION = {"num_self_attention_layers": 0, "num_cross_attention_layers": 0}
EXPERIMENTS: dict[str, tuple[Variant, ...]] = {
    # Table 2: one ARM, every host, every set
    "hosts": (Variant("recipe", hosts=HOSTS, sets=tuple(each.name for each in SETS)),),
    # Table 4
    "layers": tuple(_layers(*pair) for pair in ((1, 3), (1, 5), (1, 7), (3, 5), (3, 7), (5, 7))),
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


def train_variant(variant: Variant, seed: int, recipe: TrainingOptions, folder: Path) -> Path:
    """Train, go on with, or find a variant; return the folder of its last checkpoint.

    Args:
        variant: What differs from the recipe.
        seed: Of the training.
        recipe: The common options.
        folder: Of this run.
    """
    from arm_hf.training.train import train

    options = replace(recipe, **variant.options, seed=seed, output_dir=str(folder), resume=True, overwrite=False)
    if not (folder / "finished").exists():
        train(options)
        (folder / "finished").touch()
    return folder / "last"


def evaluate_model(
    model: Path | str,
    hosts: Sequence[str],
    sets: Sequence[TestSet],
    data: Path,
    arm: str,
    folder: Path,
    limit: int | None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures in percent by set and host: mean_iou, boundary_iou, overall_accuracy and seconds an image.

    Args:
        model: Folder or name.
        hosts: Methods that ARM refines.
        sets: What is measured on.
        data: Where the sets lie.
        arm: "off", "on" or "both".
        folder: Where the results are kept, a file for each set.
        limit: Take only the first so many images of a set.
    """
    from tqdm import tqdm

    from arm_hf.data import open_data
    from arm_hf.evaluating import evaluate_data
    from arm_hf.evaluation_plan import EvaluationOptions, make_plan
    from arm_hf.partial_results import remove_partial
    from arm_hf.result_tables import build_results
    from arm_hf.segmenting import load_pipeline

    pipe, found = None, {}
    for chosen in sets:
        result = folder / f"{chosen.name}.json"
        if not result.exists():
            pipe = pipe or load_pipeline(str(model))
            source = open_data(data / chosen.folder, chosen.split)
            options = EvaluationOptions(
                protocol=chosen.protocol,
                arm=arm,
                common_input=True,
                limit=limit,
                size=336,
                method_options={host: given for host, given in HOST_OPTIONS.items() if host in hosts},
            )
            plan = make_plan(pipe, source, hosts, options)
            out = folder / chosen.name

            def bar(images: Any, total: int | None, before: int, name: str = chosen.name) -> Any:
                return tqdm(images, desc=f"{folder.name} {name}", total=total, unit="image", mininterval=10)

            evaluation = evaluate_data(pipe, source, plan, options, out, str(model), progress=bar)
            record = build_results(evaluation, str(pipe.device))
            with atomic_path(result) as path:
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            remove_partial(out)
        record = json.loads(result.read_text(encoding="utf-8"))
        names = ("mean_iou_in_labels", "boundary_iou", "overall_accuracy")
        found[chosen.name] = {
            row["method"]: {**{name: row[name] for name in names}, "seconds": row["seconds_per_image"]["method"]}
            for row in record["results"]
        }
    return found


def evaluate_alone(
    clip: str, hosts: Sequence[str], sets: Sequence[TestSet], data: Path, folder: Path, limit: int | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of the hosts without ARM, in one pass; those that an earlier experiment has measured are read.

    Args:
        clip: Name or folder.
        hosts: Methods.
        sets: What is measured on.
        data: Where the sets lie.
        folder: Where results are kept.
        limit: Take only the first so many images of a set.
    """
    measured = {host: part for part in sorted(folder.glob("*")) for host in part.name.split("+")}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for chosen in sets:
        missing = [h for h in hosts if h not in measured or not (measured[h] / f"{chosen.name}.json").exists()]
        parts = {measured[host] for host in hosts if host not in missing}
        if missing:
            parts.add(folder / "+".join(missing))
        for part in sorted(parts):
            rows = evaluate_model(clip, part.name.split("+"), [chosen], data, "off", part, limit)[chosen.name]
            found.setdefault(chosen.name, {}).update(rows)
    return found


def run_experiment(
    name: str, recipe: TrainingOptions, seeds: Sequence[int], data: Path, work: Path, limit: int | None = None
) -> list[dict[str, Any]]:
    """Train and evaluate all variants of an experiment; one record per variant, seed, set and host.

    Args:
        name: Of the experiment.
        recipe: The common options.
        seeds: Each variant is trained once with each.
        data: Where the sets lie.
        work: Where everything is kept.
        limit: Take only the first so many images of a set.
    """
    records = []
    for variant in EXPERIMENTS[name]:
        sets = [chosen for chosen in SETS if chosen.name in variant.sets and (data / chosen.folder).is_dir()]
        alone = evaluate_alone(recipe.clip, variant.hosts, sets, data, work / ALONE, limit)
        for seed in seeds:
            folder = work / name / f"{variant.name.replace(' ', '_').replace('/', '-')}-seed{seed}"
            model = train_variant(variant, seed, recipe, folder)
            refined = evaluate_model(model, variant.hosts, sets, data, "on", folder / "evaluation", limit)
            for each, rows in refined.items():
                for host, figures in rows.items():
                    record = {"experiment": name, "variant": variant.name, "seed": seed, "set": each, "host": host}
                    records.append({**record, "alone": alone[each][host], "with_arm": figures})
    return records


def gain(record: Mapping[str, Any], figure: str = "mean_iou_in_labels") -> float:
    """What ARM adds, in points.

    Args:
        record: One of `run_experiment`, with the figures alone and with ARM.
        figure: Such as "mean_iou".
    """
    return record["with_arm"][figure] - record["alone"][figure]


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{spread}"


def host_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Gain of every host on every set, the mean over seeds, and the means over sets and hosts."""
    sets = list(dict.fromkeys(record["set"] for record in records))
    hosts = list(dict.fromkeys(record["host"] for record in records))

    def mean(figure: str, **wanted: Any) -> float:
        chosen = [r for r in records if all(r[key] in values for key, values in wanted.items())]
        return statistics.fmean(gain(record, figure) for record in chosen)

    lines = []
    for title, figure in (("mIoU", "mean_iou_in_labels"), ("boundary IoU", "boundary_iou")):
        lines += [f"Gain in {title}, points", "", f"| host | {' | '.join(sets)} | mean |"]
        lines.append("|---|" + "---|" * (len(sets) + 1))
        for host in hosts:
            cells = [f"{mean(figure, host=[host], set=[each]):+.1f}" for each in sets]
            lines.append(f"| {host} | {' | '.join(cells)} | {mean(figure, host=[host]):+.1f} |")
        cells = [f"{mean(figure, set=[each]):+.1f}" for each in sets]
        lines += [f"| mean | {' | '.join(cells)} | {mean(figure, set=sets):+.1f} |", ""]
    unseen = [each.name for each in SETS if each.unseen and each.name in sets]
    if unseen:
        lines += [f"On sets whose label maps ARM has not seen ({', '.join(unseen)}): "
                  f"{mean('mean_iou_in_labels', set=unseen):+.1f} mIoU.", ""]  # fmt: skip
    by_seed = [statistics.fmean(gain(r) for r in records if r["seed"] == seed) for seed in {r["seed"] for r in records}]
    return [*lines, f"Mean gain over hosts and sets, seeds apart: {mean_and_spread(by_seed)} mIoU.", ""]


def variant_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """mIoU of every variant on every set with mean and spread over seeds, and the gain over the hosts alone."""
    sets = list(dict.fromkeys(record["set"] for record in records))
    seeds = sorted({record["seed"] for record in records})
    lines = [f"| variant | {' | '.join(sets)} | mean gain |", "|---|" + "---|" * (len(sets) + 1)]
    for variant in dict.fromkeys(record["variant"] for record in records):
        mine = [record for record in records if record["variant"] == variant]
        cells = []
        for each in sets:
            values = [
                statistics.fmean(
                    r["with_arm"]["mean_iou_in_labels"] for r in mine if r["set"] == each and r["seed"] == seed
                )
                for seed in seeds
            ]
            cells.append(mean_and_spread(values).removeprefix("+"))
        gains = [statistics.fmean(gain(r) for r in mine if r["seed"] == seed) for seed in seeds]
        lines.append(f"| {variant} | {' | '.join(cells)} | {mean_and_spread(gains)} |")
    return [*lines, ""]


def write_tables(records: Sequence[Mapping[str, Any]], recipe: TrainingOptions, work: Path) -> Path:
    """Write `evidence.json` and `evidence.md`; return the latter.

    Args:
        records: Of all experiments.
        recipe: The common options.
        work: Where to.
    """
    lines = ["# What ARM adds", "", f"Base: `{Path(recipe.clip).name}`. All figures in percent.", ""]
    for name in dict.fromkeys(record["experiment"] for record in records):
        chosen = [record for record in records if record["experiment"] == name]
        seeds = sorted({record["seed"] for record in chosen})
        lines += [f"## {name}", "", f"Seeds {', '.join(map(str, seeds))}.", ""]
        lines += host_table(chosen) if name == "hosts" else variant_table(chosen)
    content = {"evidence.json": json.dumps(list(records), indent=1), "evidence.md": "\n".join(lines)}
    for name, text in content.items():
        with atomic_path(work / name) as path:
            path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return work / "evidence.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", required=True, help="base model: folder, hub id, or an ARM checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--work-dir", type=Path, required=True, help="trainings, evaluations and tables")
    parser.add_argument("--experiments", nargs="+", choices=sorted(EXPERIMENTS), default=["hosts"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--config", default="arm-clip-mini", help="recipe: YAML file, or one of training/configs")
    parser.add_argument("--max-steps", type=int, help="steps of each training (default: the recipe's)")
    parser.add_argument("--limit", type=int, help="evaluate on the first so many photos of each list")
    args = parser.parse_args(arguments)
    quiet_libraries()
    recipe = parse_options(["--config", str(find_config(args.config))])
    recipe = replace(
        recipe,
        clip=args.clip,
        data=[str(args.data / folder) for folder in TRAINING_SETS],
        class_names=list(TRAINING_SETS.values()),
        val_data=[],
        val_class_names=[],
        cache_features=True,
        cache_dir=str(args.work_dir / "cache"),
        max_steps=args.max_steps or recipe.max_steps,
    )
    args.work_dir.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for name in args.experiments:
        records += run_experiment(name, recipe, args.seeds, args.data, args.work_dir, args.limit)
    print(write_tables(records, recipe, args.work_dir).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
