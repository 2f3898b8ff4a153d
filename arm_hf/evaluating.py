"""Evaluate many methods on a labelled data set: one pass over the images, several processes, and going on after a kill.

What is counted is pixels, so the sum over processes and runs is exactly that of one process and one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arm_hf.comparing import ARM_CHOICES
from arm_hf.modeling.prompts import Label
from arm_hf.partial_results import PartialResults, Tally
from arm_hf.protocols import (
    PLAIN,
    InputRule,
    LabelTable,
    Protocol,
    align_labels,
    backbone_of,
    load_protocol,
    plain_protocol,
)
from arm_hf.resizing import INTERPOLATIONS
from arm_hf.shared_pass import Row, SharedPass

SAVE_SECONDS = 30.0  # at the latest after so long what was counted is saved


@dataclass(frozen=True)
class EvaluationOptions:
    """What may be chosen beside data, model and methods.

    Attributes:
        protocol: Name of a protocol, or "plain".
        arm: "off", "on" or "both".
        common_input: Show all methods the same image (see `Protocol.setup`).
        size: Shorter side in place of the protocol's.
        window: Side of the window in its place; 0 sees the whole image.
        stride: Step of the window in its place.
        interpolation: One of `resizing.INTERPOLATIONS` in its place.
        threshold: Background threshold in its place, with and without ARM; 0 leaves it out.
        pamr: Run PAMR for methods whose authors' numbers contain it.
        labels: Words of the classes, for "plain".
        trust_order: See `align_labels`.
        limit: Take only the first so many images.
        boundary_radius: Share of the image's diagonal that belongs to a boundary; 0 leaves the boundary IoU out.
        save_every: Images after which each process saves what it has counted.
        window_batch_size: Windows per pass.

    Raises:
        ValueError: A value is impossible.
    """

    protocol: str = PLAIN
    arm: str = "off"
    common_input: bool = False
    size: int | None = None
    window: int | None = None
    stride: int | None = None
    interpolation: str | None = None
    threshold: float | None = None
    pamr: bool = False
    labels: tuple[Label, ...] | None = None
    trust_order: bool = False
    limit: int | None = None
    boundary_radius: float = 0.02
    save_every: int = 20
    window_batch_size: int = 16

    def __post_init__(self):
        if self.arm not in ARM_CHOICES:
            raise ValueError(f"arm must be one of {', '.join(ARM_CHOICES)}, got {self.arm!r}")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"resize must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        for name in ("size", "stride", "limit", "save_every", "window_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be positive, or 0 for the whole image; got {self.window}")
        if self.stride is not None and not self.window:
            raise ValueError("stride has no meaning without window; give both or neither")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be above 0 and below 1, or 0 for none; got {self.threshold}")
        if not 0 <= self.boundary_radius < 1:
            raise ValueError(f"boundary must be a share of the diagonal, or 0 for none; got {self.boundary_radius}")
        if self.labels is not None and self.protocol != PLAIN:
            raise ValueError(f"protocol {self.protocol} has its own words; other words go with protocol {PLAIN}")


@dataclass(frozen=True)
class Plan:
    """What is to be computed.

    Attributes:
        protocol: The protocol.
        backbone: Whose of its values are taken.
        rows: The rows of the result table.
        table: How the data set's labels are read.
        left_out: Methods that cannot run here, with the reason.
    """

    protocol: Protocol
    backbone: str
    rows: tuple[Row, ...]
    table: LabelTable
    left_out: Mapping[str, str]

    def describe(self, pipe: Any) -> list[str]:
        """What is computed, for the terminal: the protocol, the label rule, and who shares which pass."""
        protocol, shared_pass = self.protocol, SharedPass(pipe, self.rows)
        lines = [f"protocol {protocol.name}: {protocol.title}; {self.table.rule}"]
        if self.table.misnamed:
            lines.append(f"named differently (data / protocol): {'; '.join(self.table.misnamed)}")
        lines += [f"pass {number}: {line}" for number, line in enumerate(shared_pass.describe(), start=1)]
        for setup in {row.setup.method: row.setup for row in self.rows}.values():
            lines.append(f"{setup.method}: {setup.describe()}")
        return lines + [f"left out {method}: {reason}" for method, reason in self.left_out.items()]


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


def make_plan(
    pipe: Any, data: Any, methods: Sequence[str], options: EvaluationOptions, skip_unable: bool = False
) -> Plan:
    """Decide what is computed, and find out what cannot be before any image is read.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        data: A `SegmentationData`.
        methods: Registered names.
        options: The choices.
        skip_unable: Leave methods out that cannot run here (another model's features are missing), instead of an error.

    Raises:
        ValueError: Data and protocol do not fit, the model has no ARM, or a method cannot run.
    """
    if options.protocol == PLAIN:
        templates = getattr(pipe.model.config, "templates", None) or "imagenet80"
        protocol = plain_protocol(data.name, data.classes, data.background_index, options.labels, templates)
    else:
        protocol = load_protocol(options.protocol)
    table = align_labels(protocol, data, options.trust_order)
    clip = pipe.model.clip if hasattr(pipe.model, "arm") else pipe.model
    backbone = backbone_of(clip.config.vision_config)
    rows = []
    for method in methods:
        setup = protocol.setup(method, backbone, options.common_input)
        changes: dict[str, Any] = {"input": _override(setup.input, options)}
        if options.threshold is not None:
            changes["threshold"] = changes["arm_threshold"] = options.threshold or None
        setup = dataclasses.replace(setup, **changes)
        if options.arm != "on":
            rows.append(Row(setup, False, setup.pamr if options.pamr else None))
        if options.arm != "off":
            rows.append(Row(setup, True))
    failed = SharedPass(pipe, rows, options.window_batch_size).check()
    if failed and (not skip_unable or len(failed) == len(methods)):
        name, reason = next(iter(failed.items()))
        raise ValueError(f"cannot evaluate {name}: {reason}")
    return Plan(protocol, backbone, tuple(row for row in rows if row.setup.method not in failed), table, failed)


def _override(rule: InputRule, options: EvaluationOptions) -> InputRule:
    changes: dict[str, Any] = {}
    if options.interpolation is not None:
        changes["interpolation"] = options.interpolation
    if options.size is not None:
        changes["short_side"] = options.size
        changes["long_side"] = None if rule.long_side is None else max(rule.long_side, options.size)
    if options.window is not None:
        changes["window"] = options.window or None
        changes["stride"] = (options.stride or max(1, options.window // 2)) if options.window else None
    rule = dataclasses.replace(rule, **changes)
    if rule.short_side is None and rule.interpolation != "processor":
        raise ValueError(f"resize {rule.interpolation} needs --size: protocol {PLAIN} leaves the size to the model")
    return rule


def describe_model(pipe: Any, name: str) -> dict[str, Any]:
    """What identifies the model: its name, its CLIP, the shape of ARM, and a fingerprint of the weights."""
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
    data: Any,
    plan: Plan,
    options: EvaluationOptions,
    out: str | Path,
    model_name: str,
    processes: Processes | None = None,
    overwrite: bool = False,
    progress: Callable[[Iterable, int | None, int], Iterable] | None = None,
    keep_maps: Callable[[int, Mapping[str, np.ndarray]], None] | None = None,
) -> Evaluation:
    """Evaluate; every process calls this, and gets the whole result.

    Args:
        pipe: The pipeline.
        data: A `SegmentationData`.
        plan: From `make_plan`.
        options: The same as there.
        out: Folder of the results; an unfinished evaluation of the same things in it is gone on with.
        model_name: What the results call the model.
        processes: The processes of this run.
        overwrite: Discard an unfinished evaluation of other things.
        progress: Wraps the images: the iterable, their number if known, and how many of all were done before.
        keep_maps: Gets the predicted labels of every image, for a metric of another package.

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
    }
    partial = PartialResults(Path(out), identity)

    def empty() -> Tally:
        names = [row.name for row in plan.rows]
        return Tally.empty(names, len(plan.protocol.classes), plan.table.ignore_index, options.boundary_radius or None)

    base = processes.from_main(lambda: partial.begin(empty(), overwrite))
    counted = empty()
    shared_pass = SharedPass(pipe, plan.rows, options.window_batch_size)
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


def describe_data(data: Any, limit: int | None) -> dict[str, Any]:
    """What identifies the images that are evaluated."""
    record: dict[str, Any] = {"name": data.name, "split": data.split, "classes": len(data.classes), "limit": limit}
    try:
        names = data.select(range(min(len(data), limit or len(data)))).dataset["name"]
    except (TypeError, ValueError):  # streamed: neither a length nor an index
        return {**record, "images": None}
    digest = hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:16]
    return {**record, "images": len(names), "names": digest}


def rows_of(
    data: Any, limit: int | None, done: Iterable[int], rank: int = 0, count: int = 1
) -> tuple[Iterator[tuple[int, Any]], int | None]:
    """Index and row of the images that one of `count` processes still has to do, and their number if it is known."""
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


def _decoded(data: Any, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, str, Any, np.ndarray]]:
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
