"""From low-resolution per-query scores to a label map: upsample, average windows, activate, decide.

The upsampled scores of all queries together (Q x H x W) are never in memory unless they are asked for: queries are
processed in chunks, with a running maximum and a running log-sum-exp.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arm import fuse, refinement_map
from .method import ScoreGate
from .trunk import Padding

MAX_CHUNK_VALUES = 2**24  # 64 MiB of float32 upsampled scores at a time


@dataclass
class QueryMaps:
    """Per-query scores of a batch on a grid, with the refinement added only for the queries that are looked at.

    Attributes:
        coarse: M_c, (B, Q, h, w).
        refinement_features: R_v, (B, D, H', W'), or M_r, (B, Q, H', W'), if there are no `class_embeddings`; None
            without ARM.
        class_embeddings: E_t, (Q, D); needed with R_v.
        activation: "softmax" over queries, "sigmoid" per query, or "none".
        scale: Factor on the scores before "softmax" or "none".
        padding: What was added around the image, in pixels.
        padded_size: Height and width of the padded image.
        gate: The method's rule for what becomes background, with "none" as the activation.
        peaks: Maximum of every query that the gate goes by, (B, Q); by default that of the maps.
    """

    coarse: Tensor
    refinement_features: Any
    class_embeddings: Any
    activation: str
    scale: float
    padding: Padding
    padded_size: tuple[int, int]
    gate: ScoreGate | None = None
    peaks: Tensor | None = None

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.coarse.shape[1]

    def chunk(self, start: int = 0, stop: int | None = None) -> Tensor:
        """M_f = M_c + E_t R_v of queries start..stop, (B, q, H', W').

        Args:
            start: First query.
            stop: One past the last; None takes all.
        """
        coarse = self.coarse[:, start:stop]
        if self.refinement_features is None:
            return coarse
        if self.class_embeddings is None:
            return fuse(coarse, self.refinement_features[:, start:stop])
        return fuse(coarse, refinement_map(self.refinement_features, self.class_embeddings[start:stop]))

    def select(self, index: slice) -> "QueryMaps":
        """The maps of some images of the batch."""
        features = self.refinement_features
        return replace(
            self,
            coarse=self.coarse[index],
            refinement_features=None if features is None else features[index],
            peaks=None if self.peaks is None else self.peaks[index],
        )

    def select_queries(self, queries: Sequence[int]) -> "QueryMaps":
        """The maps of some queries."""
        features, words, chosen = self.refinement_features, self.class_embeddings, list(queries)
        if words is None:
            return replace(
                self,
                coarse=self.coarse[:, chosen],
                refinement_features=None if features is None else features[:, chosen],
            )
        return replace(self, coarse=self.coarse[:, chosen], class_embeddings=words[chosen])

    @classmethod
    def cat(cls, parts: Sequence["QueryMaps"]) -> "QueryMaps":
        """Join batches that have the same geometry and queries."""
        if len(parts) == 1:
            return parts[0]
        features = [part.refinement_features for part in parts]
        return replace(
            parts[0],
            coarse=torch.cat([part.coarse for part in parts]),
            refinement_features=None if features[0] is None else torch.cat(features),
        )


@dataclass
class Decision:
    """What is decided for one image.

    Attributes:
        labels: Class index per pixel, (H, W), int32.
        confidence: Score of that class in [0, 1], (H, W); where the threshold chose the background, one minus the best
            class's score.
        class_scores: Scores of all classes (K, H, W), only if asked for.
    """

    labels: Tensor
    confidence: Tensor
    class_scores: Tensor | None = None


def window_boxes(size: tuple[int, int], window: int | None, stride: int | None) -> list[tuple[int, int, int, int]]:
    """Boxes (top, left, bottom, right) of a sliding window over an image, row by row.

    The rule is that of the reference code: max(L - window + stride - 1, 0) // stride + 1 windows per axis; the last one
    is shifted back to end at the border; an axis shorter than the window is covered by one box of its own length.

    Args:
        size: Height and width of the image.
        window: Side of a window in pixels; None is the whole image.
        stride: Step in pixels; half a window by default.

    Raises:
        ValueError: The window is not positive, or the stride is not in 1..window (pixels would be left out).
    """
    height, width = size
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride} has no effect without window; give both or neither")
        return [(0, 0, height, width)]
    stride = max(1, window // 2) if stride is None else stride
    if window < 1:
        raise ValueError(f"window must be at least 1 pixel, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be between 1 and window ({window}), else pixels are skipped; got {stride}")

    def starts(length: int) -> list[int]:
        count = max(length - window + stride - 1, 0) // stride + 1
        return [max(min(i * stride + window, length) - window, 0) for i in range(count)]

    return [
        (top, left, min(top + window, height), min(left + window, width))
        for top in starts(height)
        for left in starts(width)
    ]


def background_queries(class_of_query: Sequence[int] | None, background_index: int | None) -> tuple[int, ...]:
    """Queries that belong to the background class; none without a background class.

    Args:
        class_of_query: Class index of each query.
        background_index: Index of the background class, or None.
    """
    if class_of_query is None or background_index is None:
        return ()
    return tuple(query for query, index in enumerate(class_of_query) if index == background_index)


def upsample(maps: QueryMaps, boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int], start: int, stop: int):
    """Scores of queries start..stop on the whole image: windows upsampled, cropped and averaged, (q, H, W).

    Args:
        maps: One batch entry per box.
        boxes: Where each window lies in the image (top, left, bottom, right).
        size: Height and width of the image that the boxes refer to.
        start: First query.
        stop: One past the last query.
    """
    scores = maps.chunk(start, stop).float()
    top, left, bottom, right = boxes[0]  # all boxes have one size
    box_size = (bottom - top, right - left)
    # The rule "drop" stretches the map over the pixels that were left out, in this same step.
    target = box_size if min(maps.padding.bottom, maps.padding.right) < 0 else maps.padded_size
    if scores.shape[-2:] != target:
        scores = F.interpolate(scores, size=target, mode="bilinear", align_corners=False)
    scores = maps.padding.crop(scores)
    if len(boxes) == 1:
        return scores[0]
    total = scores.new_zeros(scores.shape[1], *size)
    visits = scores.new_zeros(size)
    for window, (top, left, bottom, right) in zip(scores, boxes, strict=True):
        total[:, top:bottom, left:right] += window
        visits[top:bottom, left:right] += 1
    return total / visits


def decide(
    maps: QueryMaps,
    boxes: Sequence[tuple[int, int, int, int]],
    image_size: tuple[int, int],
    class_of_query: Sequence[int],
    *,
    num_classes: int | None = None,
    output_size: tuple[int, int] | None = None,
    threshold: float | None = None,
    background_index: int | None = None,
    return_class_scores: bool = False,
    refine: Callable[[Tensor], Tensor] | None = None,
    max_chunk_values: int = MAX_CHUNK_VALUES,
) -> Decision:
    """Decide the class of every pixel of one image.

    Scores are upsampled to the network's input, averaged over windows, resized to `output_size`, activated (softmax
    over the queries, or sigmoid), reduced to classes by the maximum over a class's queries, and the best class wins; on
    ties the first. Where the winner's score is below `threshold` the background class is written.

    Args:
        maps: Scores of the image's windows (one entry if the image was seen whole).
        boxes: The windows, from `window_boxes`.
        image_size: Height and width of the image the network saw.
        class_of_query: Class index of each query.
        num_classes: Number of classes; by default one more than the highest index.
        output_size: Height and width of the result; by default `image_size`.
        threshold: Score in (0, 1) below which a pixel becomes background, or None.
        background_index: Class index to write there.
        return_class_scores: Also return the scores of all classes, K x H x W floats.
        refine: Step on the scores of some queries at the output size before the activation, (q, H, W) to same, such
            as `PAMR`. Queries come in chunks, so it must treat each alone.
        max_chunk_values: Bound on upsampled scores held at once; changes memory, not the result.

    A method's own gate (`QueryMaps.gate`) decides before all this what counts as background; queries of the background
    class then only compete inside the method.

    Raises:
        ValueError: A threshold or a gate without a background class, or the number of queries does not fit.
    """
    if threshold is not None and background_index is None:
        raise ValueError("a background threshold needs a background class; give background_index")
    if maps.gate is not None and background_index is None:
        raise ValueError("the method's background_threshold needs a background class; name one, or set it to None")
    if len(class_of_query) != maps.num_queries:
        raise ValueError(f"{len(class_of_query)} class indices for {maps.num_queries} queries")
    size = output_size or image_size
    num_classes = num_classes or max(class_of_query) + 1
    device = maps.coarse.device
    class_index = torch.tensor(class_of_query, device=device)
    step = max(1, max_chunk_values // max(size[0] * size[1], image_size[0] * image_size[1]))

    direct = maps.gate is not None and len(boxes) == 1 and maps.padded_size == image_size
    best = torch.full(size, -torch.inf, device=device)
    labels = torch.zeros(size, dtype=torch.int32, device=device)
    log_sum = torch.full(size, -torch.inf, device=device) if maps.activation == "softmax" else None
    class_best = torch.full((num_classes, *size), -torch.inf, device=device) if return_class_scores else None
    for start in range(0, maps.num_queries, step):
        stop = min(start + step, maps.num_queries)
        # CLIPer's code goes to the output size in one step, the others over the size that the network saw.
        scores = maps.chunk(start, stop)[0].float() if direct else upsample(maps, boxes, image_size, start, stop)
        if scores.shape[-2:] != size:
            scores = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
        if refine is not None:
            scores = refine(scores)
        if maps.gate is not None:
            peaks = (
                maps.chunk(start, stop).float().amax(dim=(0, 2, 3)) if maps.peaks is None else maps.peaks[0, start:stop]
            )
            scores = maps.gate(scores, peaks)
            scores[class_index[start:stop] == background_index] = 0
        if log_sum is not None:
            scores = scores * maps.scale
            log_sum = torch.logaddexp(log_sum, scores.logsumexp(dim=0))
        chunk_best, chunk_index = scores.max(dim=0)
        better = chunk_best > best
        best = torch.where(better, chunk_best, best)
        labels = torch.where(better, class_index[start:stop][chunk_index].to(torch.int32), labels)
        if class_best is not None:
            for offset, index in enumerate(class_of_query[start:stop]):
                torch.maximum(class_best[index], scores[offset], out=class_best[index])

    def activate(values: Tensor) -> Tensor:
        if log_sum is not None:
            return (values - log_sum).exp()
        return values.sigmoid() if maps.activation == "sigmoid" else values * maps.scale

    if maps.gate is not None and background_index is not None:
        labels = labels.masked_fill(best <= 0, background_index)  # no class passed
    confidence = activate(best)
    class_scores = None if class_best is None else activate(class_best).nan_to_num(neginf=0.0)  # -inf: a wordless class
    if threshold is not None and background_index is not None:
        unsure = (confidence < threshold) & (labels != background_index)
        if class_scores is not None:
            class_scores[background_index] = torch.where(unsure, 1 - confidence, class_scores[background_index])
        confidence = torch.where(unsure, 1 - confidence, confidence)
        labels = labels.masked_fill(unsure, background_index)
    return Decision(labels, confidence, class_scores)
