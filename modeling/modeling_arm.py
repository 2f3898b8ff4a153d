"""`ARMModel`: the Attention Refinement Module on a frozen CLIP, as a transformers model."""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput, cached_file

from .arm import AttentionRefinementModule, ChannelNorm, fuse
from .configuration_arm import ARMConfig
from .decision import Decision, QueryMaps, background_queries
from .dense_clip import DenseCLIP, DenseFeatures, segment_images
from .loss import segmentation_loss
from .packed_weights import load_int8, save_int8
from .text import encode_prompts

PACKED_WEIGHTS_NAME = "model.int8.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "subfolder")
CLIP_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


@dataclass
class ARMOutput(ModelOutput):
    """Output of [`ARMModel`].

    Attributes:
        loss: Scalar, when labels were given.
        logits: M_f = M_c + M_r, (B, Q, H', W').
        coarse_map: M_c, (B, Q, H', W').
        refinement_map: M_r, (B, Q, H', W').
        patch_features: F_d of the method, (B, h, w, D).
        class_embeddings: E_t, L2-normalised, (Q, D).
        hidden_states: Hidden states of the fusion layers with CLS, each (B, L, W), on request.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    coarse_map: Tensor | None = None
    refinement_map: Tensor | None = None
    patch_features: Tensor | None = None
    class_embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ARMModel(PreTrainedModel):
    """Attention Refinement Module on a frozen CLIP, attachable to any registered training-free method.

    Only `arm` has trainable parameters; `clip` is frozen and always in evaluation mode. A model that was built from a
    config alone has no tower weights and refuses to run: use `from_pretrained`, `from_clip`, or pass `clip`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import CLIPConfig, CLIPModel
    >>> from arm_hf import ARMModel

    >>> model = ARMModel.from_clip(CLIPModel(CLIPConfig())).eval()
    >>> with torch.no_grad():
    ...     output = model(torch.zeros(1, 3, 64, 96), class_embeddings=torch.randn(5, 512))
    >>> output.logits.shape  # 2 x 3 patches of 32, upsampled 8 times
    torch.Size([1, 5, 16, 24])

    ```

    Args:
        config: The configuration.
        clip: A loaded `CLIPModel` to wrap; its config must match `config.clip_config`.
    """

    config_class = ARMConfig
    base_model_prefix = "arm_model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules: ClassVar[list[str]] = ["CLIPEncoderLayer", "RefinementBlock"]

    def __init__(self, config: ARMConfig, clip: CLIPModel | None = None):
        super().__init__(config)
        if clip is None:
            # CLIP's own config may name the type it was saved in; here one type holds for all parts.
            clip = CLIPModel._from_config(config.clip_config, dtype=torch.get_default_dtype())
            self._tower_loaded = False
        else:
            self._tower_loaded = True
        self.clip = clip
        self.clip.requires_grad_(False)
        self.arm = AttentionRefinementModule(config)
        self.register_load_state_dict_post_hook(_mark_tower_loaded)
        self.post_init()
        _check_tower(clip, config)
        self.clip.eval()

    # -- construction -------------------------------------------------------------------------------------------

    @classmethod
    def from_clip(
        cls, clip: str | os.PathLike | CLIPModel, *, revision: str | None = None, **options: Any
    ) -> "ARMModel":
        """A new, untrained ARM on a loaded CLIP.

        Args:
            clip: Hub id or folder of a CLIP, or a loaded `CLIPModel`.
            revision: Commit, tag or branch when `clip` is a hub id.
            options: Fields of `ARMConfig`; arguments of `CLIPModel.from_pretrained` such as `dtype` or `token`.

        Raises:
            TypeError: An option is neither.
        """
        loading = {key: options.pop(key) for key in (*CLIP_ARGUMENTS, "dtype", "attn_implementation") if key in options}
        unknown = [key for key in options if key not in ARMConfig.__dataclass_fields__]
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; allowed are the fields of ARMConfig")
        if not isinstance(clip, CLIPModel):
            options.setdefault("clip_name_or_path", str(clip))
            options.setdefault("clip_revision", revision)
            clip = load_clip(clip, revision, **loading)
        clip_config = copy.deepcopy(clip.config)
        for part in (clip_config, clip_config.text_config, clip_config.vision_config):
            part.name_or_path = ""  # a folder of this machine has no place in a checkpoint
        config = ARMConfig(clip_config=clip_config, **options)
        config._attn_implementation = clip.config._attn_implementation
        return cls(config, clip=clip).to(clip.dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint: lean (ARM here, CLIP from `config.clip_name_or_path`), self-contained, or packed as int8.

        All arguments of `PreTrainedModel.from_pretrained` are understood. Weights are read from safetensors only.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None with a `state_dict`.
            model_args: Handed to the class.
            kwargs: Those of `PreTrainedModel.from_pretrained`, and fields of `ARMConfig` to change.

        Raises:
            OSError: The checkpoint, or the CLIP that a lean checkpoint refers to, cannot be found.
            ValueError: The checkpoint lacks weights (nothing is ever left random), or shapes do not fit.
        """
        source, config, hub = pretrained_model_name_or_path, kwargs.pop("config", None), {}
        wants_info = kwargs.pop("output_loading_info", False)
        with _damage_reported(source):
            if source is not None and kwargs.get("state_dict") is None:
                hub = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "revision") if kwargs.get(key) is not None}
                if not isinstance(config, ARMConfig) and type(config).__name__ != "ARMConfig":
                    fields = [key for key in kwargs if key in cls.config_class.__annotations__]
                    overrides = {key: kwargs.pop(key) for key in fields}
                    config = cls.config_class.from_pretrained(config or source, **hub, **overrides)
                kwargs["use_safetensors"] = True
                if config.weight_packing == "int8":
                    kwargs["state_dict"] = load_int8(cached_file(source, PACKED_WEIGHTS_NAME, **hub))
                elif config.checkpoint_contents == "head":
                    kwargs["state_dict"] = cls._merge_with_tower(source, config, hub, kwargs)
                if "state_dict" in kwargs:
                    source = None
                    for key in ("subfolder", "revision"):
                        kwargs.pop(key, None)
            model, info = super().from_pretrained(
                source, *model_args, config=config, output_loading_info=True, **kwargs
            )
        name = "the state dict" if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        _require_complete(name, info)
        model.config.name_or_path = str(pretrained_model_name_or_path or "")
        model.clip.requires_grad_(False)  # loading makes new parameters
        model._tower_loaded = True
        if model.config.adapter is not None and pretrained_model_name_or_path is not None:
            model._merge_adapter(pretrained_model_name_or_path, hub)
        model.train(model.training)
        return (model, info) if wants_info else model

    @classmethod
    def _merge_with_tower(
        cls, source: Any, config: ARMConfig, hub: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> dict:
        """State dict of a lean checkpoint: its own `arm.*` and the towers of the CLIP that it names."""
        if not config.clip_name_or_path:
            raise ValueError(
                f"{source} holds ARM alone and its config names no CLIP; set clip_name_or_path in config.json"
            )
        path = cached_file(source, "model.safetensors", **hub)
        arguments = {key: kwargs[key] for key in CLIP_ARGUMENTS if kwargs.get(key) is not None}
        clip = load_clip(config.clip_name_or_path, config.clip_revision, **arguments)
        _check_tower(clip, config)
        return {**{f"clip.{key}": value for key, value in clip.state_dict().items()}, **load_file(path)}

    def _merge_adapter(self, source: Any, hub: Mapping[str, Any]) -> None:
        """Merge the checkpoint's adapter into the towers, which then are no longer those that the config names."""
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError(
                f"{source} holds an adapter for its CLIP; loading it needs peft: pip install peft"
            ) from error
        places = (hub.get("subfolder"), self.config.adapter)
        folder = "/".join(place for place in places if place)
        with warnings.catch_warnings():
            # peft 0.21 reads a property of transformers' models that is called otherwise from version 5 on.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            PeftModel.from_pretrained(self, source, **{**hub, "subfolder": folder}).merge_and_unload()
        self.clip.requires_grad_(False)
        self.arm.requires_grad_(True)
        self.config.adapter = self.config.clip_name_or_path = self.config.clip_revision = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        self_contained: bool | None = None,
        weight_packing: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save config and weights.

        Args:
            save_directory: Folder, made if missing.
            self_contained: True stores the CLIP towers too; False stores ARM alone and the reference to the CLIP. By
                default False when the config names a CLIP, else True.
            weight_packing: "int8" stores every matrix as int8 rows with scales (a quarter of the size, lossy).
            args, kwargs: Arguments of `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: ARM alone was asked for, but no `clip_name_or_path` says where the towers are.
        """
        if self_contained is None:
            self_contained = not self.config.clip_name_or_path or weight_packing is not None
        if not self_contained and not self.config.clip_name_or_path:
            raise ValueError(
                "a lean checkpoint needs config.clip_name_or_path (a hub id or folder of the CLIP weights); set it, or "
                "pass self_contained=True"
            )
        self._require_tower()
        before = self.config.checkpoint_contents, self.config.weight_packing
        self.config.checkpoint_contents = "full" if self_contained else "head"
        self.config.weight_packing = weight_packing
        state = kwargs.pop("state_dict", None) or self.state_dict()
        if not self_contained:
            state = {key: value for key, value in state.items() if key.startswith("arm.")}
        try:
            if weight_packing is None:
                super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)
            else:
                os.makedirs(save_directory, exist_ok=True)
                save_int8(state, os.path.join(save_directory, PACKED_WEIGHTS_NAME))
                self.config.architectures = [type(self).__name__]
                if self._auto_class is not None:
                    custom_object_save(self, save_directory, config=self.config)
                self.config.save_pretrained(save_directory)
        finally:
            self.config.checkpoint_contents, self.config.weight_packing = before

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.ConvTranspose2d | nn.Conv2d):
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, mean=0.0, std=std)
            else:
                init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | ChannelNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AttentionRefinementModule) and module.output_gain is not None:
            init.zeros_(module.output_gain)

    def train(self, mode: bool = True) -> "ARMModel":
        """Set ARM's mode; the frozen CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def _require_tower(self) -> None:
        if not self._tower_loaded:
            raise RuntimeError(
                "this ARMModel was built from a config alone, so its CLIP towers hold no trained weights; use "
                "ARMModel.from_pretrained(...), ARMModel.from_clip(...) or ARMModel(config, clip=CLIPModel)"
            )

    # -- computation --------------------------------------------------------------------------------------------

    @property
    def dense(self) -> DenseCLIP:
        """The frozen CLIP as a dense encoder (a view without weights of its own)."""
        return DenseCLIP(self.clip, self.config.odd_sizes)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Class embeddings (Q, D) of prompts (Q, T), or of P prompts per query (Q, P, T).

        Args:
            input_ids: Token ids, (Q, T) or (Q, P, T).
            attention_mask: Of the same shape.
        """
        self._require_tower()
        with torch.no_grad():
            return encode_prompts(self.clip, input_ids, attention_mask)

    def features(
        self,
        pixel_values: Tensor,
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
        class_embeddings: Tensor | None = None,
        background_queries: Sequence[int] = (),
        outside: Mapping[str, Any] | None = None,
    ) -> DenseFeatures:
        """The host's patch features and the hidden states that ARM reads, in one trunk pass.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            method: Registered method; by default `config.method` with `config.method_options`.
            method_options: Settings of the method.
            class_embeddings: E_t, for methods whose features depend on the words.
            background_queries: Rows of `class_embeddings` that describe the background.
            outside: Features of other models.
        """
        self._require_tower()
        if method is None:
            method, method_options = self.config.method, {**self.config.method_options, **(method_options or {})}
        trainable = any(p.requires_grad for p in self.clip.parameters())  # adapters inside the tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return self.dense.features(
                pixel_values,
                method,
                method_options,
                hidden_states=self.config.fusion_layers,
                class_embeddings=class_embeddings,
                background_queries=background_queries,
                outside=outside,
                gradient_checkpointing=self.training and self.is_activation_checkpointing,
            )

    def coarse_map(self, features: DenseFeatures, class_embeddings: Tensor, logit_scale: float | None = None) -> Tensor:
        """M_c on the patch grid, (B, Q, h, w): Eq. 1, or the scaled cosines with `coarse_form="logits"`.

        tau is `logit_scale`, else `config.coarse_scale`, else CLIP's temperature; it is not the host's factor. A host
        with scores of its own (several layers fused, for example) contributes those.

        Args:
            features: Of the host.
            class_embeddings: E_t, L2-normalised, (Q, D).
            logit_scale: tau in place of the config's and CLIP's.
        """
        scores = self.dense.score_map(features, class_embeddings)
        as_logits = self.config.coarse_form == "logits"
        if scores.activation != "softmax":
            return scores.values.clamp_min(1e-6).log() if as_logits else scores.values
        given = (tau for tau in (logit_scale, self.config.coarse_scale) if tau is not None)
        tau = next(given, self.dense.logit_scale)
        return tau * scores.values if as_logits else (tau * scores.values).softmax(dim=1)

    def refinement_features(self, features: DenseFeatures, class_embeddings: Tensor | None = None) -> Tensor:
        """R_v, (B, D, H', W'), or its product M_r with words, (B, Q, H', W').

        Args:
            features: Of the host.
            class_embeddings: E_t, L2-normalised, (Q, D).
        """
        return self.arm(
            features.hidden_patches(self.config.fusion_layers),
            features.patch_features.flatten(1, 2),
            features.trunk.grid,
            class_embeddings,
        )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_embeddings: Tensor | None = None,
        labels: Tensor | None = None,
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
        outside: Mapping[str, Any] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ARMOutput | tuple:
        """Fused maps M_f of a batch (Eqs. 1 to 5).

        Args:
            pixel_values: Normalised images of any size, (B, 3, H, W).
            input_ids: Prompts (Q, T) or (Q, P, T); alternative to `class_embeddings`.
            attention_mask: Of the prompts.
            class_embeddings: E_t, (Q, D); normalised here.
            labels: Class index per pixel, (B, H, W); with them the loss is computed.
            method: Host method for this call; by default the config's.
            method_options: Settings of the host.
            outside: Features of other models for hosts that use them.
            output_hidden_states: Return the hidden states of the fusion layers.
            return_dict: False returns a tuple.

        Raises:
            RuntimeError: The towers were never loaded.
            ValueError: Neither or both of `input_ids` and `class_embeddings`, or wrong shapes.
        """
        self._require_tower()
        if (input_ids is None) == (class_embeddings is None):
            raise ValueError("give either input_ids or class_embeddings")
        if class_embeddings is None and input_ids is not None:
            class_embeddings = self.encode_text(input_ids, attention_mask)
        class_embeddings = self._check_embeddings(class_embeddings)

        features = self.features(pixel_values, method, method_options, class_embeddings, outside=outside)
        refinement = self.refinement_features(features, class_embeddings)  # M_r (B, Q, H', W')
        coarse = self.coarse_map(features, class_embeddings)
        coarse = F.interpolate(coarse, size=refinement.shape[-2:], mode="bilinear", align_corners=False)
        logits = fuse(coarse, refinement)

        loss = None
        if labels is not None:
            maps = refinement if self.config.loss == "bce_refinement" else logits
            loss = segmentation_loss(self._to_pixels(maps, features), labels, self.config)
        hidden_states = None
        if output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states:
            hidden_states = tuple(features.trunk.hidden_states[layer] for layer in self.config.fusion_layers)
        output = ARMOutput(
            loss=loss,
            logits=logits,
            coarse_map=coarse,
            refinement_map=refinement,
            patch_features=features.patch_features,
            class_embeddings=class_embeddings,
            hidden_states=hidden_states,
        )
        return output if return_dict is not False and self.config.return_dict is not False else output.to_tuple()

    def _to_pixels(self, maps: Tensor, features: DenseFeatures) -> Tensor:
        """Take the padding of odd sizes off before maps meet a label map; a no-op for whole patches."""
        padding = features.trunk.padding
        if min(padding.top, padding.left, padding.bottom, padding.right) >= 0 and any(
            (padding.top, padding.left, padding.bottom, padding.right)
        ):
            maps = F.interpolate(maps, size=features.trunk.padded_size, mode="bilinear", align_corners=False)
            return padding.crop(maps)
        return maps

    def _check_embeddings(self, class_embeddings: Any) -> Tensor:
        if class_embeddings.ndim != 2 or class_embeddings.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"class_embeddings must be (Q, {self.config.hidden_size}), got {tuple(class_embeddings.shape)}"
            )
        return F.normalize(class_embeddings.to(self.device, self.dtype), dim=-1)

    def query_maps(
        self,
        pixel_values: Tensor,
        class_embeddings: Tensor,
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
        use_arm: bool = True,
        logit_scale: float | None = None,
        background_queries: Sequence[int] = (),
        outside: Mapping[str, Any] | None = None,
    ) -> QueryMaps:
        """Scores of a batch, ready for `decide`; for many words E_t R_v is left to the class-chunked decision.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            class_embeddings: E_t, L2-normalised, (Q, D).
            method: Registered method; by default `config.method` with `config.method_options`.
            method_options: Settings of the method.
            use_arm: False gives the host method alone.
            logit_scale: Factor inside the host's softmax without ARM; with ARM it replaces tau of M_c.
            background_queries: Rows of `class_embeddings` that describe the background.
            outside: Features of other models.
        """
        self._require_tower()
        if not use_arm:
            if method is None:
                method, method_options = self.config.method, {**self.config.method_options, **(method_options or {})}
            return self.dense.query_maps(
                pixel_values, class_embeddings, method, method_options, logit_scale, background_queries, outside
            )
        class_embeddings = self._check_embeddings(class_embeddings)
        features = self.features(pixel_values, method, method_options, class_embeddings, background_queries, outside)
        return self.maps_of(features, class_embeddings, logit_scale)

    def maps_of(self, features: DenseFeatures, class_embeddings: Tensor, logit_scale: float | None = None) -> QueryMaps:
        """Scores with ARM from a host's features (which kept the hidden states of the fusion layers).

        Args:
            features: Of the host, with the hidden states of the fusion layers.
            class_embeddings: E_t, L2-normalised, (Q, D).
            logit_scale: tau in place of the config's and CLIP's.
        """
        words = self._check_embeddings(class_embeddings)
        coarse = self.coarse_map(features, words, logit_scale)
        as_logits = self.config.coarse_form == "logits"
        # M_r is smaller than R_v when there are fewer words than channels; an exported graph has any number of words.
        few = not torch.compiler.is_compiling() and len(words) <= self.config.hidden_size
        return QueryMaps(
            coarse,
            self.refinement_features(features, words if few else None),
            None if few else words,
            "softmax" if as_logits else "sigmoid",
            1.0,
            features.trunk.padding,
            features.trunk.padded_size,
        )

    @torch.no_grad()
    def segment(
        self,
        pixel_values: Tensor,
        class_embeddings: Tensor,
        *,
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
        use_arm: bool = True,
        logit_scale: float | None = None,
        outside: Mapping[str, Any] | None = None,
        class_of_query: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> list[Decision]:
        """Full-resolution label maps of a batch of images.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            class_embeddings: E_t of all queries, (Q, D).
            method, method_options, use_arm, logit_scale, outside: See `query_maps`.
            class_of_query: Class of each query (synonyms share one); by default each query is a class.
            kwargs: Windows, output sizes, background, PAMR: see `segment_images`.

        Returns:
            One `Decision` per image: labels (H, W), confidence (H, W), class scores on request.
        """
        background = background_queries(class_of_query, kwargs.get("background_index"))
        return segment_images(
            lambda pixels, outside=None: self.query_maps(
                pixels, class_embeddings, method, method_options, use_arm, logit_scale, background, outside
            ),
            pixel_values,
            outside=outside,
            num_queries=class_embeddings.shape[0],
            class_of_query=class_of_query,
            **kwargs,
        )


def _mark_tower_loaded(model: ARMModel, incompatible: Any) -> None:
    if not any(key.startswith("clip.") for key in incompatible.missing_keys):
        model._tower_loaded = True


def load_clip(name: str | os.PathLike, revision: str | None = None, **arguments: Any) -> CLIPModel:
    """A complete CLIP from safetensors, or an error.

    Args:
        name: Hub id or folder.
        revision: Commit, tag or branch of a hub id.
        arguments: Of `CLIPModel.from_pretrained`.

    Raises:
        OSError: There are no such weights, or they are damaged.
        ValueError: Some are missing.
    """
    with _damage_reported(name):
        clip, info = CLIPModel.from_pretrained(
            name, revision=revision or "main", use_safetensors=True, output_loading_info=True, **arguments
        )
    _require_complete(str(name), info)
    return clip


def _require_complete(name: str, info: Mapping[str, Any]) -> None:
    """Raise ValueError when loading left weights at random values."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights, for example {missing[0]}; the checkpoint is incomplete: download it "
            "or save it again"
        )


@contextmanager
def _damage_reported(name: Any) -> Iterator[None]:
    """Turn safetensors' own error into an OSError that says which checkpoint it is about."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"the weights of {name} are damaged or cut short ({error}); download or save them again"
        ) from error


def _check_tower(clip: CLIPModel, config: ARMConfig) -> None:
    """Raise ValueError when a CLIP has other widths than the config was made for."""
    ours: Any = config.clip_config
    theirs: Any = clip.config
    pairs = {
        "projection_dim": (ours.projection_dim, theirs.projection_dim),
        "vision width": (ours.vision_config.hidden_size, theirs.vision_config.hidden_size),
        "vision blocks": (ours.vision_config.num_hidden_layers, theirs.vision_config.num_hidden_layers),
        "patch size": (ours.vision_config.patch_size, theirs.vision_config.patch_size),
        "text width": (ours.text_config.hidden_size, theirs.text_config.hidden_size),
    }
    wrong = [f"{name} {got} instead of {expected}" for name, (expected, got) in pairs.items() if expected != got]
    if wrong:
        raise ValueError(f"the CLIP does not fit this ARM: {', '.join(wrong)}")


__all__ = ["ARMModel", "ARMOutput"]
