"""Label maps of many methods for one image: methods that see the same pixels share each pass through the trunk.

Passes are shared by input (size, interpolation, windows) and by the rule that resizes the position table. The decision
is `modeling.decision`'s, class chunk by class chunk, so that memory does not grow with the number of classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arm_hf.modeling.decision import MAX_CHUNK_VALUES, QueryMaps, background_queries, decide, window_boxes
from arm_hf.modeling.dense_clip import DenseCLIP, DenseFeatures, Member
from arm_hf.modeling.method import get_method
from arm_hf.modeling.pamr import PAMR
from arm_hf.modeling.prompts import Vocabulary
from arm_hf.protocols import InputRule, MethodSetup
from arm_hf.resizing import to_pixel_values

ARM_SUFFIX = " + ARM"


@dataclass(frozen=True)
class Row:
    """One row of a result table: a method with its setup, alone or refined by ARM.

    Attributes:
        setup: The method, and what its protocol says.
        arm: Whether ARM refines it.
        pamr: Iterations of PAMR.
        model: Whose ARM: the name of one of `SharedPass.models`; by default the pipeline's own.
    """

    setup: MethodSetup
    arm: bool = False
    pamr: int | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        """The method, with " + ARM" when refined, and whose where it is not the pipeline's."""
        whose = f" ({self.model})" if self.model is not None else ""
        return self.setup.method + (ARM_SUFFIX + whose if self.arm else "")

    @property
    def options(self) -> dict[str, Any]:
        """Settings of the method in this row."""
        return {**self.setup.options, **(self.setup.arm_options if self.arm else {})}


@dataclass(frozen=True)
class Found:
    """What was found in one image.

    Attributes:
        labels: Per row the label of every pixel, (H, W) int32; -1 is "none of the classes".
        seconds: Per row the time from the trunk's output to the labels.
        trunk_seconds: Per row the time of resizing and of the trunk passes it shares.
        passes: Number of trunk passes (all windows count as one).
    """

    labels: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]
    trunk_seconds: Mapping[str, float]
    passes: int


@dataclass
class _Job:
    """Features that are computed once, and the rows that are read from them."""

    member: Member
    words: Tensor
    vocabulary: Vocabulary
    rows: list[Row] = field(default_factory=list)


class SharedPass:
    """Runs all rows on an image.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        rows: What to compute.
        window_batch_size: Windows per pass; bounds memory.
        max_chunk_values: Bound on upsampled scores held at once.
        models: Further `ARMModel`s on the same CLIP, by the names that rows give.

    Raises:
        ValueError: A row asks for ARM and the model has none, or for a model that is not there or has another CLIP.
    """

    def __init__(
        self,
        pipe: Any,
        rows: Sequence[Row],
        window_batch_size: int = 16,
        max_chunk_values: int = MAX_CHUNK_VALUES,
        models: Mapping[str, Any] | None = None,
    ):
        self.pipe, self.model, self.rows = pipe, pipe.model, tuple(rows)
        self.models = dict(models or {})
        self.has_arm = hasattr(self.model, "arm")
        self.clip = self.model.clip if self.has_arm else self.model
        if any(row.arm and row.model is None for row in rows) and not self.has_arm:
            raise ValueError(f"the model is a {type(self.model).__name__} without ARM; evaluate with --arm off")
        for name in dict.fromkeys(row.model for row in rows if row.arm and row.model is not None):
            if name not in self.models:
                raise ValueError(f"a row wants the ARM of {name!r}; there are {', '.join(self.models) or 'none'}")
            if self.models[name].clip is not self.clip:
                raise ValueError(f"the model {name!r} has another CLIP than the pipeline; set its `clip` to that one")
        self.window_batch_size, self.max_chunk_values = window_batch_size, max_chunk_values
        self.patch_size = self.clip.config.vision_config.patch_size
        self.groups: dict[InputRule, dict[str, list[_Job]]] = {}  # by input, then by position rule
        for job in self._jobs():
            rules = self.groups.setdefault(job.rows[0].setup.input, {})
            rules.setdefault(job.member[3].position_rule, []).append(job)

    @property
    def num_passes(self) -> int:
        """Trunk passes per image at most; where no rule resizes the position table, different rules share one."""
        return sum(len(rules) for rules in self.groups.values())

    def describe(self) -> list[str]:
        """One line per trunk pass: what is seen, and who shares it."""
        lines = []
        for rule, positions in self.groups.items():
            for position, jobs in positions.items():
                names = dict.fromkeys(row.name for job in jobs for row in job.rows)
                lines.append(f"{', '.join(names)}: {rule.describe()}, position table: {position}")
        return lines

    def check(self) -> dict[str, str]:
        """Try every method on a few patches of noise; return why those that cannot run here cannot."""
        pixels = torch.randn(3, 4 * self.patch_size, 4 * self.patch_size, generator=torch.Generator().manual_seed(0))
        failed = {}
        for rule, positions in self.groups.items():
            dense = DenseCLIP(self.clip, rule.odd_sizes)
            for position, jobs in positions.items():
                for job in jobs:
                    try:
                        with torch.no_grad():
                            self._features(dense, position, [job], pixels[None])
                    except (ImportError, ValueError) as error:  # another model's features, or an extra
                        failed[job.member[0]] = str(error)
        return failed

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Found:
        """Segment one upright RGB image at its own size."""
        size = (image.height, image.width)
        labels: dict[str, np.ndarray] = {}
        seconds: dict[str, float] = {}
        trunk_seconds: dict[str, float] = {}
        passes = 0
        for rule, positions in self.groups.items():
            started = self._clock()
            pixels = self._pixels(image, rule)
            resizing = self._clock() - started
            boxes = window_boxes((pixels.shape[-2], pixels.shape[-1]), rule.window, rule.stride)
            dense = DenseCLIP(self.clip, rule.odd_sizes)
            top, left, bottom, right = boxes[0]
            merged: dict[str, list[_Job]] = {}
            for position, jobs in positions.items():
                merged.setdefault(dense.position_rule(position, (bottom - top, right - left)), []).extend(jobs)
            passes += len(merged)
            for position, jobs in merged.items():
                parts: dict[str, list[QueryMaps]] = {row.name: [] for job in jobs for row in job.rows}
                spent = dict.fromkeys(parts, 0.0)
                trunk_time = resizing
                for start in range(0, len(boxes), self.window_batch_size):
                    crops = torch.stack(
                        [pixels[:, t:b, le:r] for t, le, b, r in boxes[start : start + self.window_batch_size]]
                    )
                    trunk_time += self._run(dense, position, jobs, crops, parts, spent)
                for job in jobs:
                    for row in job.rows:
                        started = self._clock()
                        maps = QueryMaps.cat(parts.pop(row.name))
                        labels[row.name] = self._decide(row, job, maps, boxes, pixels, size)
                        seconds[row.name] = spent[row.name] + self._clock() - started
                        trunk_seconds[row.name] = trunk_time
        ordered = [row.name for row in self.rows]
        return Found(
            {name: labels[name] for name in ordered},
            {name: seconds[name] for name in ordered},
            {name: trunk_seconds[name] for name in ordered},
            passes,
        )

    def _jobs(self) -> list[_Job]:
        jobs: dict[tuple, _Job] = {}
        blocks = self.clip.config.vision_config.num_hidden_layers
        for row in self.rows:
            setup = row.setup
            method = get_method(setup.method)
            settings = method.settings(row.options)
            key = (setup.method, settings, setup.input, setup.labels, setup.background_words, setup.templates)
            if key not in jobs:
                vocabulary = setup.vocabulary()
                words = self.pipe.text_encoder.class_embeddings(vocabulary.queries, setup.templates)
                member = (setup.method, method, settings, method.request(settings, blocks))
                jobs[key] = _Job(member, words, vocabulary)
            jobs[key].rows.append(row)
        return list(jobs.values())

    def _pixels(self, image: Image.Image, rule: InputRule) -> Tensor:
        pixels = to_pixel_values(
            image,
            self.pipe.image_processor,
            interpolation=rule.interpolation,
            short_side=rule.short_side,
            long_side=rule.long_side,
            rounding=rule.rounding,
            patch_size=self.patch_size,
            processor_size=self.pipe._processor_size(rule.short_side),
        )
        return pixels.to(self.model.device, self.model.dtype)

    def _features(self, dense: DenseCLIP, position: str, jobs: Sequence[_Job], crops: Tensor) -> list[DenseFeatures]:
        trunk = dense.shared_trunk(crops, position, [job.member for job in jobs], self._layers(jobs))
        return [self._apply(dense, job, trunk) for job in jobs]

    def _apply(self, dense: DenseCLIP, job: _Job, trunk: Any) -> DenseFeatures:
        _, method, settings, _ = job.member
        rows = background_queries(job.vocabulary.class_of_query, job.vocabulary.background_index)
        return dense.apply(method, settings, trunk, job.words, rows)

    def _layers(self, jobs: Sequence[_Job]) -> Sequence[int]:
        models = {row.model for job in jobs for row in job.rows if row.arm}
        return sorted({layer for name in models for layer in self._arm_model(name).config.fusion_layers})

    def _arm_model(self, name: str | None) -> Any:
        return self.model if name is None else self.models[name]

    def _run(
        self,
        dense: DenseCLIP,
        position: str,
        jobs: Sequence[_Job],
        crops: Tensor,
        parts: dict[str, list[QueryMaps]],
        spent: dict[str, float],
    ) -> float:
        """One pass: append every row's scores to `parts`, add its time to `spent`, return the trunk's time."""
        started = self._clock()
        trunk = dense.shared_trunk(crops, position, [job.member for job in jobs], self._layers(jobs))
        trunk_time = self._clock() - started
        for job in jobs:
            started = self._clock()
            features = self._apply(dense, job, trunk)
            shared = self._clock() - started
            for row in job.rows:
                started = self._clock()
                reader = self._arm_model(row.model) if row.arm else dense
                parts[row.name].append(reader.maps_of(features, job.words))
                spent[row.name] += shared + self._clock() - started
        return trunk_time

    def _decide(
        self,
        row: Row,
        job: _Job,
        maps: QueryMaps,
        boxes: list[tuple[int, int, int, int]],
        pixels: Tensor,
        size: tuple[int, int],
    ) -> np.ndarray:
        setup, vocabulary, offset = row.setup, job.vocabulary, row.setup.offset
        if row.arm and offset:  # M_c has seen the background words; ARM itself chooses among the classes
            keep = [query for query, index in enumerate(vocabulary.class_of_query) if index >= offset]
            maps = maps.select_queries(keep)
            vocabulary, offset = Vocabulary(setup.labels), 0
        threshold = vocabulary.threshold
        if row.arm and maps.activation == "sigmoid":
            threshold = setup.arm_threshold if vocabulary.background_index is not None else None
        by_area = setup.area_threshold is not None and not row.arm and vocabulary.background_index is not None
        decision = decide(
            maps,
            boxes,
            (pixels.shape[-2], pixels.shape[-1]),
            vocabulary.class_of_query,
            num_classes=vocabulary.num_classes,
            output_size=size,
            threshold=None if by_area else threshold,
            background_index=vocabulary.background_index,
            return_class_scores=by_area,
            refine=None if row.pamr is None else PAMR(pixels, row.pamr, size=size),
            max_chunk_values=self.max_chunk_values,
        )
        labels = decision.labels
        if by_area and decision.class_scores is not None:
            labels = drop_small_classes(
                decision.class_scores, labels, setup.area_threshold, vocabulary.background_index, threshold
            )
        return labels.cpu().numpy().astype(np.int32) - offset

    def _clock(self) -> float:
        """Seconds, with the accelerator's queue emptied first."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def drop_small_classes(
    scores: Tensor, labels: Tensor, share: float | None, background: int | None, threshold: float | None
) -> Tensor:
    """SCLIP's area rule: classes that hold at most `share` of the foreground leave, and the rest decides anew.

    Args:
        scores: Of all classes, (K, H, W).
        labels: Their first decision, (H, W).
        share: Of the pixels that are not background.
        background: Index of the background class.
        threshold: Winning score below which a pixel then becomes background, or None.
    """
    counts = torch.bincount(labels.flatten().long(), minlength=scores.shape[0])
    counts[background] = 0
    small = counts <= (share or 0.0) * counts.sum()
    small[background] = False
    best, labels = scores.masked_fill(small[:, None, None], 0).max(dim=0)
    if threshold is not None and background is not None:
        labels = labels.masked_fill(best < threshold, background)
    return labels.to(torch.int32)
