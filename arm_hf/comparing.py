"""Several methods on one photo: one trunk pass for all of them, a grid picture, and the time each adds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from arm_hf.drawing import overlay, segments
from arm_hf.legend import add_legend
from arm_hf.modeling.decision import Decision, QueryMaps, background_queries, decide
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.method import get_method, list_methods
from arm_hf.modeling.prompts import Vocabulary
from arm_hf.modeling.trunk import COMMON_POSITION_RULE
from arm_hf.sheets import tile_sheet

ARM_CHOICES = ("off", "on", "both")


@dataclass(frozen=True)
class Compared:
    """What one method found.

    Attributes:
        name: The method, with " + ARM" when refined.
        semantic_map: Class indices, (H, W) int32.
        confidence: Score of the winner, (H, W).
        seconds: Time from the trunk's output to the label map; the trunk itself is not in it.
    """

    name: str
    semantic_map: np.ndarray
    confidence: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All results for one photo.

    Attributes:
        results: In the order in which they were computed.
        left_out: Methods that could not run here, with the reason.
        trunk_seconds: Time of the shared trunk passes.
        id2label: Class index to name.
    """

    results: tuple[Compared, ...]
    left_out: Mapping[str, str]
    trunk_seconds: float
    id2label: Mapping[int, str]


def parse_methods(names: str | Sequence[str]) -> list[str]:
    """Read "all" or a comma-separated list of registered methods.

    Raises:
        ValueError: A method is unknown or named twice.
    """
    if isinstance(names, str):
        if names.strip().lower() == "all":
            return list_methods()
        names = [name.strip() for name in names.split(",")]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"name each method once, or say all; got {', '.join(names) or 'none'}")
    return [get_method(name).name for name in names]


@torch.no_grad()
def compare(
    pipe: Any,
    image: Image.Image,
    labels: Any,
    methods: Sequence[str],
    *,
    arm: str = "off",
    background: Any = None,
    size: int | None = None,
    templates: Any = None,
    common_input: bool = False,
) -> Comparison:
    """Run methods on one image with one trunk pass for all that resize the position table alike.

    Every method finds what it finds alone. With `common_input` all take one position table, whose form is that of most
    codes: one pass serves all, and what is left are the differences of the methods themselves.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        image: The photo.
        labels: See `parse_labels`.
        methods: Names of registered methods, with their default settings.
        arm: "off" shows the methods alone, "on" with ARM, "both" one after the other.
        background: Background policy.
        size: Shorter side in pixels that the network sees.
        templates: Prompt templates.
        common_input: Resize the position table for all methods alike.

    Raises:
        ValueError: `arm` is unknown, or asks for ARM and the model has none.
    """
    model = pipe.model
    has_arm = hasattr(model, "arm")
    if arm not in ARM_CHOICES:
        raise ValueError(f"arm must be one of {', '.join(ARM_CHOICES)}, got {arm!r}")
    if arm != "off" and not has_arm:
        raise ValueError(f"the model is a {type(model).__name__} without ARM; compare with --arm off")
    dense = model.dense if has_arm else DenseCLIP(model)
    item = pipe.preprocess(image, candidate_labels=labels, background=background, size=size)
    vocabulary: Vocabulary = item["vocabulary"][0]
    pixels = item["pixels"][0][None].to(model.device, model.dtype)
    shown = (pixels.shape[-2], pixels.shape[-1])
    templates = templates or getattr(model.config, "templates", None) or "imagenet80"
    words = pipe.text_encoder.class_embeddings(vocabulary.queries, templates)
    clock = _Clock(model.device)
    results, left_out, trunk_seconds = [], {}, 0.0

    def finish(maps: QueryMaps) -> Decision:
        return decide(
            maps,
            [(0, 0, *shown)],
            shown,
            vocabulary.class_of_query,
            num_classes=vocabulary.num_classes,
            output_size=item["original_size"][0],
            threshold=vocabulary.threshold,
            background_index=vocabulary.background_index,
        )

    layers = model.config.fusion_layers if arm != "off" else ()
    background_rows = background_queries(vocabulary.class_of_query, vocabulary.background_index)
    options = {"position_rule": COMMON_POSITION_RULE} if common_input else None
    for rule, members in dense.group_by_position_rule(dict.fromkeys(methods, options), shown).items():
        started = clock()
        trunk = dense.shared_trunk(pixels, rule, members, layers)
        trunk_seconds += clock() - started
        for name, method, settings, _ in members:
            started = clock()
            try:
                features = dense.apply(method, settings, trunk, words, background_rows)
            except (ImportError, ValueError) as error:  # wants another model's features, or an extra
                left_out[name] = str(error)
                continue
            shared = clock() - started
            heads: list[tuple[str, Callable[..., QueryMaps]]] = []
            if arm != "on":
                heads.append((name, dense.maps_of))
            if arm != "off":
                heads.append((f"{name} + ARM", model.maps_of))
            for title, maps_of in heads:
                started = clock()
                decision = finish(maps_of(features, words))
                seconds = shared + clock() - started
                results.append(
                    Compared(title, decision.labels.cpu().numpy(), decision.confidence.float().cpu().numpy(), seconds)
                )
    return Comparison(tuple(results), left_out, trunk_seconds, vocabulary.id2label)


def grid(image: Image.Image, comparison: Comparison, tile: int = 360, colors: str = "vivid") -> Image.Image:
    """All results side by side under one legend, the photo first.

    Args:
        image: The photo.
        comparison: Results of `compare`.
        tile: Longer side of a tile in pixels.
        colors: Palette, "vivid" or "colorblind".
    """
    tiles = [("photo", image)]
    for result in comparison.results:
        drawn = overlay(image, result.semantic_map, comparison.id2label, names=False, legend=False, colors=colors)
        tiles.append((f"{result.name}  {result.seconds * 1000:.0f} ms", drawn))
    everything = np.concatenate([result.semantic_map.ravel() for result in comparison.results])[None]
    return add_legend(tile_sheet(tiles, tile), segments(everything, comparison.id2label, colors), shares=False)


class _Clock:
    """Seconds, with the accelerator's queue emptied first."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
