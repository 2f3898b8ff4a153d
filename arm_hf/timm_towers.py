"""CLIPs that come as timm image towers or as open_clip checkpoints, as a transformers `CLIPModel`.

The weights of open_clip are those of transformers under other names, with q, k and v in one matrix and the projections
transposed. What the names do not say is the activation: OpenAI's, MetaCLIP's and most DFN weights need QuickGELU, and
run without an error, and worse, with GELU. Here it is taken from the checkpoint's own config, or from timm's note on
the weights, never from the default of an architecture.

Only safetensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"


class BlockNames(NamedTuple):
    """What a checkpoint calls the parts of a block; `parts` in the order of `LAYER_PARTS`."""

    qkv_weight: str
    qkv_bias: str
    parts: tuple[str, ...]


LAYER_PARTS = ("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
OPEN_CLIP_BLOCK = BlockNames(
    "attn.in_proj_weight", "attn.in_proj_bias", ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
)
TIMM_BLOCK = BlockNames("attn.qkv.weight", "attn.qkv.bias", ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"))

_VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"}


def load_open_clip(model_id: str, revision: str | None = None) -> tuple[CLIPModel, Any, Any]:
    """A CLIP from a repository with open_clip weights, such as `timm/vit_base_patch16_clip_224.openai`.

    Example:

    ```python
    clip, tokenizer, image_processor = load_open_clip("timm/vit_base_patch16_clip_224.openai")
    model = ARMModel.from_clip(clip)
    pipe = OpenVocabSegmentationPipeline(model=clip, tokenizer=tokenizer, image_processor=image_processor)
    ```

    Args:
        model_id: Hub id or folder; `_clip_quickgelu_` names of timm mean the repository without it.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model in evaluation mode, its tokenizer, and an image processor for dense prediction (no crop).

    Raises:
        OSError: The repository or its weights as safetensors cannot be found.
        ValueError: It is no plain ViT CLIP, or the weights do not fit its config.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPImageProcessor
    from transformers.utils import cached_file

    model_id = model_id.replace("_clip_quickgelu_", "_clip_")
    try:
        config_file = cached_file(model_id, CONFIG_NAME, revision=revision)
        weights_file = cached_file(model_id, WEIGHTS_NAME, revision=revision)
    except OSError as error:
        raise OSError(
            f"{model_id} has no {CONFIG_NAME} and {WEIGHTS_NAME} within reach, so its text side is unknown; take the "
            f"CLIP in the format of transformers, or its image tower alone with `vision_from_timm` ({error})"
        ) from error
    with open(config_file, encoding="utf-8") as file:
        record = json.load(file)
    config = config_from_open_clip(record["model_cfg"])
    clip = clip_from_open_clip(load_file(weights_file), config)
    look = record.get("preprocess_cfg", {})
    side = config.vision_config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        do_center_crop=False,
        **{f"image_{name}": look[name] for name in ("mean", "std") if name in look},
    )
    tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=False)
    return clip, tokenizer, processor


def is_open_clip(name: str) -> bool:
    """Whether a model is read by `load_open_clip`: a repository of timm, or a folder with open_clip's config."""
    return name.startswith("timm/") or (Path(name).expanduser() / CONFIG_NAME).is_file()


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """The `CLIPConfig` of open_clip's `model_cfg`.

    Raises:
        ValueError: The config asks for something that transformers' CLIP is not.
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    unknown = {
        *(set(model_cfg) - _MODEL_KEYS),
        *(f"vision_cfg.{key}" for key in set(vision) - _VISION_KEYS),
        *(f"text_cfg.{key}" for key in set(text) - _TEXT_KEYS),
    }
    if unknown or not isinstance(vision["layers"], int):
        what = ", ".join(sorted(unknown)) or f"vision_cfg.layers = {vision['layers']}"
        raise ValueError(f"only plain ViT CLIPs can be read; this config has {what}")
    hidden_act = "quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu"
    shared = {"hidden_act": hidden_act, "projection_dim": model_cfg["embed_dim"]}
    end = text["vocab_size"] - 1
    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config={
            **shared,
            "hidden_size": vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config={
            **shared,
            "hidden_size": text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    )


def clip_from_open_clip(state: Mapping[str, Tensor], config: CLIPConfig) -> CLIPModel:
    """A `CLIPModel` with the weights of an open_clip state dict (or of OpenAI's own, which has the same names).

    Args:
        state: Weights by name.
        config: Of the CLIP that has this shape.

    Raises:
        ValueError: A weight is missing, left over, or of another shape.
    """
    state = {key.removeprefix("text."): value for key, value in state.items() if not key.endswith("attn_mask")}
    try:
        out = _from_open_clip(state, config)
    except KeyError as error:
        raise ValueError(f"the checkpoint has no weight {error}; it is no open_clip CLIP of this depth") from error
    if len(out) != len(state) + 4 * _num_blocks(config):
        raise ValueError(f"{len(state)} weights in the checkpoint do not fit the config's CLIP")
    return _filled(CLIPModel, config, out)


def _from_open_clip(state: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    out = {"logit_scale": state["logit_scale"].reshape(())}
    vision = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    out |= {
        "vision_model.embeddings.class_embedding": vision["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": vision["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": vision["positional_embedding"],
        "visual_projection.weight": vision["proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        # A matrix that is multiplied from the right, or the weight of a Linear.
        "text_projection.weight": state["text_projection"].T
        if "text_projection" in state
        else state["text_projection.weight"],
    }
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        out |= _renamed(vision, theirs, f"vision_model.{ours}")
    out |= _renamed(state, "ln_final", "text_model.final_layer_norm")
    for tower, source, depth in (
        ("vision_model", vision, config.vision_config.num_hidden_layers),
        ("text_model", state, config.text_config.num_hidden_layers),
    ):
        out |= _renamed_blocks(source, "transformer.resblocks", OPEN_CLIP_BLOCK, tower, depth)
    return out


def vision_from_timm(tower: nn.Module) -> CLIPVisionModelWithProjection:
    """The image side of a CLIP from a timm `VisionTransformer` of the CLIP kind (`timm.create_model("vit_*_clip_*")`).

    The activation is QuickGELU if the tower has it, or if timm's note on its weights says "natively QuickGELU": then
    the result differs from timm's own output for the plain `_clip_` name, and is what the weights were trained for.

    Raises:
        ValueError: The tower is no CLIP image tower.
    """
    state = tower.state_dict()
    if not {"norm_pre.weight", "cls_token", "head.weight"} <= set(state) or "fc_norm.weight" in state:
        raise ValueError(f"expected a CLIP image tower of timm (pre-norm, class token, head), got {_name(tower)}")
    if state.get("head.bias") is not None and state["head.bias"].abs().max() > 0:
        raise ValueError(f"the head of {_name(tower)} has a bias: it is a classifier, not CLIP's projection")
    embed: Any = tower.patch_embed
    blocks: Any = tower.blocks
    size, patch = embed.img_size, embed.patch_size
    if size[0] != size[1] or patch[0] != patch[1]:
        raise ValueError(f"only square images and patches can be read, got {size} and {patch}")
    config = CLIPVisionConfig(
        hidden_size=state["cls_token"].shape[-1],
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        intermediate_size=blocks[0].mlp.fc1.out_features,
        hidden_act=_activation(tower),
        image_size=size[0],
        patch_size=patch[0],
        projection_dim=state["head.weight"].shape[0],
        layer_norm_eps=blocks[0].norm1.eps,
    )
    out = {
        "vision_model.embeddings.class_embedding": state["cls_token"][0, 0],
        "vision_model.embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "vision_model.embeddings.position_embedding.weight": state["pos_embed"][0],
        "visual_projection.weight": state["head.weight"],
        **_renamed(state, "norm_pre", "vision_model.pre_layrnorm"),
        **_renamed(state, "norm", "vision_model.post_layernorm"),
    }
    out |= _renamed_blocks(state, "blocks", TIMM_BLOCK, "vision_model", len(blocks))
    return _filled(CLIPVisionModelWithProjection, config, out)


def join_towers(vision: CLIPVisionModelWithProjection, text: CLIPModel) -> CLIPModel:
    """A CLIP of one model's image side and another's words; both must come from one training, or share its space.

    Args:
        vision: The image side, for example of `vision_from_timm`.
        text: A CLIP whose text side, text projection and temperature are taken.

    Raises:
        ValueError: The two project to different widths.
    """
    if vision.config.projection_dim != text.config.projection_dim:
        raise ValueError(
            f"the image side projects to {vision.config.projection_dim} numbers, the text side to "
            f"{text.config.projection_dim}: they belong to different CLIPs"
        )
    config = CLIPConfig(
        projection_dim=text.config.projection_dim,
        vision_config=vision.config.to_dict(),
        text_config=text.config.text_config.to_dict(),
    )
    out = {key: value for key, value in text.state_dict().items() if not key.startswith("vis")}
    return _filled(CLIPModel, config, {**out, **vision.state_dict()})


def _activation(tower: nn.Module) -> str:
    blocks: Any = tower.blocks
    activation = blocks[0].mlp.act
    cfg: Any = getattr(tower, "pretrained_cfg", None) or {}
    notes = " ".join(cfg.get("notes") or ())
    if type(activation).__name__ == "QuickGELU" or "natively QuickGELU" in notes:
        return "quick_gelu"
    if isinstance(activation, nn.GELU) and getattr(activation, "approximate", "none") == "none":
        return "gelu"
    raise ValueError(f"the activation {type(activation).__name__} of {_name(tower)} is neither GELU nor QuickGELU")


def _name(tower: nn.Module) -> str:
    cfg: Any = getattr(tower, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(tower).__name__


def _renamed(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def _renamed_blocks(
    state: Mapping[str, Tensor], theirs: str, names: BlockNames, tower: str, depth: int
) -> dict[str, Tensor]:
    """The blocks `theirs.0`, `theirs.1`, ... as the layers of a tower of transformers."""
    out: dict[str, Tensor] = {}
    for index in range(depth):
        here, there = f"{tower}.encoder.layers.{index}", f"{theirs}.{index}"
        out |= _split_heads(state, f"{there}.{names.qkv_weight}", f"{there}.{names.qkv_bias}", here)
        for ours, name in zip(LAYER_PARTS, names.parts, strict=True):
            out |= _renamed(state, f"{there}.{name}", f"{here}.{ours}")
    return out


def _split_heads(state: Mapping[str, Tensor], weight: str, bias: str, layer: str) -> dict[str, Tensor]:
    """q, k and v of one matrix, (3 W, W) and (3 W,)."""
    out = {}
    for name, matrix, shift in zip("qkv", state[weight].chunk(3), state[bias].chunk(3), strict=True):
        out[f"{layer}.self_attn.{name}_proj.weight"] = matrix
        out[f"{layer}.self_attn.{name}_proj.bias"] = shift
    return out


def _num_blocks(config: CLIPConfig) -> int:
    return config.vision_config.num_hidden_layers + config.text_config.num_hidden_layers


def _filled(cls: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model of `cls` on these weights, complete or ValueError."""
    with torch.device("meta"):
        model = cls(config)
    state = {key: value.detach().clone().contiguous() for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights do not fit, for example {key}: {got.get(key)} where the model has {wanted.get(key)}"
        )
    model = cls(config)  # buffers such as position ids are made here, on a real device
    model.load_state_dict(state)
    return model.eval()
