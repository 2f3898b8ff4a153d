"""Segment picture files: settings of a run, the model, and the files each picture gives."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from arm_hf import __version__, resolve_model
from arm_hf.drawing import indexed_png, overlay, segments
from arm_hf.folders import ImageFile, OutputFiles, UnreadableImage, atomic_path, read_image
from arm_hf.legend import Segment
from arm_hf.modeling.decision import window_boxes
from arm_hf.modeling.dense_clip import get_method
from arm_hf.modeling.prompts import Label, Vocabulary, resolve_templates

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class RunSettings:
    """What a run does to every picture. `None` leaves the choice to the model or the pipeline.

    Attributes:
        labels: The classes to look for.
        background: Background policy: `"none"`, a threshold, words, or a mapping with both.
        method: Training-free method that the patch features come from.
        method_options: Its settings, by name.
        use_arm: Whether ARM refines the method's map.
        templates: Prompt templates, the name of a set or templates of your own.
        window: Side of the sliding window in pixels of the resized picture; the whole picture otherwise.
        stride: Step of the window.
        size: Shorter side in pixels that the network sees.
        logit_scale: Factor on the cosines inside the softmax.
        pamr: Rounds of PAMR on the scores.
        compensation: Hub id or folder of a Stable Diffusion checkpoint that sharpens the scores.
        batch_size: Pictures per forward pass.

    Raises:
        ValueError: If one of them is impossible, or the method has no such setting.
    """

    labels: tuple[Label, ...]
    background: Any = None
    method: str | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    use_arm: bool | None = None
    templates: str | Sequence[str] | None = None
    window: int | None = None
    stride: int | None = None
    size: int | None = None
    logit_scale: float | None = None
    pamr: int | None = None
    compensation: str | None = None
    batch_size: int = 1

    def __post_init__(self):
        Vocabulary.build(self.labels, self.background)
        if self.method is not None:
            _check_options(self.method, self.method_options)
        if self.templates is not None:
            resolve_templates(self.templates)
        window_boxes((1, 1), self.window, self.stride)
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {self.batch_size}")

    def call_arguments(self) -> dict[str, Any]:
        """Return the keywords of a call of the pipeline."""
        return {
            "candidate_labels": self.labels,
            "background": self.background,
            "method": self.method,
            "method_options": self.method_options or None,
            "use_arm": self.use_arm,
            "templates": self.templates,
            "window": self.window,
            "stride": self.stride,
            "size": self.size,
            "logit_scale": self.logit_scale,
            "pamr": self.pamr,
            "compensation": self.compensation,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Written:
    """A picture that was segmented: its files, its size (width, height) and its classes, the largest first.

    `scores` holds the mean probability of each class inside its own area, in the order of `segments`.
    """

    file: ImageFile
    outputs: OutputFiles
    size: tuple[int, int]
    segments: list[Segment]
    scores: list[float]


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be read, and why, in one line."""

    file: ImageFile
    reason: str


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` pairs. A value is a number, `true`, `false`, `none`, a JSON list, or else a string.

    Raises:
        ValueError: If a pair has no `=`, no key, or a key comes twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not key or not equals:
            raise ValueError(f"a method option reads key=value, such as gaussian_std=5; got {pair!r}")
        key = key.replace("-", "_")
        if key in options:
            raise ValueError(f"the method option {key!r} is given twice")
        plain = {"true": True, "false": False, "none": None}
        try:
            options[key] = plain[text.lower()] if text.lower() in plain else json.loads(text)
        except json.JSONDecodeError:
            options[key] = text
        if isinstance(options[key], list):
            options[key] = tuple(options[key])
    return options


def load_pipeline(
    model: str,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Return the `open-vocab-segmentation` pipeline.

    Args:
        model: The embedded model's name, a folder, or a hub id; an ARM checkpoint or a plain CLIP.
        revision: Branch, tag or commit of a hub id.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; `None` takes an accelerator if there is one.
        dtype: One of `DTYPES`; `"auto"` takes what the checkpoint was saved in. All published numbers of the methods
            were made in half precision, the reference numbers of our tests in float32.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ValueError: If the dtype is unknown, or the model cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    from transformers import pipeline

    try:
        return pipeline(
            "open-vocab-segmentation",
            model=resolve_model(model),
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    # Whatever a model folder, the hub or a device may lack: the first words name it, the cause follows.
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot load the model {model!r}: {' '.join(str(error).split())}") from error


def segment_files(
    pipe: Any, files: Sequence[ImageFile], plan: Sequence[OutputFiles], settings: RunSettings, model: str
) -> Iterator[Written | Skipped]:
    """Segment pictures and write their files, one picture after the other.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        files: The pictures; the next ones are read while earlier ones are worked on, `batch_size` at most.
        plan: Where the results of each go (`plan_outputs`).
        settings: What to do.
        model: What the legends call the model.

    Yields:
        What became of each picture. One that cannot be read is left out and does not stop the others.

    Raises:
        ValueError: If the method that the model chooses has no such setting.
    """
    _check_options(pipe._method_name(settings.method), settings.method_options)
    waiting: deque[tuple[ImageFile, OutputFiles, Image.Image]] = deque()
    skipped: deque[Skipped] = deque()

    def readable() -> Iterator[Image.Image]:
        for file, outputs in zip(files, plan, strict=True):
            try:
                image = read_image(file.source)
            except UnreadableImage as error:
                skipped.append(Skipped(file, str(error)))
                continue
            waiting.append((file, outputs, image))
            yield image

    record = _run_record(pipe, settings, model)
    for result in pipe(readable(), semantic=True, **settings.call_arguments()):
        while skipped:
            yield skipped.popleft()
        file, outputs, image = waiting.popleft()
        yield _write(file, outputs, image, result, record)
    yield from skipped


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    try:
        get_method(method).settings(options)
    except TypeError as error:  # an unknown option; on the command line that is a wrong value, not a bug
        raise ValueError(str(error)) from error


def _write(file: ImageFile, outputs: OutputFiles, image: Image.Image, result: dict, record: dict) -> Written:
    semantic_map, id2label = np.asarray(result["semantic_map"]), result["id2label"]
    found = segments(semantic_map, id2label)
    score_of = {segment["label"]: round(float(segment["score"]), 4) for segment in result["segments"]}
    scores = [score_of[segment.label] for segment in found]
    legend = {
        "image": file.name,
        "width": image.width,
        "height": image.height,
        "files": {"labels": outputs.labels.name, "overlay": outputs.overlay.name},
        "segments": [
            {
                "id": segment.id,
                "label": segment.label,
                "color": list(segment.color),
                "pixels": segment.pixels,
                "share": round(segment.share, 6),
                "score": score,
            }
            for segment, score in zip(found, scores, strict=True)
        ],
        "id2label": {str(index): name for index, name in id2label.items()},
        **record,
    }
    with atomic_path(outputs.labels) as path:
        indexed_png(semantic_map, id2label).save(path, format="PNG")
    with atomic_path(outputs.overlay) as path:
        overlay(image, semantic_map, id2label).save(path, format="PNG")
    # Last, so that a legend says that the picture is done.
    with atomic_path(outputs.legend) as path:
        path.write_text(_readable_json(legend), encoding="utf-8")
    return Written(file, outputs, image.size, found, scores)


def _readable_json(record: dict[str, Any]) -> str:
    """Write a record with one line for each key, and one for each item of a list of records."""
    lines = []
    for key, value in record.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _run_record(pipe: Any, settings: RunSettings, model: str) -> dict[str, Any]:
    """Return what one must know to make the same label map again."""
    used = settings.call_arguments()
    del used["candidate_labels"], used["batch_size"]
    config, has_arm = pipe.model.config, hasattr(pipe.model, "arm")
    used["method"] = pipe._method_name(settings.method)
    used["use_arm"] = has_arm if settings.use_arm is None else settings.use_arm
    for name in ("background", "templates"):
        if used[name] is None:
            used[name] = getattr(config, name, None)
    return {
        "model": model,
        "labels": [{"name": label.name, "words": list(label.words)} for label in settings.labels],
        "settings": used,
        "arm_hf": __version__,
    }
