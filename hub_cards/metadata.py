"""The YAML block at the head of a card, which the Hub reads: library, task, base model, data sets, measured mIoU."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_hf.hub_cards.measurements import Measurement

TAGS = ("open-vocabulary-segmentation", "semantic-segmentation", "clip", "arm")
PIPELINE_TAG = "image-segmentation"  # the Hub's list of tasks has none for open vocabularies
LIBRARY = "transformers"


def is_hub_id(name: str | None) -> bool:
    """Whether a name is an id of the Hub (`organisation/name`) and no folder of this machine."""
    if name is None or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return False
    return not Path(name).exists()


@dataclass(frozen=True)
class CardFacts:
    """What the files of a model do not say about it.

    Attributes:
        license: Identifier of the Hub's list, of the weights.
        datasets: Hub ids of the training data, or of the Hub's copies of it.
        base_model: Hub id of the CLIP, None for towers of our own.
        language: ISO 639 code of the words it knows.
        tags: Further tags.
    """

    license: str = "apache-2.0"
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    language: str = "en"
    tags: tuple[str, ...] = ()


def front_matter(name: str, facts: CardFacts, measurements: Sequence[Measurement]) -> str:
    """The metadata block with its `---` lines; keys without a value are left out.

    Args:
        name: Of the model.
        facts: What the card says of it.
        measurements: What was measured, if anything.
    """
    from huggingface_hub import ModelCardData

    results = [result for row in measurements for result in _results(row)]
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *facts.tags],
        **({"base_model": facts.base_model, "base_model_relation": "adapter"} if facts.base_model else {}),
        **({"datasets": list(facts.datasets)} if facts.datasets else {}),
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n"


def _results(row: Measurement) -> list[Any]:
    from huggingface_hub import EvalResult

    common = {
        "task_type": PIPELINE_TAG,
        "dataset_type": row.dataset,
        "dataset_name": f"{row.title}, {row.images} photos",
        "dataset_config": re.sub(r"\W+", "_", row.key),
        "dataset_args": {
            "photos": row.images,
            "classes_present": row.classes_present,
            **({"input": row.seen} if row.seen else {}),
        },
        "metric_type": "mean_iou",
    }
    figures = {f"mIoU (%) of {row.method} with ARM": row.with_arm, f"mIoU (%) of {row.method} alone": row.alone}
    return [
        EvalResult(**common, metric_name=name, metric_value=value)
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    ]
