"""Export to ONNX and torch.export: the image tower with ARM on one side, the text tower on the other.

The image graph takes pixels of whole patches and class embeddings and gives the maps of every class, with free batch,
height, width and number of classes. The text graph takes token ids and gives one embedding for each prompt. Words are
encoded once; `onnx_runner.py`, which is put beside the graphs, does the rest without torch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arm_hf import onnx_runner
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.trunk import VisionTower

FORMATS = ("onnx", "torch")
TOLERANCE = 1e-4
OPSET = 18


@dataclass(frozen=True)
class Exported:
    """What was written: name of the file, its size in bytes, and its greatest difference to torch (absolute)."""

    path: Path
    num_bytes: int
    difference: float | None


class TraceableTower(VisionTower):
    """The image tower for tracing.

    The size of the position table may stay open, as it is resized by products with weight matrices; the temperature is
    a number from the start.
    """

    def __init__(self, clip: Any):
        super().__init__(clip)
        self._scale = super().logit_scale

    @property
    def logit_scale(self) -> float:
        return self._scale

    def position_table(self, grid: tuple[int, int], rule: str = "reference") -> Tensor:
        table = self.embeddings.position_embedding.weight
        height, width = grid
        side = int((table.shape[0] - 1) ** 0.5)
        if rule == "antialias":
            raise ValueError(
                "the position rule 'antialias' cannot be exported; set the method option position_rule to 'bilinear' "
                "or 'transformers'"
            )
        scales = [(length + 0.1) / side if rule == "reference" else length / side for length in grid]
        rows, columns = (
            _resize_matrix(length, side, scale, cubic=rule != "bilinear", device=table.device)
            for length, scale in zip(grid, scales, strict=True)
        )
        patches = table[1:].unflatten(0, (side, side)).float()  # (g, g, W)
        resized = torch.einsum("hg,gkw,lk->hlw", rows, patches, columns).flatten(0, 1)  # (h*w, W)
        if rule == "reference":
            # The table as it is where the number of patches equals its own, whatever the grid's shape.
            count = torch.arange(height * width, device=table.device)
            same = (torch.ones_like(count).sum() == side * side).long()
            resized = torch.cat([resized, patches.flatten(0, 1)])[count + same * (height * width)]
        return torch.cat([table[:1], resized.to(table.dtype)])  # (1 + h*w, W)


def _resize_matrix(length: Any, side: int, scale: Any, cubic: bool, device: torch.device) -> Tensor:
    """Weights of `F.interpolate` along one axis with coordinates from `scale`, (length, side)."""
    places = (torch.arange(length, device=device) + 0.5) / scale - 0.5
    if not cubic:
        places = places.clamp(min=0)
    first = places.floor()
    share = (places - first)[:, None]  # (length, 1)
    if cubic:
        offsets = torch.arange(-1, 3, device=device)
        distance = (share - offsets).abs()
        # Keys' cubic convolution with a = -0.75, as torch has it.
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weights = torch.where(distance <= 1, near, far)
    else:
        offsets = torch.arange(0, 2, device=device)
        weights = torch.cat([1 - share, share], dim=1)
    taps = (first.long()[:, None] + offsets).clamp(0, side - 1)  # (length, taps), border repeated
    return (F.one_hot(taps, side).to(weights.dtype) * weights[..., None]).sum(dim=1)


class ImageGraph(nn.Module):
    """Pixels of whole patches and class embeddings to the maps of every class, (B, Q, H', W').

    Args:
        model: An `ARMModel`, or a `CLIPModel` whose method then runs alone.
        method: Training-free method; by default the model's, or "clearclip".
        method_options: Its settings.
        use_arm: Whether ARM refines the map, where the model has one.
    """

    def __init__(
        self,
        model: Any,
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
        use_arm: bool = True,
    ):
        super().__init__()
        self.model = model
        has_arm = hasattr(model, "arm")
        self.use_arm = use_arm and has_arm
        clip = model.clip if has_arm else model
        if method is None:
            method = model.config.method if has_arm else "clearclip"
            method_options = {**(model.config.method_options if has_arm else {}), **(method_options or {})}
        self.method, self.method_options = method, dict(method_options or {})
        self.dense = DenseCLIP(clip, model.config.odd_sizes if has_arm else "pad")
        self.dense.tower = TraceableTower(clip)
        if has_arm:
            # A copy that shares all weights and looks at the tower through the traceable view.
            self.model = copy.copy(model)
            view = self.dense
            self.model.__class__ = type(type(model).__name__, (type(model),), {"dense": property(lambda _: view)})
        self.activation, self.scale = self._reading()

    def _reading(self) -> tuple[str, float]:
        """Activation and factor that turn the upsampled maps into probabilities."""
        size = self.dense.tower.patch_size * 2
        words = torch.eye(2, self.dense.tower.projection.out_features, device=self.device)
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, size, size, device=self.device), words)
        if maps.gate is not None:
            raise ValueError(
                f"the background rule of {self.method!r} cannot be exported; set its background_threshold to none"
            )
        return maps.activation, float(maps.scale)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.dense.tower.projection.weight.device

    def _maps(self, pixel_values: Tensor, class_embeddings: Tensor) -> Any:
        if hasattr(self.model, "arm"):
            return self.model.query_maps(pixel_values, class_embeddings, self.method, self.method_options, self.use_arm)
        return self.dense.query_maps(pixel_values, class_embeddings, self.method, self.method_options)

    def forward(self, pixel_values: Tensor, class_embeddings: Tensor) -> Tensor:
        return self._maps(pixel_values, class_embeddings).chunk()


class TextGraph(nn.Module):
    """Token ids (N, T) with their attention mask to L2-normalised prompt embeddings (N, D)."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = self.clip.get_text_features(input_ids, attention_mask=attention_mask).pooler_output
        return F.normalize(features, dim=-1)


def image_sample(graph: ImageGraph, batch: int = 2, grid: tuple[int, int] = (3, 5), classes: int = 4) -> tuple:
    """Random pixels and class embeddings of a size, the same in every call.

    Args:
        graph: What the sample is for.
        batch: B.
        grid: Patches per column and row.
        classes: Q.
    """
    generator = torch.Generator().manual_seed(0)
    side = graph.dense.tower.patch_size
    pixels = torch.randn(batch, 3, grid[0] * side, grid[1] * side, generator=generator)
    words = torch.randn(classes, graph.dense.tower.projection.out_features, generator=generator)
    dtype = graph.dense.tower.projection.weight.dtype
    return pixels.to(graph.device, dtype), F.normalize(words, dim=-1).to(graph.device, dtype)


def text_sample(clip: Any, prompts: int = 3, tokens: int = 7) -> tuple[Tensor, Tensor]:
    """Token ids and mask of prompts of different lengths, the same in every call.

    Args:
        clip: Whose tokens are used.
        prompts: How many.
        tokens: Length of the longest.
    """
    config = clip.config.text_config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.eos_token_id, (prompts, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(prompts):
        end = tokens - 1 - row % 3
        ids[row, end:], mask[row, end + 1 :] = config.eos_token_id, 0
    return ids, mask


def image_shapes(graph: ImageGraph) -> dict[str, dict[int, Any]]:
    """What stays open in the image graph: batch, height and width in whole patches (at least two), classes."""
    side = graph.dense.tower.patch_size
    return {
        "pixel_values": {
            0: torch.export.Dim("batch", min=1, max=4096),
            2: side * torch.export.Dim("rows", min=2, max=4096 // side),
            3: side * torch.export.Dim("columns", min=2, max=4096 // side),
        },
        "class_embeddings": {0: torch.export.Dim("classes", min=1, max=65535)},
    }


def text_shapes(clip: Any) -> dict[str, dict[int, Any]]:
    """What stays open in the text graph: number of prompts and their length."""
    tokens = torch.export.Dim("tokens", min=2, max=clip.config.text_config.max_position_embeddings)
    prompts = torch.export.Dim("prompts", min=1, max=65535)
    return {"input_ids": {0: prompts, 1: tokens}, "attention_mask": {0: prompts, 1: tokens}}


def export_onnx(pipe: Any, out: Path, graph: ImageGraph, templates: tuple[str, ...]) -> list[Exported]:
    """Write `image.onnx`, `text.onnx`, `tokenizer.json`, `export.json` and `run.py`, and compare the graphs with torch.

    Args:
        pipe: An `open-vocab-segmentation` pipeline, in float32 on the CPU.
        out: The folder, which exists.
        graph: The image tower of its model.
        templates: Sentences that the runner puts words into.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is missing.
        ValueError: If a graph differs from torch by more than `TOLERANCE`.
    """
    require_onnx()
    clip = pipe.text_encoder.clip
    shutil.copyfile(onnx_runner.__file__, out / "run.py")
    (out / "tokenizer.json").write_text(pipe.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    (out / onnx_runner.SETTINGS).write_text(
        json.dumps(runner_settings(pipe, graph, templates), indent=2) + "\n", encoding="utf-8"
    )
    parts = (
        (onnx_runner.IMAGE_GRAPH, graph, image_sample(graph), image_shapes(graph), "maps"),
        (onnx_runner.TEXT_GRAPH, TextGraph(clip), text_sample(clip), text_shapes(clip), "embeddings"),
    )
    written = []
    for name, module, sample, shapes, result in parts:
        program = _quietly(
            torch.onnx.export,
            module.eval(),
            sample,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(shapes),
            output_names=[result],
            opset_version=OPSET,
            verbose=False,
        )
        program.save(str(out / name), external_data=False)
        del program
        written.append(Exported(out / name, (out / name).stat().st_size, difference_to_torch(out / name, module)))
    _require_close(written)
    return written


def export_torch(out: Path, graph: ImageGraph, clip: Any) -> list[Exported]:
    """Write `image.pt2` and `text.pt2`, which `torch.export.load` reads, and compare them with the modules.

    Args:
        out: An existing folder.
        graph: Image tower with or without ARM.
        clip: Holds the text tower.
    """
    parts = (
        ("image.pt2", graph, image_sample(graph), image_shapes(graph)),
        ("text.pt2", TextGraph(clip), text_sample(clip), text_shapes(clip)),
    )
    written = []
    for name, module, sample, shapes in parts:
        with torch.no_grad():
            program = _quietly(torch.export.export, module.eval(), sample, dynamic_shapes=shapes)
            content = io.BytesIO()  # torch hides why it could not write to a file
            torch.export.save(program, content)
            (out / name).write_bytes(content.getbuffer())
            loaded = torch.export.load(out / name).module()
            difference = max(
                (loaded(*inputs) - module(*inputs)).abs().max().item() for inputs in checked_inputs(module)
            )
        written.append(Exported(out / name, (out / name).stat().st_size, difference))
    _require_close(written)
    return written


def quantise(out: Path) -> list[Exported]:
    """Write `image.int8.onnx` and `text.int8.onnx`: weights of 8 bits, activations scaled as they come."""
    require_onnx()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    written = []
    for name in (onnx_runner.IMAGE_GRAPH, onnx_runner.TEXT_GRAPH):
        path = out / onnx_runner.int8_name(name)
        model = onnx.load(out / name)
        del model.graph.value_info[:]  # shapes from before the exporter's own folding, which onnx finds contradictory
        _quietly(
            quantize_dynamic,
            model,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],  # convolutions lose more than they gain
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        written.append(Exported(path, path.stat().st_size, None))
    return written


def runner_settings(pipe: Any, graph: ImageGraph, templates: tuple[str, ...]) -> dict[str, Any]:
    """What `onnx_runner.py` must know beside the graphs.

    Args:
        pipe: Holds tokenizer and image processor.
        graph: The exported image tower.
        templates: Sentences that the words are put into.
    """
    size = pipe._processor_size(None)
    if "shortest_edge" not in size:
        raise ValueError(f"the example runner resizes by the shorter side, but the image processor has size {size}")
    if graph.dense.odd_sizes != "pad":
        raise ValueError("the example runner pads odd sizes; set odd_sizes to 'pad' in the model's config")
    processor, tokenizer = pipe.image_processor, pipe.tokenizer
    return {
        "method": graph.method,
        "method_options": graph.method_options,
        "use_arm": graph.use_arm,
        "activation": graph.activation,
        "scale": graph.scale,
        "patch_size": graph.dense.tower.patch_size,
        "shortest_edge": size["shortest_edge"],
        "longest_edge": size["longest_edge"],
        "resample": int(processor.resample),
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "templates": list(templates),
        "max_tokens": pipe.text_encoder.max_tokens,
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
    }


def checked_inputs(module: nn.Module) -> list[tuple]:
    """Inputs of other sizes than the one that was traced."""
    if isinstance(module, ImageGraph):
        sizes: tuple[Any, ...] = ((1, (2, 3), 1), (3, (4, 3), 7), (1, (7, 7), 2))
        side = int((module.dense.tower.embeddings.position_embedding.weight.shape[0] - 1) ** 0.5)
        return [image_sample(module, *size) for size in (*sizes, (1, (side, side), 3))]
    assert isinstance(module, TextGraph)
    longest = module.clip.config.text_config.max_position_embeddings
    return [text_sample(module.clip, *size) for size in ((1, 3), (5, min(16, longest)), (2, longest))]


def difference_to_torch(path: Path, module: nn.Module) -> float:
    """Greatest absolute difference between a graph in onnxruntime and its module, over inputs of several sizes.

    Args:
        path: The graph.
        module: What it was made from.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    greatest = 0.0
    for inputs in checked_inputs(module):
        with torch.no_grad():
            expected = module(*inputs).numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        if found.shape != expected.shape:
            raise ValueError(f"{path} gives {found.shape} where torch gives {expected.shape}")
        greatest = max(greatest, float(np.abs(found - expected).max()))
    return greatest


def require_onnx() -> None:
    """Raise ImportError, with the way out, where a package for ONNX is missing."""
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX needs {", ".join(missing)}: run "pip install arm-hf[onnx]"')


def _require_close(written: list[Exported]) -> None:
    for exported in written:
        if exported.difference is not None and not exported.difference <= TOLERANCE:
            raise ValueError(
                f"{exported.path.name} differs from torch by {exported.difference:.2g}, more than {TOLERANCE:g}; it "
                "must not be used"
            )


def _quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call without the exporters' notes on their own code."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return function(*arguments, **options)
    finally:
        logging.disable(logging.NOTSET)
