"""Configuration of ARM on a frozen CLIP."""

import math
from typing import Any, ClassVar

from transformers import CLIPConfig, PreTrainedConfig

CHOICES = {
    "coarse_form": ("probabilities", "logits"),
    "scale_block": ("eomt", "plain"),
    "loss": ("bce", "bce_refinement", "cross_entropy"),
    "loss_resolution": ("labels", "map"),
    "pixel_weighting": ("even", "region"),
    "ignored_pixels": ("exclude", "zeros"),
    "checkpoint_contents": ("head", "full"),
    "weight_packing": (None, "int8"),
    "odd_sizes": ("pad", "drop"),
}

NUMBERS = ("ffn_ratio", "dropout", "refinement_scale", "coarse_scale", "initializer_range")
WHOLE_NUMBERS = (
    "num_cross_attention_layers",
    "num_self_attention_layers",
    "num_attention_heads",
    "mlp_layers",
    "num_scale_blocks",
    "ignore_index",
)
OPTIONAL = ("ffn_ratio", "coarse_scale", "num_scale_blocks")


class ARMConfig(PreTrainedConfig):
    r"""Configuration of [`ARMModel`]: the Attention Refinement Module on a frozen CLIP.

    The defaults are the decisions for ViT-B/16 where the paper (Liu, Zhu and Shi, "ARM: A Learnable, Plug-and-Play
    Module for CLIP-based Open-vocabulary Semantic Segmentation", 2026) says something, and the most literal reading
    where it does not.

    Args:
        clip_config: Configuration of the wrapped `CLIPModel`, as an object or a dict.
        clip_name_or_path: Hub id or folder of the CLIP weights. A lean checkpoint holds ARM alone and loads its towers
            from here.
        clip_revision: Commit, tag or branch of `clip_name_or_path`.
        method: Training-free method that supplies F_d and the coarse map when a call names none. "clearclip" is the
            configuration the paper trains with (section 4.2).
        method_options: Settings of `method`.
        fusion_layers: Blocks l_i, l_j whose outputs are concatenated, counted from 1 as in Table 4. Entry i is
            `hidden_states[i]` of transformers.
        num_cross_attention_layers: Stack of cross-attention blocks, Eq. 2 and Table 5.
        num_self_attention_layers: Stack of self-attention blocks, Eq. 3 and Table 5.
        num_attention_heads: Heads of both; must divide CLIP's projection width.
        ffn_ratio: Width of the feed-forward layer in the attention blocks as a multiple of D; None leaves it out
            (5.3 M instead of 9.5 M parameters for ViT-B/16).
        dropout: Dropout after attention and feed-forward.
        mlp_layers: Linear layers in the small MLP that makes F_m: 1 or 2.
        input_norm: LayerNorm on the concatenated hidden states before the MLP; raw residual streams have a few huge
            channels.
        deep_norm: LayerNorm on F_d before it serves as key and value; hosts differ in feature length.
        num_scale_blocks: x2 upsampling blocks; None means max(1, floor(log2(patch)) - 2), so 2 for patch 16 and 1 for
            patch 14; 0 is the ablation of Table 6.
        scale_block: "eomt": transposed convolution 2x2, GELU, depth-wise 3x3, channel LayerNorm; "plain": transposed
            convolution and GELU only.
        zero_init: Start with M_r = 0, so that an untrained ARM is the identity. Not the paper's form.
        refinement_scale: Constant factor on M_r (1 in Eq. 5).
        coarse_form: "probabilities": M_c = softmax(tau cos), Eq. 1, added to M_r and read through a sigmoid;
            "logits": M_c = tau cos, added to M_r and read through a softmax over the classes.
        coarse_scale: tau in Eq. 1; None takes CLIP's learned temperature.
        loss: "bce" on M_f (the paper), "bce_refinement" on M_r alone, or "cross_entropy" on M_f.
        loss_resolution: "labels" upsamples M_f to the label map, "map" brings the labels to H' x W' (nearest).
        pixel_weighting: "even" (the paper) or "region": every label of an image weighs as the square root of its area,
            so that trainings of a few hundred steps do not unlearn what is small.
        ignored_pixels: "exclude" leaves them out of the mean; "zeros" keeps them with an all-zero target.
        ignore_index: Label value of ignored pixels.
        templates: Prompt templates: a name of `TEMPLATE_SETS` or a list of templates.
        background: Default background policy of the pipeline: None, a threshold, words, or a mapping of both.
        odd_sizes: "pad" images to whole patches, or "drop" the remainder as some reference code does.
        adapter: Sub-folder of a lean checkpoint with a peft adapter of CLIP (LoRA that was trained beside ARM). Loading
            merges it into the towers.
        checkpoint_contents: Written by `save_pretrained`: "head" (ARM alone) or "full" (towers included).
        weight_packing: Written by `save_pretrained`: None or "int8".

    Example:

    ```python
    >>> from transformers import CLIPConfig
    >>> from arm_hf import ARMConfig

    >>> config = ARMConfig(clip_config=CLIPConfig(), fusion_layers=(3, 7), ffn_ratio=None)
    >>> config.num_scale_blocks_for_patch
    3

    ```
    """

    model_type = "arm"
    sub_configs_defaults: ClassVar[dict] = {"clip_config": CLIPConfig}

    clip_config: Any = None  # CLIPConfig after __post_init__
    clip_name_or_path: str | None = None
    clip_revision: str | None = None
    method: str = "clearclip"
    method_options: dict | None = None
    fusion_layers: list | tuple = (3, 7)
    num_cross_attention_layers: int = 1
    num_self_attention_layers: int = 1
    num_attention_heads: int = 8
    ffn_ratio: float | None = 4.0
    dropout: float = 0.0
    mlp_layers: int = 2
    input_norm: bool = True
    deep_norm: bool = True
    num_scale_blocks: int | None = None
    scale_block: str = "eomt"
    zero_init: bool = False
    refinement_scale: float = 1.0
    coarse_form: str = "probabilities"
    coarse_scale: float | None = None
    loss: str = "bce"
    loss_resolution: str = "labels"
    pixel_weighting: str = "even"
    ignored_pixels: str = "exclude"
    ignore_index: int = 255
    templates: str | list | tuple = "imagenet80"
    background: float | str | list | dict | None = None
    odd_sizes: str = "pad"
    adapter: str | None = None
    checkpoint_contents: str = "head"
    weight_packing: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers asks for permission to run remote code as soon as a config names custom pipelines, also when the
        # installed package has registered them. The installed class drops the entry, the hub's copy of it keeps it.
        if not type(self).__module__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        self._check_types()
        super().__post_init__(**kwargs)
        self.fusion_layers = tuple(self.fusion_layers)
        self.method_options = dict(self.method_options or {})
        self._check()

    def _check_types(self) -> None:
        """A config.json may hold anything."""
        kinds: dict[str, tuple[str, Any]] = {
            **dict.fromkeys(NUMBERS, ("a number", int | float)),
            **dict.fromkeys(WHOLE_NUMBERS, ("a whole number", int)),
            "fusion_layers": ("a list of whole numbers", list | tuple),
            "method": ("a name", str),
            "method_options": ("a mapping or null", dict | None),
            "clip_config": ("a mapping or null", dict | PreTrainedConfig | None),
            "clip_name_or_path": ("a name or null", str | None),
            "clip_revision": ("a name or null", str | None),
            "adapter": ("a name or null", str | None),
        }
        for name, (kind, types) in kinds.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not isinstance(value, types) or (isinstance(value, bool) and kind.endswith("number")):
                raise ValueError(f"{name} must be {kind}, got {value!r}")

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        depth = self.clip_config.vision_config.num_hidden_layers
        wrong = [layer for layer in self.fusion_layers if not (isinstance(layer, int) and 0 <= layer < depth)]
        if wrong or not self.fusion_layers:
            raise ValueError(
                f"fusion_layers must be integers from 0 to {depth - 1} (this CLIP has {depth} blocks), "
                f"got {self.fusion_layers}"
            )
        if len(set(self.fusion_layers)) != len(self.fusion_layers):
            raise ValueError(f"fusion_layers must differ, got {self.fusion_layers}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide CLIP's projection width {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        if self.mlp_layers not in (1, 2):
            raise ValueError(f"mlp_layers must be 1 or 2, got {self.mlp_layers}")
        if self.ffn_ratio is not None and self.ffn_ratio <= 0:
            raise ValueError(f"ffn_ratio must be positive or None, got {self.ffn_ratio}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("num_cross_attention_layers", "num_self_attention_layers", "num_scale_blocks"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @property
    def hidden_size(self) -> int:
        """D, the width of F_m, F_d and E_t: CLIP's projection width."""
        return self.clip_config.projection_dim

    @property
    def num_scale_blocks_for_patch(self) -> int:
        """Number of scale blocks with the default rule applied: x4 upsampling for patch 16, x2 for patch 14."""
        if self.num_scale_blocks is not None:
            return self.num_scale_blocks
        return max(1, math.floor(math.log2(self.clip_config.vision_config.patch_size)) - 2)


__all__ = ["ARMConfig"]
