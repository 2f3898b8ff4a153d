"""Small weight files: int8 rows with half-precision scales, in safetensors.

A float matrix with rows w_i is stored as round(w_i / s_i) with s_i = max|w_i| / 127 (symmetric, one scale a row, after
Jacob et al., 2018, without zero point). The file is a quarter of the fp32 size; loading gives ordinary tensors back.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SCALE_SUFFIX = ".__scale__"
FORMAT = "arm-int8-rows-v1"
MIN_VALUES = 4096


def is_packable(tensor: Tensor) -> bool:
    """Whether `save_int8` packs a tensor: floating point, at least two dimensions, at least 4096 values."""
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() >= MIN_VALUES


def quantize_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row.

    Args:
        tensor: (R, ...) float; a row is everything behind the first index.

    Returns:
        Integers of the same shape, and (R,) scales: float16, or float32 where some row is too small for its normal
        range; rows of zeros have scale 0.
    """
    rows = tensor.detach().to("cpu", torch.float32).flatten(1)
    scale = rows.abs().amax(dim=1) / 127
    half = torch.finfo(torch.float16)
    if ((scale == 0) | ((scale >= half.tiny) & (scale <= half.max))).all():
        scale = scale.to(torch.float16)
    divisor = torch.where(scale == 0, 1, scale.float())
    # the fp16 scale may be rounded down, so the largest value may land just above 127
    integers = torch.round(rows / divisor[:, None]).clamp(-127, 127).to(torch.int8)
    return integers.reshape(tensor.shape), scale


def save_int8(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    keep_float32: tuple[str, ...] = ("logit_scale", "position_embedding.weight"),
) -> None:
    """Write a state dict with packed matrices.

    Args:
        state_dict: name -> tensor. Float tensors that are not packed are written as float16 if they survive it
            (relative error below 1e-3 of their largest value, no overflow) and as float32 otherwise; integer and
            boolean tensors are written as they are.
        path: file to write; it appears only when complete.
        metadata: further strings for the header.
        keep_float32: endings of names that are never reduced. Position tables are small, and a constant in them (which
            a LayerNorm takes away again) would eat the eight bits.

    Raises:
        ValueError: a tensor holds inf or nan, or a name ends in the reserved suffix.
    """
    path = Path(path)
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.endswith(SCALE_SUFFIX):
            raise ValueError(f"{name!r}: names must not end in {SCALE_SUFFIX!r}")
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name!r} holds inf or nan: such weights cannot be packed.")
        if not tensor.is_floating_point():
            out[name] = tensor.contiguous().clone()
        elif name.endswith(keep_float32):
            out[name] = tensor.float().contiguous().clone()
        elif is_packable(tensor):
            integers, scale = quantize_rows(tensor)
            out[name], out[name + SCALE_SUFFIX] = integers.contiguous(), scale
        else:
            half = tensor.half()
            fits = torch.isfinite(half).all() and torch.allclose(half.float(), tensor.float(), rtol=1e-3, atol=1e-6)
            out[name] = (half if fits else tensor.float()).contiguous().clone()
    header = {**(metadata or {}), "format": "pt", "packing": FORMAT}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(out, temporary, metadata=header)
        os.chmod(temporary, 0o644)  # safetensors makes it readable for its owner only
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_int8(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read what `save_int8` wrote.

    Args:
        path: the file.
        dtype: type of the floating-point tensors in the result.

    Returns:
        name -> tensor, with the names and shapes that were saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed weights at {path}")
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("packing") != FORMAT:
            raise ValueError(f"{path} is not packed as {FORMAT!r}; its header says {json.dumps(header)[:200]}")
        names = set(file.keys())
        out: dict[str, Tensor] = {}
        for name in sorted(names):
            if name.endswith(SCALE_SUFFIX):
                continue
            tensor = file.get_tensor(name)
            if name + SCALE_SUFFIX in names:
                scale = file.get_tensor(name + SCALE_SUFFIX).float()
                tensor = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
            out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return out
