"""The literature's evaluation protocols: for each data set and method what the network sees and what is decided how.

Every value lies in `assets/protocols/NAME.json` with its source; nothing of it is in code paths. A protocol says how
the labels of a data set are read, and holds one `MethodSetup` per method. The papers' numbers that belong to it come
along.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arm_hf.label_sets import load_label_set
from arm_hf.modeling.layer_fusion_methods import CLIPER_OPTIONS
from arm_hf.modeling.method import get_method
from arm_hf.modeling.prompts import Label, Vocabulary, parse_labels
from arm_hf.modeling.trunk import COMMON_POSITION_RULE

PLAIN = "plain"
BACKBONES = ("B/16", "L/14")

_ASSETS = Path(__file__).parent / "assets"
_FOLDER = _ASSETS / "protocols"
_FROM_DATA = "data"  # as a protocol's label set: the data set names its classes
_OF_DATA = "those of the data set"
_NO_WORDS = (
    "this protocol takes the words of the data set that is evaluated; name that: Protocol.for_data(data) in Python, "
    "arm-hf evaluate --data DIR on the command line"
)
_MISNAMED = 0.1  # share of classes whose names may differ from the protocol's


@dataclass(frozen=True)
class InputRule:
    """What the network sees of an image. Methods with the same rule share a pass through the trunk.

    Attributes:
        short_side: Length of the shorter side in pixels; None takes the image processor's.
        long_side: Limit of the longer side, or None.
        interpolation: One of `resizing.INTERPOLATIONS`.
        rounding: One of `resizing.ROUNDINGS`.
        window: Side of the sliding window in pixels of the resized image; None sees the whole image.
        stride: Step of the window.
        odd_sizes: "pad" an image to whole patches, or "drop" what is left over.
    """

    short_side: int | None = None
    long_side: int | None = None
    interpolation: str = "processor"
    rounding: str = "pixel"
    window: int | None = None
    stride: int | None = None
    odd_sizes: str = "pad"

    def describe(self) -> str:
        """One line for people."""
        side = "model's size" if self.short_side is None else f"short side {self.short_side}"
        limit = f" (long at most {self.long_side})" if self.long_side else ""
        rounding = ", rounded to patches" if self.rounding == "patch" else ""
        seen = "whole image" if self.window is None else f"windows of {self.window}, stride {self.stride}"
        return f"{side}{limit}, {self.interpolation}{rounding}, {seen}, odd sizes: {self.odd_sizes}"


@dataclass(frozen=True)
class MethodSetup:
    """All that a protocol fixes for one method.

    Attributes:
        method: Registered name.
        input: What the network sees.
        labels: Classes with their words, in the order of the label values; none while the data set is to name them.
        background: Index of the class that means "none of the others", or None.
        background_words: Words of a background that is no class of the data set; its pixels count as wrong.
        templates: Prompt templates.
        options: Settings of the method.
        threshold: Score of the winner below which a pixel is background, or None.
        area_threshold: SCLIP's rule on VOC21: a class that holds at most this share of the foreground is left out.
        pamr: Rounds of PAMR in the authors' own numbers (they run only when asked for).
        arm_options: Settings that differ when ARM refines the method.
        arm_threshold: The threshold with ARM where its scores go through a sigmoid.
        source: Where the values come from.
        notes: Where we depart from the source, and what to know.
    """

    method: str
    input: InputRule
    labels: tuple[Label, ...]
    background: int | None = None
    background_words: tuple[str, ...] = ()
    templates: str | tuple[str, ...] = "imagenet80"
    options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    area_threshold: float | None = None
    pamr: int | None = None
    arm_options: Mapping[str, Any] = field(default_factory=dict)
    arm_threshold: float | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def offset(self) -> int:
        """What to take off a predicted index to get the data set's: 1 with a background that is no class of it."""
        return 1 if self.background_words else 0

    def vocabulary(self) -> Vocabulary:
        """Classes, words and background as the decision needs them.

        Raises:
            ValueError: The words are those of a data set, which was not named (`Protocol.for_data`).
        """
        if not self.labels:
            raise ValueError(_NO_WORDS)
        if self.background_words:
            return Vocabulary((Label("background", self.background_words), *self.labels), 0, self.threshold)
        return Vocabulary(self.labels, self.background, self.threshold)

    def describe(self) -> str:
        """Words, settings, thresholds and their source in one line."""
        settings = ", ".join(f"{key}={value}" for key, value in self.options.items())
        thresholds = [
            f"{name} {value:g}"
            for name, value in (
                ("threshold", self.threshold),
                ("with ARM", self.arm_threshold),
                ("area threshold", self.area_threshold),
            )
            if value is not None
        ]
        queries = sum(len(label.words) for label in self.labels) + len(self.background_words)
        words = f"{queries} words" if self.labels else "the words of the data set"
        templates = self.templates if isinstance(self.templates, str) else f"{len(self.templates)} own templates"
        parts = [words, templates, settings, *thresholds, f"source: {self.source}", *self.notes]
        return "; ".join(part for part in parts if part)

    def record(self) -> dict[str, Any]:
        """The setup for JSON: every value, the method's settings with their defaults filled in."""
        settings = dataclasses.asdict(get_method(self.method).settings(self.options))
        result = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("labels", "options")}
        words = _words(self.labels) or _OF_DATA
        return {**result, "templates": self.templates, "options": settings, "label_words": words}


@dataclass(frozen=True)
class Protocol:
    """How one data set is evaluated.

    The classes come from a label set (`"label_set": "voc21"` in the protocol's file), from the data set's list of names
    in `assets/class_names` (`"name_list": "ade847"`; names of a class are separated by commas, and each is a word), or
    from the data that are evaluated (`"label_set": "data"`; each name is the word). The last is for lists that do not
    ship with the package: such a protocol knows inputs and settings, but no classes or words before `for_data`.

    Attributes:
        name: What users type.
        title: Data set, split and classes in words.
        num_classes: K.
        class_names: Class names in the order of the label values; none while the data set is to name them.
        background: Index of the background class, or None.
        labels_rule: How label values are read, in words.
        metric: What is reported, in words.
        source: Of the two rules above.
        default: Setup of methods that have none of their own; also what `common input` means.
        methods: The setups of the file, per method, as it holds them.
        published: The papers' numbers.
        arm_threshold_source: Where the threshold with ARM comes from.
    """

    name: str
    title: str
    num_classes: int
    class_names: tuple[str, ...]
    background: int | None
    labels_rule: str
    metric: str
    source: str
    default: MethodSetup
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: tuple[Mapping[str, Any], ...] = ()
    arm_threshold_source: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the label values.

        Raises:
            ValueError: They are those of a data set, which was not named (`for_data`).
        """
        if not self.class_names:
            raise ValueError(_NO_WORDS)
        return self.class_names

    def for_data(self, data: Any) -> Protocol:
        """This protocol, with the class names of a data set as words if it has none of its own.

        Args:
            data: A `SegmentationData`.

        Raises:
            ValueError: The data set has another number of classes, or two of one name.
        """
        if self.class_names:
            return self
        if len(data.classes) != self.num_classes:
            raise ValueError(_other_classes(self, data))
        labels = parse_labels([Label(name, (name,)) for name in data.classes])
        default = dataclasses.replace(self.default, labels=labels)
        return dataclasses.replace(self, class_names=tuple(data.classes), default=default)

    def setup(self, method: str, backbone: str = "B/16", common_input: bool = False) -> MethodSetup:
        """The setup of a method.

        Args:
            method: Registered name; one that the protocol does not know gets the default.
            backbone: One of `BACKBONES`; CLIPer's code has other values for each.
            common_input: Give every method the default's input and one rule for the position table, so that all share
                one pass through the trunk. That is no longer the papers' protocol.

        Raises:
            ValueError: Unknown backbone or method.
        """
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        known = get_method(method)
        entry = dict(self.methods.get(method, {}))
        differences = dict(entry.pop("backbones", {})).get(backbone, {})
        values = {key: value for key, value in (entry | differences).items() if key != "short_side"}
        rule = self.default.input
        if "input" in values:
            rule = InputRule(**values.pop("input"))
            rule = dataclasses.replace(rule, short_side=differences.get("short_side", rule.short_side))
        notes = tuple(values.pop("notes", () if entry else self.default.notes))
        if common_input and rule != self.default.input:
            rule = self.default.input
            notes = (*notes, "input: the data set's common one, not the method's own")
        if values.get("options") == "CLIPER_OPTIONS":
            values["options"] = CLIPER_OPTIONS[self.name, backbone]
        if common_input and known.settings(values.get("options")).position_rule != COMMON_POSITION_RULE:
            values["options"] = {**values.get("options", {}), "position_rule": COMMON_POSITION_RULE}
            notes = (*notes, "position table: resized as for most methods, not the method's own way")
        if "label_set" in values:
            values["labels"] = load_label_set(values.pop("label_set"))
        if "background_words" in values:
            values["background_words"] = tuple(values["background_words"])
        return dataclasses.replace(self.default, method=method, input=rule, notes=notes, **values)

    def published_for(self, method: str, arm: bool, backbone: str, pamr: bool) -> list[Mapping[str, Any]]:
        """The papers' numbers for a method, those with and without PAMR apart.

        Args:
            method: Registered name.
            arm: With or without ARM.
            backbone: One of `BACKBONES`.
            pamr: With or without PAMR.
        """
        wanted = {"method": method, "arm": arm, "backbone": backbone, "pamr": pamr}
        return [entry for entry in self.published if all(entry[key] == value for key, value in wanted.items())]

    def record(self, setups: Sequence[MethodSetup] = ()) -> dict[str, Any]:
        """The protocol for JSON, with the setups that were used."""
        facts = {key: getattr(self, key) for key in ("name", "title", "background", "metric", "source")}
        return {
            **facts,
            "labels": self.labels_rule,
            **({} if self.class_names else {"num_classes": self.num_classes}),
            "classes": list(self.class_names) or _OF_DATA,
            **({"arm_threshold_source": self.arm_threshold_source} if self.arm_threshold_source else {}),
            "methods": {setup.method: setup.record() for setup in setups},
        }


def list_protocols() -> list[str]:
    """Names that `load_protocol` knows, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_protocol(name: str) -> Protocol:
    """Return a protocol of the literature.

    ```python
    >>> from arm_hf.protocols import load_protocol
    >>> setup = load_protocol("voc21").setup("sclip")
    >>> setup.input.describe(), setup.options["logit_scale"], setup.threshold
    ('short side 336 (long at most 2048), opencv-bilinear, windows of 224, stride 112, odd sizes: drop', 65.0, 0.1)

    ```

    Raises:
        ValueError: There is no such protocol.
    """
    known = list_protocols()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, PLAIN], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown protocol {name!r}; {hint}known are {', '.join(known)} and {PLAIN}")
    record = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    labels = _labels(record)
    if labels and len(labels) != record["classes"]:
        raise ValueError(f"protocol {name} has {record['classes']} classes, its label set {len(labels)}")
    default = record["default"]
    return Protocol(
        name=name,
        title=record["title"],
        num_classes=record["classes"],
        class_names=tuple(label.name for label in labels),
        background=record["background"],
        labels_rule=record["labels"],
        metric=record["metric"],
        source=record["source"],
        default=MethodSetup(
            method="clearclip",
            input=InputRule(**default["input"]),
            labels=labels,
            background=record["background"],
            templates=default["templates"],
            threshold=default["threshold"],
            arm_threshold=record.get("arm_threshold"),
            source=default["source"],
            notes=tuple(default["notes"]),
        ),
        methods=record["methods"],
        published=tuple(record["published"]),
        arm_threshold_source=record.get("arm_threshold_source", ""),
    )


def _labels(record: Mapping[str, Any]) -> tuple[Label, ...]:
    if "name_list" in record:
        lines = (_ASSETS / "class_names" / f"{record['name_list']}.txt").read_text(encoding="utf-8").splitlines()
        return parse_labels([Label(line, tuple(line.split(","))) for line in lines])
    return () if record["label_set"] == _FROM_DATA else load_label_set(record["label_set"])


def plain_protocol(
    name: str,
    classes: Sequence[str],
    background: int | None = None,
    labels: Sequence[Label] | None = None,
    templates: str | Sequence[str] = "imagenet80",
) -> Protocol:
    """A protocol for a data set that the literature has none for: its own classes, the model's own input.

    Args:
        name: Of the data set.
        classes: Its classes; each name is the word, unless `labels` says otherwise.
        background: Index of its background class.
        labels: Words for the classes, in the same order.
        templates: Prompt templates.

    Raises:
        ValueError: There are more or fewer labels than classes, or two classes share a name.
    """
    words = parse_labels([Label(each, (each,)) for each in classes]) if labels is None else tuple(labels)
    if len(words) != len(classes):
        raise ValueError(f"{len(words)} labels were given for the {len(classes)} classes of {name}")
    return Protocol(
        name=PLAIN,
        title=f"{name}: its own {len(classes)} classes, no protocol of the literature",
        num_classes=len(classes),
        class_names=tuple(classes),
        background=background,
        labels_rule=f"0..{len(classes) - 1} kept",
        metric="mIoU over the classes that occur in labels or predictions, all pixels of all images together, at the "
        "original resolution",
        source="classes of the data set",
        default=MethodSetup(
            method="clearclip",
            input=InputRule(),
            labels=words,
            background=background,
            templates=templates if isinstance(templates, str) else tuple(templates),
            source="defaults of the method and of the model",
        ),
    )


def backbone_of(vision_config: Any) -> str:
    """Which of the two backbones that the papers tune for is nearest: "L/14" for 24 blocks or more, else "B/16"."""
    return "L/14" if vision_config.num_hidden_layers >= 24 else "B/16"


@dataclass(frozen=True)
class LabelTable:
    """How a data set's labels become the protocol's.

    Attributes:
        values: The protocol's label of every label of the data set, and last that of its ignored pixels.
        source_ignore: The data set's label of ignored pixels.
        ignore_index: The protocol's.
        rule: What was done, in words.
        misnamed: Classes that the two name differently, "theirs / ours".
    """

    values: np.ndarray
    source_ignore: int
    ignore_index: int
    rule: str
    misnamed: tuple[str, ...] = ()

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Translate (H, W) labels, int32."""
        return self.values[np.where(labels == self.source_ignore, len(self.values) - 1, labels)]


def align_labels(protocol: Protocol, data: Any, trust_order: bool = False) -> LabelTable:
    """Say how the labels of a data set become those of a protocol; names are compared, so that no order is guessed.

    Args:
        protocol: The protocol.
        data: A `SegmentationData`.
        trust_order: Accept other names: the classes are known to be in the protocol's order.

    Raises:
        ValueError: The data set's classes are others.
    """
    protocol = protocol.for_data(data)
    names, wanted = list(data.classes), [(label.name, *label.words) for label in protocol.default.labels]
    ignore = 255 if len(wanted) <= 255 else 65535
    kept = np.arange(len(names), dtype=np.int32)
    if len(names) == len(wanted):
        values, pairs, rule = kept, list(zip(names, wanted, strict=True)), "labels kept"
    elif protocol.background is None and len(names) == len(wanted) + 1 and data.background_index in (0, None):
        values = np.where(kept == 0, ignore, kept - 1).astype(np.int32)
        pairs, rule = list(zip(names[1:], wanted, strict=True)), f"label 0 ({names[0]}) ignored, the others one down"
    elif protocol.name == "coco_object" and len(names) == 171:
        values = np.where(kept < 80, kept + 1, 0).astype(np.int32)
        pairs = list(zip(names[:80], wanted[1:], strict=True))
        return _table(protocol, data, [*values, 0], ignore, "objects 1..80, all else 0", pairs, trust_order)
    else:
        raise ValueError(_other_classes(protocol, data))
    return _table(protocol, data, [*values, ignore], ignore, rule, pairs, trust_order)


def _other_classes(protocol: Protocol, data: Any) -> str:
    return (
        f"protocol {protocol.name} has {protocol.num_classes} classes ({protocol.title}), but {data.name} has "
        f"{len(data.classes)} ({', '.join(data.classes[:4])}, ...); choose another protocol, or {PLAIN} for its own "
        "classes"
    )


def _table(
    protocol: Protocol,
    data: Any,
    values: Sequence[int],
    ignore: int,
    rule: str,
    pairs: Sequence[tuple[str, tuple[str, ...]]],
    trust_order: bool,
) -> LabelTable:
    misnamed = [f"{name} / {words[0]}" for name, words in pairs if _plain(name) not in {_plain(word) for word in words}]
    if len(misnamed) > _MISNAMED * len(pairs) and not trust_order:
        raise ValueError(
            f"{len(misnamed)} of {len(pairs)} classes of {data.name} have other names than in protocol {protocol.name} "
            f"({'; '.join(misnamed[:3])}; ...); if the order is the same nevertheless, pass --trust-order"
        )
    return LabelTable(np.array(values, dtype=np.int32), data.ignore_index, ignore, rule, tuple(misnamed))


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _words(labels: Sequence[Label]) -> dict[str, list[str]]:
    return {label.name: list(label.words) for label in labels}
