"""Dense CLIP: trunk once, a method's last block, cosine with the words; windows and batches around it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cliptrase_method import CLIPTRASE_METHODS
from .cra_dsi import CRA_DSI_METHODS
from .decision import MAX_CHUNK_VALUES, Decision, QueryMaps, background_queries, decide, window_boxes
from .dual_path_methods import DUAL_PATH_METHODS
from .last_block_methods import LAST_BLOCK_METHODS
from .layer_fusion_methods import LAYER_FUSION_METHODS
from .method import Method, MethodContext, ScoreMap, get_method
from .outside import cut_to_windows, whole_regions
from .pamr import PAMR, check_iterations
from .proxy_methods import PROXY_METHODS
from .regions import correct_confidence, correct_labels
from .resclip import RESCLIP_METHODS
from .trunk import COMMON_POSITION_RULE, Padding, TrunkOutput, TrunkRequest, VisionTower

BUILT_IN_METHODS = (
    *LAST_BLOCK_METHODS,
    *LAYER_FUSION_METHODS,
    *DUAL_PATH_METHODS,
    *CLIPTRASE_METHODS,
    *RESCLIP_METHODS,
    *CRA_DSI_METHODS,
    *PROXY_METHODS,
)
"""Methods that come with the package; importing their files registers them."""

Member = tuple[str, Method, Any, TrunkRequest]
"""A method in a group that shares a trunk pass: name, method, settings, request."""


@dataclass
class DenseFeatures:
    """Patch features of one method, with everything that led to them.

    Attributes:
        patch_features: F_d after post-norm and projection, not normalised, (B, h, w, D).
        trunk: The trunk pass (hidden states, attention maps, padding).
        method: The method.
        settings: Its settings.
        context: What the method was given.
    """

    patch_features: Tensor
    trunk: TrunkOutput
    method: Method
    settings: Any
    context: MethodContext

    def hidden_patches(self, layers: Sequence[int]) -> list[Tensor]:
        """Patch tokens (CLS dropped) of kept hidden states, each (B, N, W)."""
        return [self.trunk.hidden_states[layer][:, 1:] for layer in layers]


class DenseCLIP:
    """A transformers `CLIPModel` as a dense encoder.

    Example:

    ```python
    >>> import torch
    >>> from transformers import CLIPConfig, CLIPModel
    >>> from arm_hf import DenseCLIP

    >>> dense = DenseCLIP(CLIPModel(CLIPConfig()).eval())
    >>> with torch.no_grad():
    ...     features = dense.features(torch.zeros(1, 3, 96, 150), method="sclip")
    >>> features.patch_features.shape  # 96 x 150 pixels are 3 x 5 patches of 32
    torch.Size([1, 3, 5, 512])

    ```

    Args:
        clip: The model; it is used as it is and never changed.
        odd_sizes: What happens to sizes that are no multiple of the patch: "pad" or "drop" (see `VisionTower.run`).
    """

    def __init__(self, clip: Any, odd_sizes: str = "pad"):
        self.clip = clip
        self.tower = VisionTower(clip)
        self.odd_sizes = odd_sizes

    @property
    def logit_scale(self) -> float:
        """CLIP's learned temperature tau = exp(logit_scale); 100, CLIP's upper bound, for an image tower alone."""
        return self.tower.logit_scale

    def run_trunk(self, pixel_values: Tensor, request: TrunkRequest | None = None, **kwargs: Any) -> TrunkOutput:
        """One pass through blocks 1..n-1; `request` may be the union of several methods' requests.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            request: What to keep; may be the union of several methods' requests.
            kwargs: Other arguments of `VisionTower.run`.
        """
        return self.tower.run(pixel_values, request, odd_sizes=self.odd_sizes, **kwargs)

    def features(
        self,
        pixel_values: Tensor,
        method: str | Method = "clearclip",
        method_options: Mapping[str, Any] | None = None,
        *,
        hidden_states: Sequence[int] = (),
        class_embeddings: Tensor | None = None,
        background_queries: Sequence[int] = (),
        outside: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> DenseFeatures:
        """Patch features of a method.

        Args:
            pixel_values: Normalised images of any size, (B, 3, H, W).
            method: Name or instance of a registered method.
            method_options: Its settings.
            hidden_states: Further hidden states to keep, e.g. ARM's fusion layers.
            class_embeddings: Query vectors (Q, D), for methods that need them.
            background_queries: Rows of `class_embeddings` that describe the background.
            outside: Features of other models, for methods that use them.
            gradient_checkpointing: Passed to the trunk.

        Raises:
            ValueError: Unknown method, wrong shape, or the method needs class embeddings and got none.
            TypeError: Unknown setting.
        """
        method = get_method(method) if isinstance(method, str) else method
        settings = method.settings(method_options)
        request = method.request(settings, self.tower.num_blocks)
        request = request.merge(TrunkRequest(tuple(hidden_states), position_rule=request.position_rule))
        trunk = self.run_trunk(pixel_values, request, gradient_checkpointing=gradient_checkpointing)
        return self.apply(method, settings, trunk, class_embeddings, background_queries, outside)

    def group_by_position_rule(
        self, methods: Mapping[str, Mapping[str, Any] | None], size: tuple[int, int]
    ) -> dict[str, list[Member]]:
        """Methods that can share a trunk pass, by position rule: name, method, settings and request of each.

        Args:
            methods: Settings by registered name.
            size: Height and width of the images in pixels.
        """
        groups: dict[str, list[Member]] = {}
        for name, options in methods.items():
            method = get_method(name)
            settings = method.settings(options)
            request = method.request(settings, self.tower.num_blocks)
            rule = self.position_rule(request.position_rule, size)
            groups.setdefault(rule, []).append((name, method, settings, request))
        return groups

    def position_rule(self, rule: str, size: tuple[int, int]) -> str:
        """A rule that gives images of this size the same position table; one for all where none resizes it.

        Args:
            rule: One of `POSITION_RULES`.
            size: Height and width of the images in pixels.
        """
        patch = self.tower.patch_size
        padding = Padding.to_multiple(*size, patch, self.odd_sizes)
        height, width = size[0] + padding.top + padding.bottom, size[1] + padding.left + padding.right
        return COMMON_POSITION_RULE if (height // patch, width // patch) == self.tower.own_grid else rule

    def shared_trunk(
        self, pixel_values: Tensor, rule: str, members: Sequence[Member], hidden_states: Sequence[int] = ()
    ) -> TrunkOutput:
        """One trunk pass that keeps what any of the members requests.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            rule: How the position table is resized.
            members: Methods that take this rule, or an equal one (see `position_rule`).
            hidden_states: Further states to keep.
        """
        request = TrunkRequest(tuple(hidden_states), position_rule=rule)
        for *_, wanted in members:
            request = request.merge(replace(wanted, position_rule=rule))
        return self.run_trunk(pixel_values, request)

    def apply(
        self,
        method: Method,
        settings: Any,
        trunk: TrunkOutput,
        class_embeddings: Tensor | None = None,
        background_queries: Sequence[int] = (),
        outside: Mapping[str, Any] | None = None,
    ) -> DenseFeatures:
        """A method's patch features from a trunk pass that kept what the method requests.

        Args:
            method: The method.
            settings: Its settings.
            trunk: A pass that kept what it requests.
            class_embeddings: The words, (Q, D), for methods that need them.
            background_queries: Rows of these that describe the background.
            outside: Features and maps of other models.
        """
        if method.needs_words(settings) and class_embeddings is None:
            raise ValueError(f"method {method.name!r} needs class_embeddings: its features depend on the words")
        context = MethodContext(self.tower, trunk, class_embeddings, tuple(background_queries), outside or {})
        patch_features = method.patch_features(context, settings)
        if patch_features.ndim == 3:
            patch_features = patch_features.unflatten(1, trunk.grid)
        return DenseFeatures(patch_features, trunk, method, settings, context)

    def score_map(self, features: DenseFeatures, class_embeddings: Tensor) -> ScoreMap:
        """Scores of a method: its own, or the cosine of patch features and class embeddings, (B, Q, h, w).

        Args:
            features: From `features` or `apply`.
            class_embeddings: L2-normalised, (Q, D).
        """
        own = features.method.score_map(features.context, features.settings, features.patch_features)
        if own is not None:
            return own
        patches = F.normalize(features.patch_features, dim=-1)
        classes = F.normalize(class_embeddings.to(patches.dtype), dim=-1)
        scale = features.settings.logit_scale
        return ScoreMap(
            (patches @ classes.T).permute(0, 3, 1, 2), "softmax", self.logit_scale if scale is None else scale
        )

    def query_maps(
        self,
        pixel_values: Tensor,
        class_embeddings: Tensor,
        method: str | Method = "clearclip",
        method_options: Mapping[str, Any] | None = None,
        logit_scale: float | None = None,
        background_queries: Sequence[int] = (),
        outside: Mapping[str, Any] | None = None,
    ) -> QueryMaps:
        """Scores of a batch of images, ready for `decide`.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            class_embeddings: L2-normalised, (Q, D).
            method: Registered name, or a method.
            method_options: Settings of the method.
            logit_scale: Replaces the method's factor inside the softmax.
            background_queries: Rows of `class_embeddings` that describe the background.
            outside: Features and maps of other models.
        """
        features = self.features(
            pixel_values,
            method,
            method_options,
            class_embeddings=class_embeddings,
            background_queries=background_queries,
            outside=outside,
        )
        return self.maps_of(features, class_embeddings, logit_scale)

    def maps_of(self, features: DenseFeatures, class_embeddings: Tensor, logit_scale: float | None = None) -> QueryMaps:
        """Scores from features that were computed before, ready for `decide`.

        Args:
            features: From `features` or `apply`.
            class_embeddings: L2-normalised, (Q, D).
            logit_scale: Factor on the cosines in place of the method's.
        """
        scores = self.score_map(features, class_embeddings)
        scale = scores.scale if logit_scale is None else logit_scale
        trunk = features.trunk
        return QueryMaps(
            scores.values, None, None, scores.activation, scale, trunk.padding, trunk.padded_size, scores.gate
        )

    @torch.no_grad()
    def segment(self, pixel_values: Tensor, class_embeddings: Tensor, **kwargs: Any) -> list[Decision]:
        """Label maps of a batch of images; see `segment_images` for window, size and background arguments.

        `method`, `method_options` and `logit_scale` go to `query_maps`.

        Args:
            pixel_values: Normalised images, (B, 3, H, W).
            class_embeddings: L2-normalised, (Q, D).
            kwargs: Arguments of `query_maps` and of `segment_images`.
        """
        names = ("method", "method_options", "logit_scale")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        options["background_queries"] = background_queries(kwargs.get("class_of_query"), kwargs.get("background_index"))
        return segment_images(
            lambda pixels, outside=None: self.query_maps(pixels, class_embeddings, outside=outside, **options),
            pixel_values,
            num_queries=class_embeddings.shape[0],
            **kwargs,
        )


def segment_images(
    maps_of: Callable[..., QueryMaps],
    pixel_values: Tensor,
    *,
    num_queries: int,
    class_of_query: Sequence[int] | None = None,
    num_classes: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    window: int | None = None,
    stride: int | None = None,
    window_batch_size: int = 16,
    outside: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    background_index: int | None = None,
    return_class_scores: bool = False,
    pamr: int | None = None,
    compensate: Callable[[QueryMaps, int], QueryMaps] | None = None,
    correct_regions: bool = False,
    max_chunk_values: int = MAX_CHUNK_VALUES,
) -> list[Decision]:
    """Segment a batch of equally sized images, whole or window by window.

    Args:
        maps_of: Scores of a batch of pixels, such as `DenseCLIP.query_maps`.
        pixel_values: Normalised images, (B, 3, H, W).
        num_queries: Q.
        class_of_query: Class of each query; by default each query is its own class.
        num_classes: Number of classes, if higher than the indices show.
        sizes: Height and width of each result; by default the input's.
        window: Side of the square sliding window in pixels of the input; None looks at the whole image.
        stride: Step of the window; half the window by default.
        window_batch_size: Windows (of all images together) per forward pass; bounds memory.
        outside: Features and maps of other models (see `outside.py`), cut to the windows and given to `maps_of` by that
            name; without them `maps_of` gets pixels alone.
        threshold: See `decide`.
        background_index: See `decide`.
        return_class_scores: See `decide`.
        pamr: Rounds of PAMR on the upsampled scores, guided by the image at the size of the result; 10 in NACLIP's
            published numbers. None leaves it out.
        compensate: Step on the scores of each whole image on their grid, given the image's index in the batch, such as
            Stable-Diffusion compensation.
        correct_regions: Give all pixels of a region of `outside["regions"]` the region's most frequent label, at the
            size of the result (CorrCLIP's map correction). Scores of all classes stay as they are.
        max_chunk_values: See `decide`.

    Returns:
        One `Decision` per image.
    """
    if window_batch_size < 1:
        raise ValueError(f"window_batch_size must be at least 1, got {window_batch_size}")
    if pamr is not None:
        check_iterations(pamr)
    image_size = (pixel_values.shape[-2], pixel_values.shape[-1])
    boxes = window_boxes(image_size, window, stride)
    if compensate is not None and len(boxes) > 1:
        raise ValueError("compensation works on whole images; leave window out, or choose one as large as the image")
    class_of_query = range(num_queries) if class_of_query is None else class_of_query
    crops = [(image, box) for image in pixel_values for box in boxes]  # views, image after image
    places = [(index, box) for index in range(pixel_values.shape[0]) for box in boxes]
    parts = []
    for start in range(0, len(crops), window_batch_size):
        members = slice(start, start + window_batch_size)
        batch = torch.stack([image[:, top:bottom, left:right] for image, (top, left, bottom, right) in crops[members]])
        if outside is None:
            parts.append(maps_of(batch))
        else:
            cut = cut_to_windows(outside, places[members], image_size, pixel_values.shape[0])
            parts.append(maps_of(batch, outside=cut))
    maps = QueryMaps.cat(parts)
    decisions = []
    for index, image in enumerate(pixel_values):
        size = image_size if sizes is None else sizes[index]
        regions = whole_regions(outside, pixel_values, index) if correct_regions else None
        image_maps = maps.select(slice(index * len(boxes), (index + 1) * len(boxes)))
        decision = decide(
            image_maps if compensate is None else compensate(image_maps, index),
            boxes,
            image_size,
            class_of_query,
            num_classes=num_classes,
            output_size=size,
            threshold=threshold,
            background_index=background_index,
            return_class_scores=return_class_scores,
            refine=None if pamr is None else PAMR(image, pamr, size=size),
            max_chunk_values=max_chunk_values,
        )
        if regions is not None:
            corrected = correct_labels(decision.labels, regions)
            confidence = correct_confidence(decision.confidence, decision.labels, corrected, regions)
            decision = replace(decision, labels=corrected, confidence=confidence)
        decisions.append(decision)
    return decisions
