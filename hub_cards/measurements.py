"""What was measured of a model, read from the results that the package writes, for a card's table and its metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SETS: Mapping[str, tuple[str, str]] = {
    "voc20": ("Pascal VOC, 20 classes (balanced list)", "nateraw/pascal-voc-2012"),
    "voc21": ("Pascal VOC, with background", "nateraw/pascal-voc-2012"),
    "voc21_balanced": ("Pascal VOC, with background (balanced list)", "nateraw/pascal-voc-2012"),
    "coco_object": ("COCO-Object, with background", "GATE-engine/COCOStuff164K"),
    "coco_stuff171": ("COCO-Stuff 171", "GATE-engine/COCOStuff164K"),
    "msrc21": ("MSRC-21", "msrc21"),
    "camvid": ("CamVid", "camvid"),
    "ade150": ("ADE20K-150", "1aurent/ADE20K"),
    "cityscapes19": ("Cityscapes, 19 classes", "Chris1/cityscapes"),
    "context59": ("Pascal Context, 59 classes", "inpaint-context/pascal-context"),
    "context60": ("Pascal Context, with background", "inpaint-context/pascal-context"),
}
"""Key of a set in results -> its name in words, and the Hub's copy of it (or the key where there is none)."""


@dataclass(frozen=True)
class Measurement:
    """One method on one list of photos, alone and with ARM. Figures are percentages; None was not measured.

    Attributes:
        key: Set or protocol.
        title: The set in words.
        dataset: Hub id of the set, or its key.
        images, classes_present: What the figures were taken over.
        method: Training-free method.
        alone, with_arm: mIoU.
        accuracy_alone, accuracy_with_arm: Share of pixels that are right.
        seen: What the network saw, in words.
        paper_alone, paper_with_arm: Figures of publications, each with `miou`, `source` and `backbone`.
    """

    key: str
    title: str
    dataset: str
    images: int
    classes_present: int
    method: str
    alone: float | None = None
    with_arm: float | None = None
    accuracy_alone: float | None = None
    accuracy_with_arm: float | None = None
    seen: str = ""
    paper_alone: Sequence[Mapping[str, Any]] = field(default=())
    paper_with_arm: Sequence[Mapping[str, Any]] = field(default=())


def read_measurements(records: Iterable[Mapping[str, Any]], method: str) -> list[Measurement]:
    """The measurements of several results files.

    Args:
        records: Contents of `results.json` of `arm-hf evaluate`, or of `training/pretrain_mini.py --results`.
        method: The model's own method, for results that do not name one.

    Raises:
        ValueError: A record is neither.
    """
    found: list[Measurement] = []
    for record in records:
        if "sets" in record:
            found += _of_own_lists(record, method)
        elif "results" in record and "protocol" in record:
            found += _of_evaluation(record)
        else:
            raise ValueError(
                "these are no results: expected the JSON of `arm-hf evaluate` (results, protocol) or of the mini "
                f"recipe (sets), got the keys {', '.join(sorted(record)[:5]) or 'of an empty object'}"
            )
    return found


def _of_own_lists(record: Mapping[str, Any], method: str) -> list[Measurement]:
    seen = f"shorter side {record['shortest_edge']}, whole image" if "shortest_edge" in record else ""
    found = []
    for key, variants in record["sets"].items():
        title, dataset = SETS.get(key, (key, key))
        alone, refined = variants.get("without_arm") or {}, variants.get("with_arm") or {}
        facts = refined or alone
        found.append(
            Measurement(
                key,
                title,
                dataset,
                facts["images"],
                facts["classes_present"],
                method,
                alone.get("miou"),
                refined.get("miou"),
                alone.get("pixel_accuracy"),
                refined.get("pixel_accuracy"),
                seen,
            )
        )
    return found


def _of_evaluation(record: Mapping[str, Any]) -> list[Measurement]:
    protocol, data = record["protocol"], record["data"]
    rows: dict[tuple, dict[bool, Mapping[str, Any]]] = {}
    for row in record["results"]:
        rows.setdefault((row["method"], row["pamr"]), {})[row["arm"]] = row
    found = []
    for (method, pamr), variants in rows.items():
        alone, refined = variants.get(False, {}), variants.get(True, {})
        facts = refined or alone
        _, dataset = SETS.get(protocol["name"], ("", data["name"]))
        found.append(
            Measurement(
                protocol["name"],
                f"{data['name']} ({data['split']}), protocol {protocol['name']}",
                dataset,
                data["images"],
                facts["classes_in_labels"],
                method + (f" + PAMR {pamr}" if pamr else ""),
                alone.get("mean_iou"),
                refined.get("mean_iou"),
                alone.get("overall_accuracy"),
                refined.get("overall_accuracy"),
                _seen(protocol, method),
                alone.get("published", ()),
                refined.get("published", ()),
            )
        )
    return found


def _seen(protocol: Mapping[str, Any], method: str) -> str:
    rule = protocol.get("methods", {}).get(method, {}).get("input")
    if not rule:
        return ""
    side = "the model's size" if rule["short_side"] is None else f"shorter side {rule['short_side']}"
    window = "whole image" if rule["window"] is None else f"windows of {rule['window']}, stride {rule['stride']}"
    return f"{side}, {window}"
