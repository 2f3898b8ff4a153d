"""What segmentations are measured by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mean_iou.confusion_matrix import ConfusionMatrix

if TYPE_CHECKING:
    import evaluate

__all__ = ["ConfusionMatrix", "list_metrics", "load"]

_FOLDER = Path(__file__).parent


def list_metrics() -> list[str]:
    """The names that `load` knows."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name)


def load(name: str, **options: Any) -> evaluate.EvaluationModule:
    """Load a metric of this package; `evaluate.load` does the same with the path of its folder.

    Args:
        name: One of `list_metrics()`.
        options: Those of `evaluate.load`, and the metric's own.

    Raises:
        ValueError: There is no such metric.
    """
    import evaluate

    if name not in list_metrics():
        raise ValueError(f"unknown metric {name!r}; known are {', '.join(list_metrics())}")
    return evaluate.load(str(_FOLDER / name), **options)
