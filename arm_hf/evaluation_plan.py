"""What an evaluation computes: its choices, the rows of its table, and how the labels of the data are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arm_hf.comparing import ARM_CHOICES
from arm_hf.data import LAYOUTS, SegmentationData, open_data
from arm_hf.modeling.method import get_method
from arm_hf.modeling.prompts import Label
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
from arm_hf.segmenting import parse_options
from arm_hf.shared_pass import Row, SharedPass


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
        method_options: Settings in their place, by method.
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
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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


def open_evaluation_data(
    source: str,
    split: str,
    protocol: str,
    *,
    layout: str | None = None,
    image_column: str | None = None,
    **options: Any,
) -> SegmentationData:
    """Open a data set as `open_data` does; a standard tree is read in the protocol's own layout.

    Args:
        source: See `open_data`.
        split: See `open_data`.
        protocol: Name of a protocol, or "plain".
        layout: See `open_data`.
        image_column: See `open_data`.
        options: Other arguments of `open_data`.

    Raises:
        ValueError: As `open_data` does.
    """
    root = Path(source).expanduser()
    is_tree = root.is_dir() and image_column is None and not (root / "classes.json").exists()
    if layout is None and is_tree and protocol in LAYOUTS:
        layout = protocol
    return open_data(source, split, layout=layout, image_column=image_column, **options)


def parse_method_options(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `method.key=value` pairs; values as in `segmenting.parse_options`.

    Raises:
        ValueError: A pair does not have this form, or comes twice.
    """
    given: dict[str, list[str]] = {}
    for pair in pairs:
        method, point, rest = pair.partition(".")
        if not point or "=" in method:
            raise ValueError(f"an option reads method.key=value, such as naclip.gaussian_std=3; got {pair!r}")
        given.setdefault(method.strip(), []).append(rest)
    return {method: parse_options(rest) for method, rest in given.items()}


def make_plan(
    pipe: Any, data: SegmentationData, methods: Sequence[str], options: EvaluationOptions, skip_unable: bool = False
) -> Plan:
    """Decide what is computed, and find out what cannot be before any image is read.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        data: The data set.
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
        protocol = load_protocol(options.protocol).for_data(data)
    table = align_labels(protocol, data, options.trust_order)
    clip = pipe.model.clip if hasattr(pipe.model, "arm") else pipe.model
    backbone = backbone_of(clip.config.vision_config)
    unused = sorted(set(options.method_options) - set(methods))
    if unused:
        raise ValueError(f"there are options for {', '.join(unused)}, but evaluated are {', '.join(methods)}")
    rows = []
    for method in methods:
        setup = protocol.setup(method, backbone, options.common_input)
        changes: dict[str, Any] = {"input": _override(setup.input, options)}
        if given := options.method_options.get(method):
            changes["options"] = {**setup.options, **given}
            changes["notes"] = (*setup.notes, f"not the protocol's: {', '.join(given)}")
            try:
                get_method(method).settings(changes["options"])
            except TypeError as error:
                raise ValueError(str(error)) from error
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
