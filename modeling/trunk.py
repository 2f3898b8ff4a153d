"""The image tower run once: patch embedding, position table, blocks 1..n-1, and what a method asked to keep.

The last block is left to the method (see `last_block_methods.py`). Every size works: pixels are padded to whole patches
here, and `Padding.crop` takes the border off again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import plain_cpu
from .block import run_block

POSITION_RULES = ("reference", "bilinear", "antialias", "transformers")
COMMON_POSITION_RULE = "reference"  # that of most methods, for those who want one pass for all
ODD_SIZE_RULES = ("pad", "drop")


@dataclass(frozen=True)
class TrunkRequest:
    """What a method wants kept from the pass through the trunk.

    Attributes:
        hidden_states: Indices into the residual stream: 0 is the input of the first block (after the pre-norm),
            i the output of the i-th block (1-based), up to n-1, the input of the last block.
        attention_maps: 0-based indices of the blocks whose softmaxed maps are kept.
        map_sums: Groups of blocks, each as its 0-based indices, whose softmaxed maps are added up and not kept.
        heads: 0-based indices of the blocks whose q, k, v are kept.
        position_rule: How the position table is resized to another grid, one of `POSITION_RULES`.
    """

    hidden_states: tuple[int, ...] = ()
    attention_maps: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    position_rule: str = "reference"
    map_sums: tuple[tuple[int, ...], ...] = ()

    def merge(self, other: "TrunkRequest") -> "TrunkRequest":
        """Union of two requests, so that several methods share one pass. The position rules must agree."""
        if self.position_rule != other.position_rule:
            raise ValueError(
                f"position rules {self.position_rule!r} and {other.position_rule!r} cannot share one trunk pass"
            )
        return TrunkRequest(
            tuple(sorted({*self.hidden_states, *other.hidden_states})),
            tuple(sorted({*self.attention_maps, *other.attention_maps})),
            tuple(sorted({*self.heads, *other.heads})),
            self.position_rule,
            tuple(sorted({*self.map_sums, *other.map_sums})),
        )


@dataclass(frozen=True)
class Padding:
    """Pixels added around an image so that it holds whole patches.

    With the rule "drop" the border is negative: pixels were cut at the bottom and right, and `crop` is a no-op because
    the reference code stretches the map over the whole image.
    """

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @classmethod
    def to_multiple(cls, height: int, width: int, patch_size: int, rule: str = "pad") -> "Padding":
        """Padding of a height x width image to multiples of `patch_size`, split evenly, an odd one bottom right.

        Args:
            height: Of the image.
            width: Of the image.
            patch_size: Side of a patch in pixels.
            rule: One of `ODD_SIZE_RULES`.
        """
        if rule not in ODD_SIZE_RULES:
            raise ValueError(f"odd_sizes must be one of {ODD_SIZE_RULES}, got {rule!r}")
        if rule == "drop" and min(height, width) >= patch_size:
            return cls(0, 0, -(height % patch_size), -(width % patch_size))
        extra_h, extra_w = -height % patch_size, -width % patch_size
        return cls(extra_h // 2, extra_w // 2, extra_h - extra_h // 2, extra_w - extra_w // 2)

    def apply(self, pixel_values: Tensor) -> Tensor:
        """Zero-pad (or cut) normalised pixels, (..., H, W)."""
        if not any((self.top, self.left, self.bottom, self.right)):
            return pixel_values
        return F.pad(pixel_values, (self.left, self.right, self.top, self.bottom))

    def crop(self, maps: Tensor) -> Tensor:
        """Cut the padding off maps that have the padded image's size, (..., H, W)."""
        height, width = maps.shape[-2:]
        return maps[..., self.top : height - max(self.bottom, 0), self.left : width - max(self.right, 0)]


@dataclass
class TrunkOutput:
    """Result of one pass through blocks 1..n-1.

    Attributes:
        last_input: Input of the last block, (B, L, W) with L = h*w + 1, CLS first.
        grid: Patches per column and row, (h, w).
        padding: What was added around the image.
        pixel_values: The padded, normalised image, (B, 3, H, W).
        hidden_states: The requested states, index -> (B, L, W).
        attention_maps: The requested maps, block -> (B, heads, L, L).
        map_sums: The requested sums of maps, group of blocks -> (B, heads, L, L) float32.
        heads: The requested projections, block -> (q, k, v), each (B, heads, L, d).
    """

    last_input: Tensor
    grid: tuple[int, int]
    padding: Padding
    pixel_values: Tensor
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attention_maps: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    map_sums: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of the padded image in pixels."""
        return self.pixel_values.shape[-2], self.pixel_values.shape[-1]


class VisionTower:
    """Read access to the parts of a transformers CLIP image tower (`CLIPModel` or `CLIPVisionModelWithProjection`).

    It owns no weights and changes none: it is a view, cheap to make.
    """

    def __init__(self, clip: Any):
        vision: Any = getattr(clip, "vision_model", None)
        if vision is None or not hasattr(clip, "visual_projection"):
            raise TypeError(
                f"expected a transformers CLIPModel or CLIPVisionModelWithProjection, got {type(clip).__name__}"
            )
        self.embeddings = vision.embeddings
        self.pre_norm = vision.pre_layrnorm
        self.blocks: Sequence[Any] = vision.encoder.layers
        self.post_norm = vision.post_layernorm
        self.projection = clip.visual_projection
        self._temperature = getattr(clip, "logit_scale", None)

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks n; the trunk runs n - 1 of them."""
        return len(self.blocks)

    @property
    def last_block(self) -> Any:
        """The block that the dense methods change."""
        return self.blocks[-1]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.embeddings.patch_size

    @property
    def logit_scale(self) -> float:
        """CLIP's learned temperature tau = exp(logit_scale); 100 for an image tower without one."""
        return 100.0 if self._temperature is None else float(self._temperature.detach().exp())

    def project(self, tokens: Tensor) -> Tensor:
        """Post-LayerNorm and visual projection on every token, (B, L, W) -> (B, L, D)."""
        return self.projection(self.post_norm(tokens))

    @property
    def own_grid(self) -> tuple[int, int]:
        """Patches per column and row for which the position table was made."""
        side = int((self.embeddings.position_embedding.weight.shape[0] - 1) ** 0.5)
        return side, side

    def position_table(self, grid: tuple[int, int], rule: str = "reference") -> Tensor:
        """The position table for a grid of patches, (1 + h*w, W).

        Args:
            grid: Patches per column and row (h, w).
            rule: "reference" is what SCLIP, ClearCLIP, NACLIP and ResCLIP compute: the table as it is when the number
                of patches equals the table's (also for a non-square grid), else bicubic with the scale factors
                ((h + 0.1) / g, (w + 0.1) / g) used for the coordinates. "bilinear" (CLIPer, CLIP Surgery), "antialias"
                (GEM, bicubic with antialiasing) and "transformers" (bicubic) resize to size=(h, w).

        Raises:
            ValueError: The rule is unknown.
        """
        if rule not in POSITION_RULES:
            raise ValueError(f"position_rule must be one of {POSITION_RULES}, got {rule!r}")
        table = self.embeddings.position_embedding.weight
        height, width = grid
        side = self.own_grid[0]
        same = height * width == side * side if rule == "reference" else (height, width) == (side, side)
        if same:
            return table
        patches = table[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, W, g, g)
        if rule == "reference":
            factors = ((height + 0.1) / side, (width + 0.1) / side)
            patches = F.interpolate(patches.float(), scale_factor=factors, mode="bicubic", align_corners=False)
        else:
            mode = "bilinear" if rule == "bilinear" else "bicubic"
            antialias = rule == "antialias"
            patches = F.interpolate(patches.float(), size=grid, mode=mode, align_corners=False, antialias=antialias)
        return torch.cat([table[:1], patches[0].flatten(1).T.to(table.dtype)])  # (1 + h*w, W)

    def embed(self, pixel_values: Tensor, position_rule: str = "reference") -> tuple[Tensor, tuple[int, int]]:
        """Patch embedding, CLS token, position table and pre-norm: (B, 3, H, W) -> (B, L, W) and the grid.

        Args:
            pixel_values: Whole patches, (B, 3, H, W).
            position_rule: One of `POSITION_RULES`.
        """
        convolution = self.embeddings.patch_embedding
        patches = convolution(pixel_values.to(convolution.weight.dtype))  # (B, W, h, w)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)  # (B, N, W)
        cls = self.embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + self.position_table(grid, position_rule)
        return self.pre_norm(tokens), grid

    def run(
        self,
        pixel_values: Tensor,
        request: TrunkRequest | None = None,
        odd_sizes: str = "pad",
        gradient_checkpointing: bool = False,
    ) -> TrunkOutput:
        """Run embeddings and blocks 1..n-1.

        Args:
            pixel_values: Normalised images of any size, (B, 3, H, W).
            request: What to keep; by default only the input of the last block.
            odd_sizes: "pad" adds zero pixels around the image up to whole patches; "drop" leaves out the remainder as
                the SCLIP, NACLIP and ResCLIP code does.
            gradient_checkpointing: Recompute the blocks in the backward pass (only useful when adapters train).

        Raises:
            ValueError: Wrong number of dimensions, or a requested layer does not exist.
        """
        request = request or TrunkRequest()
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or min(pixel_values.shape) == 0:
            raise ValueError(f"pixel_values must be (B, 3, H, W) and not empty, got {tuple(pixel_values.shape)}")
        last = self.num_blocks - 1
        check_layers("hidden state", request.hidden_states, last)
        summed = [index for group in request.map_sums for index in group]
        check_layers("attention map of block", [*request.attention_maps, *summed], last - 1)
        check_layers("projections of block", request.heads, last - 1)

        padding = Padding.to_multiple(pixel_values.shape[-2], pixel_values.shape[-1], self.patch_size, odd_sizes)
        pixel_values = padding.apply(pixel_values)
        hidden, grid = self.embed(pixel_values, request.position_rule)
        output = TrunkOutput(hidden, grid, padding, pixel_values)
        for index in range(last):
            if index in request.hidden_states:
                output.hidden_states[index] = hidden
            totals = [self._sum_of(output, group, hidden) for group in request.map_sums if index in group]
            keep_map = index in request.attention_maps
            whole_map = keep_map or (bool(totals) and not plain_cpu(hidden))
            wanted = self.blocks[index], hidden, whole_map, index in request.heads
            if gradient_checkpointing and torch.is_grad_enabled():
                hidden, weights, heads = checkpoint(run_block, *wanted, use_reentrant=False)
            else:
                hidden, weights, heads = run_block(*wanted, () if whole_map else totals)
            if weights is not None:
                for total in totals:
                    total += weights
                if keep_map:
                    output.attention_maps[index] = weights
            if heads is not None:
                output.heads[index] = heads
        if last in request.hidden_states:
            output.hidden_states[last] = hidden
        output.last_input = hidden
        return output

    def _sum_of(self, output: TrunkOutput, group: tuple[int, ...], hidden: Tensor) -> Tensor:
        """The sum of a group's maps so far."""
        if group not in output.map_sums:
            batch, length = hidden.shape[:2]
            shape = (batch, self.last_block.self_attn.num_heads, length, length)
            output.map_sums[group] = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        return output.map_sums[group]


def check_layers(what: str, indices: Sequence[int], highest: int) -> None:
    """Raise ValueError when an index is outside 0..highest.

    Args:
        what: What the indices are of, for the message.
        indices: What was asked for.
        highest: The highest index allowed.
    """
    wrong = [index for index in indices if not 0 <= index <= highest]
    if wrong:
        raise ValueError(f"{what} {wrong} does not exist in this CLIP; allowed are 0 to {highest}")
