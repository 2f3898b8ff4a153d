"""Patch features of a vision foundation model (DINO, DINOv2, DINOv3, any plain ViT) for CLIP's normalised pixels.

One adapter for timm and transformers: it undoes CLIP's normalisation, applies the model's own, resizes to whole patches
of the model, drops its prefix tokens and returns a map. The model is frozen and runs without gradients.

```python
from arm_hf.modeling.proxy_features import ProxyFeatures

proxy = ProxyFeatures.from_timm("vit_base_patch8_224.dino")  # or from_transformers("facebook/dinov2-base")
pipe(image, "cat, sky", method="proxyclip", outside={"proxy_features": proxy})
```
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

KINDS = ("tokens", "q+k")


class _Halt(Exception):
    """Ends a forward pass once the input of the last attention is known."""


class ProxyFeatures:
    """A frozen ViT as a function from CLIP's normalised pixels (B, 3, H, W) to features (B, C, h, w), not normalised.

    ```python
    >>> import torch
    >>> from arm_hf import ProxyFeatures
    >>> proxy = ProxyFeatures.from_timm("vit_tiny_patch16_224", pretrained=False)  # random weights
    >>> proxy(torch.zeros(1, 3, 64, 96), "tokens").shape
    torch.Size([1, 192, 4, 6])

    ```

    Args:
        model: A loaded ViT of timm (`VisionTransformer`, `Eva`, ...) or transformers (`ViTModel`, `Dinov2Model`,
            `Dinov2WithRegistersModel`, `DINOv3ViTModel`, ...): its tokens must be one grid of patches, after any number
            of prefix tokens. A timm model must have been created with `dynamic_img_size=True` to take any size.
        kind: "tokens" are the tokens after the last norm (what ProxyCLIP uses), "q+k" the sum of query and key of the
            last block (what CorrCLIP uses); None leaves the choice to the method.
        mean, std: The model's pixel statistics; None takes timm's `pretrained_cfg`, else those of ImageNet.
        clip_mean, clip_std: Pixel statistics that the incoming pixels were normalised with.
        scale: Factor on the image's size before the model sees it; above 1 gives finer features at a higher cost.

    Raises:
        TypeError: The model is no plain ViT (no patch size, or no attention with query and key projections).
        ValueError: `kind` is unknown or `scale` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        clip_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        clip_std: Sequence[float] = OPENAI_CLIP_STD,
        scale: float = 1.0,
    ):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)} or None, got {kind!r}")
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.model: Any = model.eval().requires_grad_(False)
        self.kind, self.scale = kind, scale
        self.patch_size = _patch_size(model)
        self._attention = _last_attention(model)
        statistics = getattr(model, "pretrained_cfg", None) or {}
        own_mean = torch.tensor(mean or statistics.get("mean") or IMAGENET_DEFAULT_MEAN)
        own_std = torch.tensor(std or statistics.get("std") or IMAGENET_DEFAULT_STD)
        # ((x * clip_std + clip_mean) - mean) / std in one step
        self._factor = (torch.tensor(clip_std) / own_std)[:, None, None]
        self._offset = ((torch.tensor(clip_mean) - own_mean) / own_std)[:, None, None]

    @classmethod
    def from_timm(cls, name: str, kind: str | None = None, *, pretrained: bool = True, **options: Any):
        """Create a timm model, such as "vit_base_patch8_224.dino" or "vit_small_patch14_reg4_dinov2".

        Args:
            name: What `timm.create_model` takes.
            kind: See the class.
            pretrained: False gives random weights.
            options: Other arguments of the class (`scale`, `mean`, ...) and of `timm.create_model`.

        Raises:
            ImportError: timm is missing.
        """
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                'features of timm models need timm: run "pip install timm", or use ProxyFeatures.from_transformers'
            ) from error
        own = {key: options.pop(key) for key in ("mean", "std", "clip_mean", "clip_std", "scale") if key in options}
        options.setdefault("dynamic_img_size", True)
        return cls(timm.create_model(name, pretrained=pretrained, num_classes=0, **options), kind, **own)

    @classmethod
    def from_transformers(cls, name: str, kind: str | None = None, **options: Any):
        """Load a transformers model, such as "facebook/dino-vitb8" or "facebook/dinov2-base".

        Args:
            name: Hub id or folder.
            kind: See the class.
            options: Other arguments of the class (`scale`, `mean`, ...) and of `AutoModel.from_pretrained`.
        """
        own = {key: options.pop(key) for key in ("mean", "std", "clip_mean", "clip_std", "scale") if key in options}
        trusted = options.pop("trust_remote_code", False)
        return cls(AutoModel.from_pretrained(name, trust_remote_code=trusted, **options), kind, **own)

    def to(self, *args: Any, **kwargs: Any) -> "ProxyFeatures":
        """Move the model to a device or a dtype; pixels follow it, features come back to the pixels' device.

        Args:
            args: Those of `torch.nn.Module.to`.
            kwargs: Those of `torch.nn.Module.to`.
        """
        self.model.to(*args, **kwargs)
        return self

    def prepare(self, pixel_values: Tensor) -> Tensor:
        """CLIP's pixels as the model wants them: its statistics, whole patches of its size, its device and dtype."""
        weight = next(self.model.parameters())
        pixels = pixel_values.to(weight.device, torch.float32)
        pixels = pixels * self._factor.to(pixels.device) + self._offset.to(pixels.device)
        height, width = (
            max(1, round(side * self.scale / patch)) * patch
            for side, patch in zip(pixels.shape[-2:], self.patch_size, strict=True)
        )
        if (height, width) != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
        return pixels.to(weight.dtype)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, kind: str | None = None) -> Tensor:
        """Features of a batch.

        Args:
            pixel_values: CLIP's normalised pixels of any size, (B, 3, H, W).
            kind: What the caller would like; the adapter's own `kind` goes first.

        Returns:
            (B, C, h, w) on the model's own grid, h = H * scale / patch size, rounded.

        Raises:
            ValueError: The model returned something other than one token per patch.
        """
        pixels = self.prepare(pixel_values)
        grid = (pixels.shape[-2] // self.patch_size[0], pixels.shape[-1] // self.patch_size[1])
        kind = self.kind or kind or "tokens"
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        tokens = self._tokens(pixels) if kind == "tokens" else self._query_plus_key(pixels)
        prefix = tokens.shape[1] - grid[0] * grid[1] if tokens.ndim == 3 else -1
        if prefix < 0:
            raise ValueError(
                f"{type(self.model).__name__} gave {tuple(tokens.shape)} for {grid[0]} x {grid[1]} patches; a "
                "plain ViT with one token per patch is needed"
            )
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid).to(pixel_values.device)

    def _run(self, pixels: Tensor) -> Any:
        model: Any = self.model
        if hasattr(model, "forward_features"):
            return model.forward_features(pixels)
        # ViTModel interpolates its position table on request, the others always do and ignore the argument.
        return self.model(pixel_values=pixels, interpolate_pos_encoding=True)

    def _tokens(self, pixels: Tensor) -> Tensor:
        output = self._run(pixels)
        if not isinstance(output, Tensor):
            return output.last_hidden_state
        # timm moves the last norm behind the pooling of some models; one of the two is an identity.
        head_norm: Any = getattr(self.model, "fc_norm", None)
        return output if head_norm is None else head_norm(output)

    def _query_plus_key(self, pixels: Tensor) -> Tensor:
        """Sum of the query and key projections in the last attention, before any rotation; nothing after it is run."""
        found: list[Tensor] = []

        def halt(_: nn.Module, arguments: tuple, keywords: dict) -> None:
            found.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Halt

        handle = self._attention.register_forward_pre_hook(halt, with_kwargs=True)
        try:
            self._run(pixels)
        except _Halt:
            pass
        finally:
            handle.remove()
        return F.linear(found[0], *_summed_projection(self._attention))


def _patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch of a timm or transformers model."""
    for holder in (getattr(model, "patch_embed", None), getattr(model, "config", None)):
        size = getattr(holder, "patch_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    raise TypeError(f"{type(model).__name__} has no patch size; a plain ViT of timm or transformers is needed")


def _projections(module: nn.Module) -> tuple[Any, Any] | None:
    """Query and key projections of an attention module, both the fused one where there is one, or None."""
    for names in (("qkv", "qkv"), ("q_proj", "k_proj"), ("query", "key")):
        query, key = (getattr(module, name, None) for name in names)
        if isinstance(query, nn.Linear) and isinstance(key, nn.Linear):
            return query, key
    return None


def _last_attention(model: nn.Module) -> nn.Module:
    attentions = [module for module in model.modules() if _projections(module) is not None]
    if not attentions:
        raise TypeError(
            f"{type(model).__name__} has no attention with query and key projections; a plain ViT of timm or "
            "transformers is needed"
        )
    return attentions[-1]


def _summed_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that map the attention's input to q + k in one product."""
    projections = _projections(attention)
    assert projections is not None  # checked when the adapter was made
    query, key = projections
    if query is not key:
        biases = [layer.bias for layer in (query, key) if layer.bias is not None]
        return query.weight + key.weight, sum(biases[1:], start=biases[0]) if biases else None
    weights = query.weight.chunk(3)
    if query.bias is not None:
        biases = list(query.bias.chunk(3)[:2])
    else:  # timm's Eva and BEiT keep them beside the projection
        biases = [b for b in (getattr(attention, name, None) for name in ("q_bias", "k_bias")) if b is not None]
    return weights[0] + weights[1], sum(biases[1:], start=biases[0]) if biases else None
