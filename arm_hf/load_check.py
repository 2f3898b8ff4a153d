"""Load a folder as a stranger would, in fresh processes: with this package, and with the folder's own code alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import arm_hf

LABELS = "cat, grass, sky=blue sky|clouds"
TIMEOUT = 1800  # seconds; a large model on a slow disk
_MARK = "arm_hf load check: "

# The absence of arm_hf is enforced, not hoped for: this machine has it.
_BLOCK = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "arm_hf":
            raise ModuleNotFoundError("No module named 'arm_hf'", name="arm_hf")
sys.meta_path.insert(0, Absent())
"""
_PROBE = """
import json, sys
{before}
import numpy as np
from PIL import Image
from transformers import pipeline

pipe = pipeline("open-vocab-segmentation", model={folder!r}, device="cpu", **{loading!r})
pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
image = Image.fromarray(pixels).resize((96, 72))
result = pipe(image, candidate_labels={labels!r}, semantic=True, **{options!r})
print({mark!r} + json.dumps({{
    "module": type(pipe.model).__module__.partition(".")[0],
    "labels": result["semantic_map"].tolist(),
    "confidence": float(result["confidence"].sum()),
}}))
"""


@dataclass(frozen=True)
class Loaded:
    """What a fresh process found: where the classes came from, the label map, and the sum of the confidences."""

    module: str
    labels: np.ndarray
    confidence: float

    def agrees(self, other: Loaded) -> bool:
        """Whether two results are the same but for rounding: 99.9 % of the pixels, confidences to 1e-3."""
        same = float((self.labels == other.labels).mean())
        return same >= 0.999 and abs(self.confidence - other.confidence) <= 1e-3 * abs(other.confidence)


def probe_options(model: Any) -> dict[str, Any]:
    """Arguments of the call that shows whether a model works: small, and without other models."""
    from arm_hf.modeling.proxy_methods import PROXY_METHODS

    vision = model.config.clip_config.vision_config
    options: dict[str, Any] = {"templates": "single", "size": 6 * vision.patch_size}
    if model.config.method in PROXY_METHODS:  # these read other models' features
        options["method"] = "clearclip"
    return options


def probe(pipe: Any) -> Loaded:
    """The same result from a pipeline of this process."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 72))
    result = pipe(image, candidate_labels=LABELS, semantic=True, **probe_options(pipe.model))
    module = type(pipe.model).__module__.partition(".")[0]
    return Loaded(module, np.asarray(result["semantic_map"]), float(result["confidence"].sum()))


def check_folder(folder: Path, model: Any) -> Loaded:
    """Load a folder in two fresh processes, offline, and compare what they find.

    Args:
        folder: A model folder with the code beside its weights.
        model: The model it was made from; says which call is made.

    Returns:
        What both found.

    Raises:
        ValueError: One of them cannot load the folder, runs the wrong code, or the two differ.
    """
    with tempfile.TemporaryDirectory(prefix="arm-hf-") as temporary:
        started = [_start(folder, model, package, Path(temporary)) for package in (True, False)]
        try:
            with_package, alone = (
                _finish(process, package) for process, package in zip(started, (True, False), strict=True)
            )
        finally:  # an interrupt leaves no process behind
            for process in started:
                process.kill()
                process.wait()
    if not with_package.agrees(alone):
        raise ValueError(
            f"the folder gives other labels with arm_hf than with its own code: {_difference(with_package, alone)}"
        )
    return alone


def _start(folder: Path, model: Any, package: bool, temporary: Path) -> subprocess.Popen:
    code = _PROBE.format(
        before="import arm_hf" if package else _BLOCK,
        folder=str(folder),
        loading={} if package else {"trust_remote_code": True},
        labels=LABELS,
        options=probe_options(model),
        mark=_MARK,
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HF_HUB_OFFLINE": "1",  # the CLIP of a lean checkpoint is in the cache: this process has just read it
        "HF_MODULES_CACHE": str(temporary / f"modules-{package}"),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if package:
        environment["PYTHONPATH"] = str(Path(arm_hf.__file__).resolve().parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=temporary,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen, package: bool) -> Loaded:
    way = "with arm_hf" if package else "with trust_remote_code and no arm_hf"
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the built folder did not load {way} within {TIMEOUT} s") from None
    line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    if process.returncode != 0 or line is None:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the built folder does not load {way}: {last}")
    record = json.loads(line.removeprefix(_MARK))
    expected = "arm_hf" if package else "transformers_modules"
    if record["module"] != expected:
        raise ValueError(f"{way} the model's class came from {record['module']!r} instead of {expected!r}")
    return Loaded(record["module"], np.array(record["labels"]), record["confidence"])


def _difference(one: Loaded, other: Loaded) -> str:
    share = 100 * float((one.labels == other.labels).mean())
    return f"{share:.1f} % of the pixels agree, confidences {one.confidence:.4f} and {other.confidence:.4f}"
