"""Small helpers shared by the stages that train ``arm-clip-mini``: seeds, atomic files, progress lines."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("pretrain_mini")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch.

    Args:
        seed: any non-negative integer.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_atomic(obj: Any, path: str | Path) -> None:
    """Write `obj` with ``torch.save`` under a temporary name, then rename, so that a crash never leaves half a file.

    Args:
        obj: tensors, numbers and containers of them.
        path: the final file name; missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save(obj, temporary)
    os.replace(temporary, path)


def load_tensors(path: str | Path) -> Any:
    """Read what `save_atomic` wrote (tensors and plain containers only)."""
    return torch.load(path, map_location="cpu", weights_only=True)


def write_json(obj: Any, path: str | Path) -> None:
    """Write `obj` as indented JSON, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(obj, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def cosine_factor(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`.

    Args:
        step: number of the step about to be done, from 0.
        total: number of steps of the whole stage.
        warmup: steps of linear increase.
        floor: factor that is reached at the end.

    Returns:
        A number in (0, 1].
    """
    if step < warmup:
        return (step + 1) / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + float(np.cos(np.pi * min(1.0, done))))


class RateMeter:
    """Average of the losses and of the speed between two printed lines."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.count = 0
        self.start = time.time()

    def add(self, **values: float) -> None:
        """Add the numbers of one step."""
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0.0) + float(value)
        self.count += 1

    def flush(self) -> dict[str, float]:
        """Return the averages and the seconds per step since the last call, and start again."""
        out = {key: value / max(1, self.count) for key, value in self.values.items()}
        out["s/step"] = (time.time() - self.start) / max(1, self.count)
        self.values, self.count, self.start = {}, 0, time.time()
        return out
