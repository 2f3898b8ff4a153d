"""Load a model by name for the pipeline: an ARM checkpoint, a plain CLIP, or a CLIP of timm.

Whatever is wrong with a folder or a repository becomes one line that names it. Weights come from safetensors alone, and
a checkpoint that lacks some of them is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_pipeline(
    model: str,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Return the `open-vocab-segmentation` pipeline.

    Args:
        model: The embedded model's name, a folder, or a hub id; an ARM checkpoint, a plain CLIP, or a CLIP of timm
            (`timm/vit_base_patch16_clip_224.openai`).
        revision: Branch, tag or commit of a hub id.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; `None` takes an accelerator if there is one, and of several GPUs
            the one of this process under torchrun or accelerate launch.
        dtype: One of `DTYPES`; `"auto"` takes what the checkpoint was saved in. All published numbers of the methods
            were made in half precision, the reference numbers of our tests in float32.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ValueError: If the dtype is unknown, or the model cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    from transformers import pipeline

    from arm_hf import resolve_model
    from arm_hf.timm_towers import is_open_clip

    local_rank = os.environ.get("LOCAL_RANK")
    if device is None and local_rank is not None and torch.cuda.is_available():
        device = f"cuda:{int(local_rank) % torch.cuda.device_count()}"
    with model_errors(model):
        source = resolve_model(model)
        if is_open_clip(source):
            return pipeline("open-vocab-segmentation", device=device, **_open_clip_parts(source, revision, dtype))
        _check_folder(source)
        if trust_remote_code:  # the model's own classes: transformers alone knows which
            return pipeline(
                "open-vocab-segmentation",
                model=source,
                revision=revision,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
        return pipeline("open-vocab-segmentation", device=device, **_parts(source, revision, dtype))


@contextmanager
def model_errors(name: str, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what reading a model raises into one line that names it.

    A damaged file makes the libraries raise nearly every kind of exception; each means the same to the user.

    Args:
        name: Of the model.
        passed: Exceptions that are clear as they are.

    Raises:
        ValueError: Something else was raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, *passed)):
            raise
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError | ValueError | RuntimeError | ImportError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"cannot load the model {name!r}: {reason}") from error


def _parts(source: str, revision: str | None, dtype: str) -> dict[str, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    from arm_hf.modeling.modeling_arm import ARMModel, load_clip

    hub = {"revision": revision or "main"}
    # Not left out: transformers would ask at the terminal whether to run the folder's code.
    kind = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub).model_type
    if kind not in ("arm", "clip"):
        raise ValueError(f"it is a model of type {kind!r}; what segments is an ARM checkpoint or a CLIP")
    # The small files first: what is wrong with them shows before the weights are read.
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub),
        "image_processor": AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **hub),
    }
    model = (ARMModel.from_pretrained if kind == "arm" else load_clip)(source, dtype=dtype, **hub)
    return {"model": model.eval(), **parts}


def _open_clip_parts(source: str, revision: str | None, dtype: str) -> dict[str, Any]:
    from arm_hf.timm_towers import load_open_clip

    clip, tokenizer, processor = load_open_clip(source, revision)
    clip = clip if dtype == "auto" else clip.to(getattr(torch, dtype))
    return {"model": clip, "tokenizer": tokenizer, "image_processor": processor}


def _check_folder(source: str) -> None:
    """Say what is wrong with the config of a folder before the libraries guess."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError("the folder holds no config.json, so it is no model folder")
    try:
        record = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its config.json is no JSON ({error}); download or save it again") from error
    if not isinstance(record, dict) or not isinstance(record.get("model_type"), str):
        raise ValueError("its config.json does not say what it is: model_type is missing")
