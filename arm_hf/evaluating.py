"""Evaluate many methods on a labelled data set: one pass over the images, several processes, and going on after a kill.

What is counted is pixels, so the sum over processes and runs is exactly that of one process and one run.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arm_hf.data import SegmentationData
from arm_hf.evaluation_plan import EvaluationOptions, Plan
from arm_hf.partial_results import PartialResults, Tally
from arm_hf.shared_pass import SharedPass

SAVE_SECONDS = 30.0  # at the latest after so long what was counted is saved


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        plan: What was computed.
        tally: What was counted.
        identity: What determines the numbers.
        processes: Processes of the last run.
    """

    plan: Plan
    tally: Tally
    identity: Mapping[str, Any]
    processes: int


class Processes:
    """The processes of this run, through accelerate where there are several (`torchrun`, `accelerate launch`).

    Args:
        device: What was asked for; "cpu" also where there is an accelerator.

    Raises:
        ValueError: Several processes were started, and they do not find each other.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank, self.count, self.device = 0, int(os.environ.get("WORLD_SIZE", "1")), device
        if self.count == 1:
            return
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu)
        if state.num_processes != self.count:
            raise ValueError(f"{self.count} processes were started, but accelerate sees {state.num_processes}")
        self.rank = state.process_index
        if device in (None, state.device.type):  # "cuda" means this process's own
            self.device = str(state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process prepares and writes."""
        return self.rank == 0

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the main process, in all of them; a ValueError is raised in all of them."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = make()
            except ValueError as error:
                message[1] = str(error)
        broadcast_object_list(message)
        if message[1] is not None:
            raise ValueError(message[1])
        return message[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def end(self) -> None:
        """Leave the group of processes in order."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def describe_model(pipe: Any, name: str) -> dict[str, Any]:
    """What identifies the model: its name, its CLIP, the shape of ARM, and a fingerprint of the weights.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        name: What the user calls the model.
    """
    model = pipe.model
    arm = hasattr(model, "arm")
    vision = (model.clip if arm else model).config.vision_config
    record: dict[str, Any] = {
        "name": Path(name).name if Path(name).exists() else name,
        "type": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "blocks": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "patch_size": vision.patch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": fingerprint(model),
    }
    if arm:
        config = model.config
        base = config.clip_name_or_path
        record["clip"] = Path(base).name if base and Path(base).exists() else base
        record["arm"] = {
            "parameters": sum(parameter.numel() for parameter in model.arm.parameters()),
            **{key: getattr(config, key) for key in ("fusion_layers", "coarse_form", "num_scale_blocks", "ffn_ratio")},
        }
    return record


def fingerprint(model: torch.nn.Module) -> str:
    """Digest of names, shapes and a sample of the values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def evaluate_data(
    pipe: Any,
    data: SegmentationData,
    plan: Plan,
    options: EvaluationOptions,
    out: str | Path,
    model_name: str,
    processes: Processes | None = None,
    overwrite: bool = False,
    progress: Callable[[Iterable, int | None, int], Iterable] | None = None,
    keep_maps: Callable[[int, Mapping[str, np.ndarray]], None] | None = None,
    models: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate; every process calls this, and gets the whole result.

    Args:
        pipe: The pipeline.
        data: The data set.
        plan: From `make_plan`.
        options: The same as there.
        out: Folder of the results; an unfinished evaluation of the same things in it is gone on with.
        model_name: What the results call the model.
        processes: The processes of this run.
        overwrite: Discard an unfinished evaluation of other things.
        progress: Wraps the images: the iterable, their number if known, and how many of all were done before.
        keep_maps: Gets the predicted labels of every image, for a metric of another package.
        models: Further `ARMModel`s on the same CLIP, by the names that rows give.

    Raises:
        ValueError: `out` holds an unfinished evaluation of other things, or an image or its labels cannot be read.
    """
    processes = processes or Processes()
    identity = {
        "model": describe_model(pipe, model_name),
        "data": describe_data(data, options.limit),
        "protocol": plan.protocol.record([row.setup for row in plan.rows]),
        "rows": [{"name": row.name, "pamr": row.pamr} for row in plan.rows],
        "labels": plan.table.rule,
        "boundary_radius": options.boundary_radius,
        "keeps_maps": keep_maps is not None,
        **({"models": {name: fingerprint(other.arm) for name, other in models.items()}} if models else {}),
    }
    partial = PartialResults(Path(out), identity)

    def empty() -> Tally:
        names = [row.name for row in plan.rows]
        return Tally.empty(names, len(plan.protocol.classes), plan.table.ignore_index, options.boundary_radius or None)

    base = processes.from_main(lambda: partial.begin(empty(), overwrite))
    counted = empty()
    shared_pass = SharedPass(pipe, plan.rows, options.window_batch_size, models=models)
    rows, total = rows_of(data, options.limit, base.images.keys(), processes.rank, processes.count)
    images: Iterable = _decoded(data, rows)
    if progress is not None:
        images = progress(images, total, len(base.images))
    saved = time.monotonic()
    try:
        for number, (index, name, image, labels) in enumerate(images, start=1):
            found = shared_pass(image)
            if keep_maps is not None:  # before the image counts as done
                keep_maps(index, found.labels)
            counted.add(index, name, plan.table(labels), found)
            if number % options.save_every == 0 or time.monotonic() - saved > SAVE_SECONDS:
                partial.save(counted)
                saved = time.monotonic()
    finally:  # an interrupt or a broken image does not lose what was counted
        partial.save(counted)
    for other in processes.gather(counted):
        base.merge(other)
    if not base.images:
        raise ValueError(f"{data.name} has no images in {data.split}")
    return Evaluation(plan, base, identity, processes.count)


def describe_data(data: SegmentationData, limit: int | None) -> dict[str, Any]:
    """What identifies the images that are evaluated.

    Args:
        data: The data set.
        limit: How many of its first images are taken, or None for all.
    """
    record: dict[str, Any] = {"name": data.name, "split": data.split, "classes": len(data.classes), "limit": limit}
    try:
        names = data.select(range(min(len(data), limit or len(data)))).dataset["name"]
    except (TypeError, ValueError):  # streamed: neither a length nor an index
        return {**record, "images": None}
    digest = hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:16]
    return {**record, "images": len(names), "names": digest}


def rows_of(
    data: SegmentationData, limit: int | None, done: Iterable[int], rank: int = 0, count: int = 1
) -> tuple[Iterator[tuple[int, Any]], int | None]:
    """Index and row of the images that one of `count` processes still has to do, and their number if it is known.

    Args:
        data: The data set.
        limit: Take only the first so many images.
        done: Indices that need not be done again.
        rank: Which process this is, from 0.
        count: Number of processes.
    """
    done = set(done)
    try:
        size = min(len(data), limit or len(data))
    except TypeError:

        def streamed() -> Iterator[tuple[int, Any]]:
            for index, row in enumerate(data.dataset):
                if limit is not None and index >= limit:
                    return
                if index not in done and index % count == rank:
                    yield index, row

        return streamed(), None
    mine = [index for index in range(size) if index not in done][rank::count]
    return zip(mine, data.select(mine).dataset, strict=True), len(mine)


def _decoded(data: SegmentationData, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, str, Any, np.ndarray]]:
    """Index, name, image and labels; the next image is read while the caller works on this one."""

    def read() -> tuple[int, str, Any, np.ndarray] | None:
        item = next(rows, None)
        if item is None:
            return None
        index, row = item
        return (index, str(row["name"]), *data.read(row))

    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting = reader.submit(read)
        while (item := waiting.result()) is not None:
            waiting = reader.submit(read)
            yield item
