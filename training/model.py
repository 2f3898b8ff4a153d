"""The model of a run: ARM on its CLIP, the words of each set, and the part that is differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor

from arm_hf.default_model import resolve_model
from arm_hf.modeling.arm import fuse, refinement_map
from arm_hf.modeling.dense_clip import DenseFeatures
from arm_hf.modeling.loss import pixel_weights, segmentation_loss
from arm_hf.modeling.method import MethodContext, get_method
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.trunk import Padding, TrunkOutput

from .options import TrainingOptions

LONGEST_EDGE = 2048


def build_model(options: TrainingOptions, ignore_index: int) -> tuple[ARMModel, Any, CLIPImageProcessor]:
    """The model with a fresh ARM (or that of `init_arm`), its tokenizer and its image processor.

    The towers of an ARM checkpoint are taken where `clip` names one.

    Args:
        options: Of the run.
        ignore_index: Label of pixels that are not learnt.

    Raises:
        OSError: The CLIP cannot be found.
        ValueError: An option does not suit this CLIP, or `init_arm` was made for another one.
    """
    source = resolve_model(options.clip)
    hub: dict[str, Any] = {} if options.clip_revision is None else {"revision": options.clip_revision}
    fields = {**options.arm_fields(), "ignore_index": ignore_index}
    try:
        get_method(options.method).settings(fields["method_options"])
    except TypeError as error:  # a setting that the method does not have
        raise ValueError(str(error)) from error
    if AutoConfig.from_pretrained(source, trust_remote_code=False, **hub).model_type == "arm":
        towers = ARMModel.from_pretrained(source, dtype=torch.float32, **hub)
        known = {"clip_name_or_path": towers.config.clip_name_or_path, "clip_revision": towers.config.clip_revision}
        model = ARMModel.from_clip(towers.clip, **known, **fields)
    else:
        named = str(Path(source).resolve()) if Path(source).is_dir() else source
        model = ARMModel.from_clip(named, revision=options.clip_revision, dtype=torch.float32, **fields)
    patch = model.config.clip_config.vision_config.patch_size
    if options.crop_size % patch:
        near = options.crop_size // patch * patch or patch
        raise ValueError(
            f"crop_size must be a multiple of this CLIP's patch, {patch}; got {options.crop_size}: use {near} or "
            f"{near + patch}"
        )
    if options.init_arm is not None:
        _copy_arm(model, options.init_arm, options.init_arm == options.clip)
    if not model.config.num_cross_attention_layers and model.arm.deep_norm is not None:
        model.arm.deep_norm.requires_grad_(False)  # nothing reads F_d but M_c
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
    size = {"shortest_edge": options.shortest_edge, "longest_edge": LONGEST_EDGE}
    processor = CLIPImageProcessor.from_pretrained(source, size=size, do_center_crop=False, **hub)
    return model, tokenizer, processor


def _copy_arm(model: ARMModel, source: str, same_clip: bool) -> None:
    """Start from the ARM of a checkpoint."""
    theirs = AutoConfig.from_pretrained(resolve_model(source), trust_remote_code=False)
    if theirs.model_type != "arm":
        raise ValueError(f"init_arm must be an ARM checkpoint, but {source!r} holds a {theirs.model_type!r} model")
    if theirs.adapter is not None and not same_clip:
        raise ValueError(
            f"the ARM of {source!r} was trained with an adapter in CLIP; name that checkpoint as clip too, so that its "
            "towers come along"
        )
    ours = model.config
    widths = {
        "CLIP's width": lambda config: config.clip_config.vision_config.hidden_size,
        "projection width": lambda config: config.hidden_size,
        "scale blocks": lambda config: config.num_scale_blocks_for_patch,
    }
    wrong = [f"{name} {read(theirs)}, not {read(ours)}" for name, read in widths.items() if read(theirs) != read(ours)]
    if wrong:
        raise ValueError(f"the ARM of {source!r} was made for another CLIP than this run's: {'; '.join(wrong)}")
    try:
        model.arm.load_state_dict(ARMModel.from_pretrained(resolve_model(source)).arm.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the ARM of {source!r} has another form than this run's options ask for: {error}") from error


class Trainee(nn.Module):
    """From a batch to its loss: what data-parallel training wraps.

    Args:
        model: Its `arm`, and adapters in its CLIP if there are any, are trained.
        autocast_arm: False computes ARM in float32 also where autocast is on.
    """

    def __init__(self, model: ARMModel, autocast_arm: bool = False):
        super().__init__()
        self.model, self.autocast_arm = model, autocast_arm

    def forward(self, batch: Mapping[str, Any], class_embeddings: Tensor) -> Tensor:
        """Mean loss over the pixels that count.

        Args:
            batch: `labels` (B, S, S), and `pixels` (B, 3, S, S) or the stored `hidden` and `deep`.
            class_embeddings: E_t, (Q, D).
        """
        config: Any = self.model.config
        if "pixels" in batch:
            features = self.model.features(batch["pixels"], class_embeddings=class_embeddings)
        else:
            features = stored_features(self.model, batch["hidden"], batch["deep"], batch["labels"].shape[-2:])
        in_full = torch.autocast(batch["labels"].device.type, enabled=False)
        with nullcontext() if self.autocast_arm else in_full:
            if not self.autocast_arm:
                features = in_float32(features)
            maps = refinement_map(self.model.refinement_features(features), class_embeddings)  # M_r (B, Q, H', W')
            if config.loss != "bce_refinement":
                maps = fuse(self.model.coarse_map(features, class_embeddings), maps)
        return segmentation_loss(maps, batch["labels"], config)

    def counted_pixels(self, labels: Tensor) -> int:
        """What a batch counts in the mean over the pixels of a step: pixels, or thousandths where they are weighted."""
        config: Any = self.model.config
        if config.loss_resolution == "map":
            side = (
                labels.shape[-1] // config.clip_config.vision_config.patch_size * 2**config.num_scale_blocks_for_patch
            )
            labels = F.interpolate(labels[:, None].float(), size=(side, side), mode="nearest")[:, 0]
        unit = 1 if config.pixel_weighting == "even" else 1000  # sums over processes are whole numbers
        return round(unit * float(pixel_weights(labels, config).sum(dtype=torch.float64)))


def in_float32(features: DenseFeatures) -> DenseFeatures:
    """Features as they are, in float32."""
    features.patch_features = features.patch_features.float()
    hidden = features.trunk.hidden_states
    features.trunk.hidden_states = {layer: states.float() for layer, states in hidden.items()}
    return features


def stored_features(model: ARMModel, hidden: Tensor, deep: Tensor, size: tuple[int, int]) -> DenseFeatures:
    """Features that were computed before, in the form that `ARMModel` reads.

    Args:
        model: The model that they were computed with.
        hidden: Hidden states of the fusion layers with CLS, (B, layers, L, W).
        deep: F_d, (B, h, w, D).
        size: Height and width of the views.
    """
    config: Any = model.config
    method = get_method(config.method)
    trunk = TrunkOutput(
        last_input=torch.empty(0, device="meta"),
        grid=(deep.shape[1], deep.shape[2]),
        padding=Padding(),
        pixel_values=torch.empty(len(deep), 3, *size, device="meta"),
        hidden_states={layer: hidden[:, index].float() for index, layer in enumerate(config.fusion_layers)},
    )
    settings = method.settings(config.method_options)
    return DenseFeatures(deep.float(), trunk, method, settings, MethodContext(model.dense.tower, trunk))
