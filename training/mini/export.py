"""Put the trained parts together: a `CLIPModel`, its processors, and the folder that ships with the package."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .common import IMAGENET_MEAN, IMAGENET_STD
from .tokenizer import save_tokenizer

LONGEST_EDGE = 2048
PACKED_WEIGHTS_NAME = "model.int8.safetensors"


def assemble_clip(
    vision: CLIPVisionModelWithProjection,
    text: CLIPTextModelWithProjection,
    logit_scale: float,
    vision_state: Mapping[str, Tensor] | None = None,
) -> CLIPModel:
    """One `CLIPModel` from two towers.

    Args:
        vision: vision tower.
        text: text tower of the same projection width.
        logit_scale: natural logarithm of CLIP's factor.
        vision_state: weights that replace the vision tower's.
    """
    if vision.config.projection_dim != text.config.projection_dim:
        raise ValueError(
            f"the towers project to {vision.config.projection_dim} and {text.config.projection_dim} channels"
        )
    config = CLIPConfig(
        vision_config=vision.config.to_dict(),
        text_config=text.config.to_dict(),
        projection_dim=vision.config.projection_dim,
        logit_scale_init_value=logit_scale,
    )
    model = CLIPModel(config)
    state = {**(vision_state or vision.state_dict()), **text.state_dict()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) != {"logit_scale"}:
        raise ValueError(f"towers do not fit CLIPModel: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        model.logit_scale.fill_(logit_scale)
    return model.eval()


def image_processor(shortest_edge: int) -> CLIPImageProcessor:
    """ImageNet statistics, bicubic, no crop; images keep their shape."""
    return CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": shortest_edge, "longest_edge": LONGEST_EDGE},
        resample=3,
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )


def save_clip(folder: Path, clip: CLIPModel, tokenizer: CLIPTokenizer, shortest_edge: int) -> None:
    """Write the plain `CLIPModel` with tokenizer and image processor in full precision."""
    clip.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    image_processor(shortest_edge).save_pretrained(folder)


def export_packed(
    folder: Path,
    clip: CLIPModel,
    arm_state: Mapping[str, Tensor] | None,
    arm_options: Mapping[str, object],
    tokenizer: CLIPTokenizer,
    shortest_edge: int,
    card: Path | None = None,
) -> int:
    """Write the self-contained, int8-packed folder.

    Args:
        folder: where to write.
        clip: the trained CLIP.
        arm_state: weights of ARM under their own names, or None for a zero-initialised one that changes nothing.
        arm_options: fields of `ARMConfig` apart from the CLIP.
        tokenizer: its tokenizer.
        shortest_edge: side that images are resized to.
        card: README.md to copy beside the weights.

    Returns:
        Size of the folder in bytes.
    """
    from arm_hf.modeling.modeling_arm import ARMModel

    options: dict[str, Any] = dict(arm_options)
    if arm_state is None:
        options["zero_init"] = True
    model = ARMModel.from_clip(clip, **options)
    if arm_state is not None:
        model.arm.load_state_dict(dict(arm_state))
    model.save_pretrained(folder, weight_packing="int8", self_contained=True)
    save_tokenizer(tokenizer, folder)
    image_processor(shortest_edge).save_pretrained(folder)
    if card is not None:
        shutil.copyfile(card, folder / "README.md")
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
