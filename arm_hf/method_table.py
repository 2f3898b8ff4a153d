"""The registered methods as plain records, for the command line and the documentation."""

from __future__ import annotations

import dataclasses
from typing import Any

from arm_hf.modeling.dense_clip import get_method
from arm_hf.modeling.method import list_methods


def describe_methods() -> list[dict[str, Any]]:
    """Return one record for each method: name, summary, paper, reference, cost, variants, and settings with help."""
    records = []
    for name in list_methods():
        method = get_method(name)
        settings = [
            {"name": field.name, "default": field.default, "help": field.metadata.get("help", "")}
            for field in dataclasses.fields(method.settings_class)
        ]
        facts = {key: getattr(method, key) for key in ("name", "summary", "paper", "reference", "cost")}
        records.append({**facts, "variants": dict(method.variants), "settings": settings})
    return records
