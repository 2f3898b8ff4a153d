"""Trainings and evaluations of an ablation: each is done once, kept in the work folder, and found again there.

    work/arms/NAME-seed0/      a training, named after what differs from the recipe
    work/figures/SET.json      figures by row: a host alone, or a host with the ARM of a training

Trainings that two tables have in common are one. Of a set all hosts and all ARMs are evaluated in the same passes
through the CLIP they share.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arm_hf.commands.common import quiet_libraries
from arm_hf.folders import atomic_path
from arm_hf.shared_pass import ARM_SUFFIX
from arm_hf.training.ablation_tables import FIGURE_NAMES
from arm_hf.training.options import TrainingOptions

HOST_OPTIONS: dict[str, dict[str, Any]] = {
    "resclip": {"pamr_iterations": 0},  # as in its paper; its code's PAMR over all classes takes most time
    "cliper": {"position_rule": "bilinear"},  # as in the code, though the input is common
    "gem": {"position_rule": "antialias"},
}
SIZE = 336  # shorter side of the images, in pixels; they are seen whole


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


@dataclass(frozen=True)
class Training:
    """One ARM.

    Attributes:
        options: Fields of `TrainingOptions` that differ from the recipe.
        seed: Of weights and order.
        checkpoint: A model that is there already, to be attached in place of a training.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    checkpoint: str | None = None

    def name(self, recipe: TrainingOptions) -> str:
        """What it is called in the work folder: the differences alone, so that equal trainings are one."""
        if self.checkpoint is not None:
            return Path(self.checkpoint).name
        changed = {key: value for key, value in self.options.items() if value != getattr(recipe, key)}
        parts = [f"{key}={_as_word(value)}" for key, value in sorted(changed.items())]
        return "+".join([*(parts or ["recipe"]), f"seed{self.seed}"])


def _as_word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Bench:
    """Where and how everything is trained and evaluated.

    Attributes:
        recipe: The common options of all trainings; its `clip` is the base.
        data: Folder of the labelled sets.
        work: Everything is kept here.
        limit: Take only the first so many images of a set.
        processes: How many trainings, or sets, are worked on at a time.
        weight: Of M_r in the evaluation, a factor on that of the training. Hosts other than ARM's own, and sets it was
            not trained on, gain more from a part of it.
    """

    recipe: TrainingOptions
    data: Path
    work: Path
    limit: int | None = None
    processes: int = 1
    weight: float = 1.0

    def folder(self, training: Training) -> Path:
        """Where a training is kept."""
        return self.work / "arms" / training.name(self.recipe)

    def checkpoint(self, training: Training) -> str:
        """Folder or name of its model."""
        return training.checkpoint or str(self.folder(training) / "last")

    def row(self, host: str, training: Training | None) -> str:
        """Name of a row of figures.

        Args:
            host: A method.
            training: Whose ARM refines it; None is the host alone.
        """
        return host if training is None else f"{host}{ARM_SUFFIX} ({self.model(training)})"

    def model(self, training: Training) -> str:
        """Name of a trained ARM with its weight."""
        return training.name(self.recipe) + (f" x{self.weight:g}" if self.weight != 1 else "")

    def for_each(self, function: Callable[..., Any], tasks: Sequence[tuple]) -> list[Any]:
        """The results of `function(self, *task)`, several at a time in processes of their own.

        Args:
            function: Of a module.
            tasks: Its further arguments.
        """
        if self.processes == 1 or len(tasks) < 2:
            return [function(self, *task) for task in tasks]
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        spawn = get_context("spawn")
        with ProcessPoolExecutor(self.processes, spawn, _start_process, (threads,)) as pool:
            return [future.result() for future in [pool.submit(function, self, *task) for task in tasks]]


def _start_process(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    quiet_libraries()


def train_all(bench: Bench, trainings: Sequence[Training]) -> None:
    """Train what is not there yet; those that differ in nothing are trained once.

    Args:
        bench: Where and how.
        trainings: What is needed.
    """
    wanted = [each for each in trainings if each.checkpoint is None]
    missing = {each.name(bench.recipe): each for each in wanted if not (bench.folder(each) / "finished").exists()}
    # The first of those that read the same features writes them; the others wait.
    first = {each.options.get("method", bench.recipe.method): each for each in reversed(missing.values())}
    bench.for_each(train_one, [(each,) for each in first.values()])
    bench.for_each(train_one, [(each,) for each in missing.values() if each not in first.values()])


def train_one(bench: Bench, training: Training) -> None:
    """Train, or go on with, a training.

    Args:
        bench: Where and how.
        training: Which.
    """
    from arm_hf.training.train import train

    folder = bench.folder(training)
    changes = {**training.options, "seed": training.seed, "output_dir": str(folder)}
    train(replace(bench.recipe, **changes, resume=True, overwrite=False))
    (folder / "finished").touch()


def training_speed(bench: Bench, steps: int = 40) -> dict[str, float]:
    """Images a second of the recipe's training, with CLIP in every step and on cached features: medians of the log.

    Args:
        bench: Where and how.
        steps: Of each of the two trainings, which are not kept.
    """
    from arm_hf.training.train import train

    speeds = {}
    for name, cached in (("CLIP in every step", False), ("cached features", True)):
        with TemporaryDirectory(dir=bench.work, prefix=".speed") as folder:
            changes: dict[str, Any] = {
                "output_dir": folder,
                "cache_features": cached,
                "max_steps": steps,
                "log_every": 5,
            }
            train(replace(bench.recipe, **changes, overwrite=True, resume=False))
            lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        speeds[name] = statistics.median(line["images_per_second"] for line in lines[1:])
    return speeds


def evaluate_set(
    bench: Bench, chosen: TestSet, wanted: Sequence[tuple[str, Training | None]]
) -> dict[str, dict[str, float]]:
    """Figures of a set in percent by row, and the seconds of an image: the method's and its trunk's.

    Args:
        bench: Where and how.
        chosen: The set.
        wanted: Hosts, each alone (None) or with an ARM.

    Raises:
        ValueError: An ARM of the work folder was trained on another CLIP.
    """
    limit = "" if bench.limit is None else f"-{bench.limit}"
    path = bench.work / "figures" / f"{chosen.name}{limit}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = {bench.row(*pair): pair for pair in wanted if bench.row(*pair) not in known}
    if missing:
        known.update(_evaluate(bench, chosen, list(missing.values()), bench.work / "figures" / chosen.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {row: known[row] for row in (bench.row(*pair) for pair in wanted)}


def _evaluate(
    bench: Bench, chosen: TestSet, pairs: Sequence[tuple[str, Training | None]], partial: Path
) -> dict[str, dict[str, float]]:
    from tqdm import tqdm

    from arm_hf.data import open_data
    from arm_hf.evaluating import evaluate_data
    from arm_hf.evaluation_plan import EvaluationOptions, make_plan
    from arm_hf.partial_results import remove_partial
    from arm_hf.result_tables import build_results
    from arm_hf.segmenting import load_pipeline

    pipe = load_pipeline(str(bench.recipe.clip))
    hosts = list(dict.fromkeys(host for host, _ in pairs))
    source = open_data(bench.data / chosen.folder, chosen.split)
    options = EvaluationOptions(
        protocol=chosen.protocol,
        common_input=True,
        limit=bench.limit,
        size=SIZE,
        window=0,
        method_options={host: given for host, given in HOST_OPTIONS.items() if host in hosts},
    )
    plan = make_plan(pipe, source, hosts, options)
    alone = {row.setup.method: row for row in plan.rows}
    rows = tuple(
        alone[host] if training is None else replace(alone[host], arm=True, model=bench.model(training))
        for host, training in pairs
    )
    checkpoints = {bench.model(training): bench.checkpoint(training) for _, training in pairs if training is not None}
    models = load_arms(pipe.model, checkpoints, bench.weight)

    def bar(images: Any, total: int | None, before: int) -> Any:
        return tqdm(images, desc=chosen.name, total=total, unit="image", mininterval=10)

    plan, name = replace(plan, rows=rows), str(bench.recipe.clip)
    evaluation = evaluate_data(pipe, source, plan, options, partial, name, None, True, bar, models=models)
    record = build_results(evaluation, str(pipe.device))
    remove_partial(partial)
    return {
        row["name"]: {
            **{figure: row[figure] for figure in FIGURE_NAMES},
            "seconds": row["seconds_per_image"]["method"],
            "trunk_seconds": row["seconds_per_image"]["trunk"],
        }
        for row in record["results"]
    }


def load_arms(base: Any, checkpoints: Mapping[str, str], weight: float = 1.0) -> dict[str, Any]:
    """The trained models by name, all with the CLIP of `base`.

    Args:
        base: A `CLIPModel` or `ARMModel`.
        checkpoints: Folders or names of models.
        weight: Factor on M_r.

    Raises:
        ValueError: One was trained on another CLIP.
    """
    from arm_hf import ARMModel
    from arm_hf.default_model import resolve_model
    from arm_hf.evaluating import fingerprint

    clip = getattr(base, "clip", base)
    expected, models = fingerprint(clip), {}
    for name, checkpoint in checkpoints.items():
        model = ARMModel.from_pretrained(resolve_model(checkpoint)).eval()
        if fingerprint(model.clip) != expected:
            raise ValueError(f"{checkpoint!r} holds an ARM of another CLIP; use another work folder, or remove it")
        model.clip = clip
        model.arm.refinement_scale *= weight
        models[name] = model
    return models
