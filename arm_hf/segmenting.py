"""Segment picture files: settings of a run, the model, and the files each picture gives."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from arm_hf import __version__
from arm_hf.drawing import DrawingStyle, indexed_png, overlay, segments
from arm_hf.folders import ImageFile, OutputFiles, Skipped, UnreadableImage, Written, atomic_path, read_image
from arm_hf.legend import Segment
from arm_hf.loading import load_pipeline as load_pipeline  # part of what callers of this module need
from arm_hf.manifest import digest
from arm_hf.modeling.decision import window_boxes
from arm_hf.modeling.dense_clip import get_method
from arm_hf.modeling.prompts import Label, Vocabulary, resolve_templates
from arm_hf.streaming import WriteBehind, batched_by, mapped_ahead, threads

Job = tuple[ImageFile, OutputFiles]
"""A picture and where its results go."""

_FEW_PICTURES = 5

# Pictures that may wait for others of their shape, as a multiple of the batch size: each holds its pixels.
_WAITING_BATCHES = 8


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


def default_workers(device_type: str, total: int | None) -> int:
    """Threads that suit a device: none for a few pictures, one beside a model on the CPU, else most cores.

    Args:
        device_type: Where the model runs, such as "cpu" or "cuda".
        total: Number of pictures, if known.
    """
    if total is not None and total <= _FEW_PICTURES:
        return 0
    if device_type == "cpu":
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def segment_files(
    pipe: Any,
    jobs: Iterable[Job],
    settings: RunSettings,
    record: Mapping[str, Any],
    workers: int = 0,
    style: DrawingStyle | None = None,
) -> Generator[Written | Skipped]:
    """Segment pictures and write their files.

    Pictures whose resized form has the same shape share a forward pass of up to `batch_size`; those that wait for
    others of their shape are bounded in number. What is in memory does not depend on the number of jobs.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        jobs: The pictures (`plan_outputs`, `ImageTable.jobs`); taken when there is room for them.
        settings: What to do.
        record: What the legends say about the run (`run_record`).
        workers: Threads that read and resize ahead, and as many that write behind. With 0 one picture is worked on
            after the other.
        style: Palette and kind of the pictures.

    Yields:
        What became of each picture. One that cannot be read is left out and does not stop the others. With
        `batch_size` 1 they come in the order of the jobs, else in the order in which batches are full.

    Raises:
        ValueError: If the method that the model chooses has no such setting.
    """
    own = getattr(pipe.model.config, "method_options", None) if settings.method is None else None
    _check_options(pipe._method_name(settings.method), {**(own or {}), **settings.method_options})
    arguments = settings.call_arguments()
    size = arguments.pop("batch_size")
    preprocess, forward, postprocess = pipe._sanitize_parameters(semantic=True, masks=False, **arguments)
    legend = {"run": digest(record), **record}

    def prepare(job: Job) -> tuple[Job, Image.Image, dict[str, list]] | Skipped:
        try:
            image = read_image(job[0])
        except UnreadableImage as error:
            return Skipped(job[0], str(error))
        return job, image, pipe.preprocess(image, **preprocess)

    def finish(job: Job, image: Image.Image, output: dict[str, Any]) -> Written:
        return _write(*job, image, pipe.postprocess(output, **postprocess), legend, style or DrawingStyle())

    skipped: list[Skipped] = []

    def readable(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                yield item

    with threads(workers) as readers, threads(workers) as writers:
        behind = WriteBehind(writers, 2 * workers)
        ready = readable(mapped_ahead(prepare, jobs, readers, size + workers))
        for batch in batched_by(lambda item: item[2]["pixels"][0].shape, ready, size, _WAITING_BATCHES * size):
            while skipped:
                yield skipped.pop(0)
            inputs = {key: [value for item in batch for value in item[2][key]] for key in batch[0][2]}
            outputs = pipe.forward(inputs, **forward)
            for index, (job, image, _) in enumerate(batch):
                output = {key: [values[index]] for key, values in outputs.items()}
                yield from behind.put(finish, job, image, output)
        yield from behind.rest()
    yield from skipped


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    try:
        get_method(method).settings(options)
    except TypeError as error:  # an unknown option; on the command line that is a wrong value, not a bug
        raise ValueError(str(error)) from error


def _write(
    file: ImageFile,
    outputs: OutputFiles,
    image: Image.Image,
    result: dict,
    record: Mapping[str, Any],
    style: DrawingStyle,
) -> Written:
    semantic_map, id2label = np.asarray(result["semantic_map"]), result["id2label"]
    found = segments(semantic_map, id2label, style.colors)
    score_of = {segment["label"]: round(float(segment["score"]), 4) for segment in result["segments"]}
    scores = [score_of[segment.label] for segment in found]
    files = {"labels": outputs.labels.name}
    if outputs.overlay is not None:
        files["overlay"] = outputs.overlay.name
    legend = {
        "image": file.name,
        "source": file.source,
        "files": files,
        **legend_record(image.size, found, scores, id2label),
        **record,
    }
    with atomic_path(outputs.labels) as path:
        indexed_png(semantic_map, id2label, style.colors).save(path, format="PNG")
    if outputs.overlay is not None:
        with atomic_path(outputs.overlay) as path:
            drawn = overlay(image, semantic_map, id2label, colors=style.colors, contours=style.contours)
            drawn.save(path, format="PNG")
    # Last, so that a legend says that the picture is done.
    with atomic_path(outputs.legend) as path:
        # A file name that is no Unicode: JSON spells its odd bytes as escapes.
        path.write_text(readable_json(legend), encoding="utf-8", errors="backslashreplace")
    num_bytes = sum(path.stat().st_size for path in outputs.paths())
    return Written(file, outputs, image.size, found, scores, num_bytes)


def legend_record(
    size: tuple[int, int], found: Sequence[Segment], scores: Sequence[float], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """Return what a legend says about a label map, as values for JSON.

    Args:
        size: Width and height.
        found: The classes that occur (`arm_hf.drawing.segments`).
        scores: Mean score of each inside its area.
        id2label: Class index to name, of all classes.
    """
    return {
        "width": size[0],
        "height": size[1],
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
    }


def readable_json(record: Mapping[str, Any]) -> str:
    """Write a record with one line for each key, and one for each item of a list of records."""
    lines = []
    for key, value in record.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def run_record(pipe: Any, settings: RunSettings, model: str) -> dict[str, Any]:
    """Return what one must know to make the same label maps again, as values for JSON.

    Args:
        pipe: An `open-vocab-segmentation` pipeline.
        settings: What to do.
        model: What the legends call the model.
    """
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
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "arm_hf": __version__,
    }
