"""What happens behind the page: photo and words in, label map, pictures and timings out. It knows nothing of a page."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arm_hf import DEFAULT_MODEL
from arm_hf.app.limits import Limits, read_background, read_labels, read_photo
from arm_hf.comparing import Comparison, compare, parse_methods
from arm_hf.drawing import indexed_png, overlay, segments
from arm_hf.legend import Segment
from arm_hf.modeling.method import list_methods
from arm_hf.modeling.prompts import Vocabulary
from arm_hf.modeling.proxy_methods import PROXY_METHODS
from arm_hf.segmenting import RunSettings, legend_record, load_pipeline, readable_json, run_record
from arm_hf.sheets import score_sheet

MODEL_DEFAULT = "the model's own"
MOST_SCORE_MAPS = 24
COMPARED_SIDE = 640


@dataclass(frozen=True)
class Asked:
    """What the page's fields say, as they are.

    Attributes:
        photo: Path of the uploaded file, or None.
        labels: Text of the labels field.
        background: Text of the background field; empty takes the model's policy.
        model: One of `Workshop.models`.
        method: Name of a method, or `MODEL_DEFAULT`.
        use_arm: Refine with ARM where the model has it.
        compensation: Sharpen with the Stable Diffusion the page was started with.
        size: Shorter side that the network sees; 0 takes the model's.
    """

    photo: str | None
    labels: str | None
    background: str | None = ""
    model: str = DEFAULT_MODEL
    method: str = MODEL_DEFAULT
    use_arm: bool = True
    compensation: bool = False
    size: int = 0


@dataclass(frozen=True)
class Found:
    """What was found in a photo.

    Attributes:
        photo: As the network's input was made from.
        semantic_map: Class indices, (H, W), 8 bits.
        confidence: Score of each pixel's class, (H, W), 8 bits for 0..1.
        id2label: Class index to name.
        segments: Classes that occur, the largest first.
        scores: Mean score of each of them inside its area.
        record: What the JSON says.
        score_maps: Sheet of the scores of each class, the one with the largest mean first; no more than
            `MOST_SCORE_MAPS`.
        facts: Sentences for the page: how long it took and what else there is to know.
    """

    photo: Image.Image
    semantic_map: np.ndarray
    confidence: np.ndarray
    id2label: dict[int, str]
    segments: list[Segment]
    scores: list[float]
    record: dict[str, Any]
    score_maps: Image.Image
    facts: list[str]


class Workshop:
    """The models of a page, loaded when first asked for, and the work done with them, one request at a time.

    Args:
        models: Names, folders or hub ids; the first is loaded now. Visitors see a folder's own name only.
        compensation: Hub id or folder of a Stable Diffusion checkpoint, or None.
        limits: Bounds of a request.
        device: As for `load_pipeline`.
        dtype: As for `load_pipeline`.

    Raises:
        ValueError: The first model cannot be loaded, or no model is named.
    """

    def __init__(
        self,
        models: Sequence[str] = (DEFAULT_MODEL,),
        compensation: str | None = None,
        limits: Limits | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ):
        if not models:
            raise ValueError("a page needs at least one model")
        self.compensation, self.limits = compensation, limits or Limits()
        self._sources: dict[str, str] = {}
        for source in dict.fromkeys(models):
            name, number = _public_name(source), 2
            while name in self._sources:  # two folders of one name
                name, number = f"{_public_name(source)} ({number})", number + 1
            self._sources[name] = source
        self._device, self._dtype = device, dtype
        self._pipes: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._pipe(self.models[0])

    @property
    def models(self) -> list[str]:
        """What visitors call the models."""
        return list(self._sources)

    @property
    def methods(self) -> list[str]:
        """Methods that can be asked for: all that need no other model's features."""
        return [name for name in list_methods() if name not in PROXY_METHODS]

    @property
    def first_has_arm(self) -> bool:
        """Whether the first model has an ARM."""
        return hasattr(self._pipe(self.models[0]).model, "arm")

    def segment(self, asked: Asked) -> Found:
        """Segment a photo.

        Raises:
            ValueError: One of the fields holds what cannot be done; the message is for the visitor.
        """
        settings, pipe = self._settings(asked), self._pipe(asked.model)
        photo, note = read_photo(asked.photo, self.limits)
        with self._lock:
            started = time.perf_counter()
            vocabulary = Vocabulary.build(settings.labels, pipe._background(settings.background))
            templates = getattr(pipe.model.config, "templates", None) or "imagenet80"
            pipe.text_encoder.class_embeddings(vocabulary.queries, templates)
            words_seconds, started = time.perf_counter() - started, time.perf_counter()
            result = pipe(photo, semantic=True, class_scores=True, **settings.call_arguments())
            photo_seconds = time.perf_counter() - started
        id2label = result["id2label"]
        found = segments(result["semantic_map"], id2label)
        score_of = {segment["label"]: round(float(segment["score"]), 4) for segment in result["segments"]}
        scores = [score_of[segment.label] for segment in found]
        record = run_record(pipe, settings, asked.model)
        if settings.compensation is not None:
            record["settings"]["compensation"] = _public_name(settings.compensation)
        used = record["settings"]
        refined = " with ARM" if used["use_arm"] else " without ARM"
        facts = [
            f"{asked.model}, {used['method']}{refined}: words {words_seconds:.2f} s, "
            f"photo {photo_seconds:.2f} s ({photo.width} × {photo.height} pixels)."
        ]
        if note:
            facts.append(note)
        if asked.use_arm and not used["use_arm"]:
            facts.append("This model has no ARM; the method's own map is shown.")
        legend = {"image": Path(asked.photo or "").name, **legend_record(photo.size, found, scores, id2label)}
        return Found(
            photo=photo,
            semantic_map=result["semantic_map"].astype(np.uint8),
            confidence=np.rint(255 * result["confidence"].clip(0, 1)).astype(np.uint8),
            id2label=id2label,
            segments=found,
            scores=scores,
            record={**legend, "seconds": {"words": words_seconds, "photo": photo_seconds}, **record},
            score_maps=score_sheet(photo, result["class_scores"], id2label, MOST_SCORE_MAPS),
            facts=facts,
        )

    def compare(self, asked: Asked, methods: Sequence[str], arm: str) -> tuple[Image.Image, Comparison]:
        """Run several methods on a photo with one shared pass; the photo comes back as it was used.

        Args:
            asked: The request.
            methods: Names of registered methods.
            arm: "off", "on" or "both".

        Raises:
            ValueError: As for `segment`, or no method is named, or ARM is asked for and the model has none.
        """
        settings, pipe = self._settings(asked), self._pipe(asked.model)
        if not methods:
            raise ValueError("tick at least one method to compare")
        known = self.methods
        names = parse_methods([name for name in known if name in methods])
        if arm != "off" and not hasattr(pipe.model, "arm"):
            raise ValueError(f"{asked.model} has no ARM; compare the methods alone")
        photo, _ = read_photo(asked.photo, self.limits)
        photo.thumbnail((COMPARED_SIDE, COMPARED_SIDE), Image.Resampling.LANCZOS)
        with self._lock:
            found = compare(
                pipe, photo, settings.labels, names, arm=arm, background=settings.background, size=settings.size
            )
        return photo, found

    def _settings(self, asked: Asked) -> RunSettings:
        if asked.model not in self.models:
            raise ValueError("this page does not have that model; choose one of the list")
        if asked.method != MODEL_DEFAULT and asked.method not in self.methods:
            raise ValueError("this page does not have that method; choose one of the list")
        if asked.compensation and self.compensation is None:
            raise ValueError("this page was started without a Stable Diffusion checkpoint")
        labels = read_labels(asked.labels, self.limits)
        background = read_background(asked.background, labels, self.limits)
        size = int(asked.size or 0)
        if size and not 32 <= size <= self.limits.network_side:
            raise ValueError(f"the network's side must lie between 32 and {self.limits.network_side}, got {size}")
        has_arm = hasattr(self._pipe(asked.model).model, "arm")
        return RunSettings(
            labels=labels,
            background=background and (asked.background or "").strip(),  # as typed: that is what the record shows
            method=None if asked.method == MODEL_DEFAULT else asked.method,
            use_arm=asked.use_arm if has_arm else None,
            compensation=self.compensation if asked.compensation else None,
            size=size or None,
        )

    def _pipe(self, model: str) -> Any:
        if model not in self._pipes:
            with self._lock:
                if model not in self._pipes:
                    self._pipes[model] = load_pipeline(self._sources[model], device=self._device, dtype=self._dtype)
        return self._pipes[model]


def write_files(found: Found, folder: Path, alpha: float, contours: bool, colors: str) -> tuple[str, str, str]:
    """Write picture, label map and legend into a folder and return their paths.

    Args:
        found: What was found.
        folder: Where to.
        alpha: Strength of the colours on the photo, 0 to 1.
        contours: Outline the patches and leave the photo's colours as they are.
        colors: Palette.
    """
    stem = Path(found.record["image"]).stem[:40] or "photo"
    alpha = min(max(alpha, 0.0), 1.0)
    picture = overlay(found.photo, found.semantic_map, found.id2label, alpha, colors=colors, contours=contours)
    paths = folder / f"{stem}_overlay.png", folder / f"{stem}_labels.png", folder / f"{stem}.json"
    picture.save(paths[0])
    indexed_png(found.semantic_map, found.id2label, colors).save(paths[1])
    paths[2].write_text(readable_json(found.record), encoding="utf-8")
    return str(paths[0]), str(paths[1]), str(paths[2])


def _public_name(model: str) -> str:
    """A folder's own name (visitors need not know where it lies), or the hub id as it is."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model
