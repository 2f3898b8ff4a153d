"""The `open-vocab-segmentation` pipeline: images and words in, masks or a label map out."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .decision import window_boxes
from .dense_clip import DenseCLIP
from .diffusion import StableDiffusionCompensation
from .images import load_image
from .method import get_method
from .pamr import check_iterations
from .prompts import Vocabulary, resolve_templates
from .text import TextEncoder

TASK = "open-vocab-segmentation"

# The literature's protocol for ViT-B/16 and L/14: shorter side 336, longer side at most 2048.
DEFAULT_SHORT_SIDE = 336
LONGEST_SIDE = 2048

PREPROCESS_ARGUMENTS = ("candidate_labels", "background", "size", "timeout", "keep_image")
FORWARD_ARGUMENTS = (
    "method",
    "method_options",
    "outside",
    "use_arm",
    "templates",
    "window",
    "stride",
    "window_batch_size",
    "logit_scale",
    "pamr",
    "compensation",
    "correct_regions",
    "class_scores",
)
POSTPROCESS_ARGUMENTS = ("semantic", "masks")


class OpenVocabSegmentationPipeline(Pipeline):
    """Semantic segmentation with words chosen at call time.

    The model may be an [`ARMModel`] or a plain `CLIPModel` (then a training-free method runs alone).

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import arm_hf

    >>> pipe = pipeline("open-vocab-segmentation", model=arm_hf.resolve_model("arm-clip-mini"))
    >>> result = pipe(Image.new("RGB", (120, 90), "skyblue"), candidate_labels="sky, grass, dog=puppy|hound")
    >>> sorted(result[0])
    ['label', 'mask', 'score']

    ```
    """

    _load_image_processor = True
    _load_tokenizer = True
    _load_processor = False
    _load_feature_extractor = False

    default_method: str | None = None
    """Method used when a call names none; None takes the model's own."""
    default_use_arm: bool | None = None
    """Whether ARM refines the result when a call does not say; None means whenever the model has one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("tokenizer", "image_processor"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{type(self).__name__} needs a {name}: none was found beside the model; pass {name}=..., for "
                    "example that of the CLIP the model was made from"
                )
        if len(self.tokenizer) <= len(set(self.tokenizer.all_special_tokens)):
            raise ValueError(
                "the tokenizer knows no words: its files (tokenizer.json, or vocab.json and merges.txt) are missing "
                "beside the model; save it there, or pass tokenizer=..."
            )
        self._text: TextEncoder | None = None
        self._compensations: dict[str, StableDiffusionCompensation] = {}

    def __call__(self, images: Any = None, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Segment one image or many.

        Args:
            images: A PIL image, path, URL, (H, W, 3) array, a dict `{"image": ..., "candidate_labels": ...}`, or a
                list, generator or `KeyDataset` of these.
            candidate_labels: The words: `"cat, dog=puppy|hound, sky"`, a list, or a mapping from names to synonyms. The
                best of a label's words counts.
            kwargs:
                background: None (the model's default), "none", a threshold, words ("sky|wall"), or a mapping with
                    threshold, words and name.
                method, method_options: Training-free method and its settings.
                outside: What other models give to the method, by name (see `outside.py`): `{"proxy_features": ...}` for
                    "proxyclip", `"regions"` too for "corrclip". Functions suit any number of images, tensors one image.
                use_arm: Whether ARM refines the method's map (default: if the model has one).
                templates: Prompt templates, by name or own.
                size: Shorter side in pixels that the network sees, or a size mapping of the image processor.
                window, stride: Sliding window in pixels of the resized image; default is the whole image.
                window_batch_size: Windows per forward pass (bounds memory).
                logit_scale: Factor on the cosines inside the softmax.
                pamr: Rounds of PAMR, which fits the scores to the colours of the image; NACLIP uses 10. Off by default.
                compensation: Sharpen the scores with Stable Diffusion's self-attention (CLIPer, section 3.3): a hub id
                    or folder of a Stable Diffusion checkpoint, or a `StableDiffusionCompensation`. Whole images only.
                correct_regions: Give all pixels of a region of `outside["regions"]` the region's most frequent label
                    (CorrCLIP's map correction, for any method).
                semantic: Return a label map (see below) instead of a list of masks.
                masks: With `semantic`, False leaves the masks out of `segments`; they take a byte per pixel and class.
                class_scores: With `semantic`, also return the scores of all classes.
                batch_size, num_workers: As for every pipeline; images of one batch may differ in size.
                timeout: Seconds to wait for a URL.

        Returns:
            Per image a list of `{"label": str, "score": float, "mask": PIL image}`, largest area first, for the
            classes that occur; `score` is the mean confidence inside the mask, the mask is 0 / 255 at the image's size.
            With `semantic=True` a dict: `segments` (the same list, with `pixels`), `semantic_map` (H, W) int32,
            `confidence` (H, W) float32, `id2label`, and `class_scores` (K, H, W) if asked for.

        Raises:
            ValueError: No or duplicate labels, unknown method, unreadable image, impossible window.
            TypeError: Unknown keyword.
        """
        images = kwargs.pop("inputs", None) if images is None else images
        if images is None:
            raise ValueError("no image was given; pass a PIL image, a path, a URL or an array")
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        if isinstance(images, tuple):
            images = list(images)
        if isinstance(images, list) and not images:
            return []
        if isinstance(images, Iterator):
            images = (image for image in images)  # the base class streams generators, not other iterators
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        kwargs.pop("local_files_only", None)
        known = (*PREPROCESS_ARGUMENTS, *FORWARD_ARGUMENTS, *POSTPROCESS_ARGUMENTS)
        unknown = [key for key in kwargs if key not in known]
        if unknown:
            raise TypeError(f"unknown argument {', '.join(unknown)}; allowed are {', '.join(known)}")
        if kwargs.get("method") is not None or kwargs.get("method_options"):
            get_method(self._method_name(kwargs.get("method"))).settings(kwargs.get("method_options"))
        if kwargs.get("use_arm") and not self._has_arm:
            raise ValueError(f"use_arm=True, but this model is a {type(self.model).__name__} without ARM")
        if kwargs.get("pamr") is not None:
            check_iterations(kwargs["pamr"])
        if kwargs.get("templates") is not None:
            kwargs["templates"] = resolve_templates(kwargs["templates"])
        if kwargs.get("window") is not None or kwargs.get("stride") is not None:
            window_boxes((1, 1), kwargs.get("window"), kwargs.get("stride"))
        if "candidate_labels" in kwargs or kwargs.get("background") is not None:
            labels = kwargs.get("candidate_labels", self._preprocess_params_or_empty.get("candidate_labels"))
            if labels is not None:
                Vocabulary.build(labels, self._background(kwargs.get("background")))
        if kwargs.get("compensation") is not None:
            kwargs["keep_image"] = True
        groups = (PREPROCESS_ARGUMENTS, FORWARD_ARGUMENTS, POSTPROCESS_ARGUMENTS)
        preprocess, forward, postprocess = (
            {key: kwargs[key] for key in group if kwargs.get(key) is not None} for group in groups
        )
        return preprocess, forward, postprocess

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        remote_code: bool | None = None,
        **model_options: Any,
    ) -> None:
        """Save model, tokenizer and image processor to a folder that `pipeline(...)` loads.

        Args:
            save_directory: Folder, made if missing.
            remote_code: Put the code beside the weights, so that the folder also works where this package is not
                installed, with `trust_remote_code=True`. Default: for ARM models yes; a plain CLIP needs none.
            model_options: Arguments of the model's `save_pretrained`: `self_contained`, `weight_packing`, ...

        Raises:
            RuntimeError: Code was asked for, but this pipeline itself came from remote code, which is incomplete.
        """
        remote_code = self._has_arm if remote_code is None else remote_code
        if remote_code and type(self).__module__.startswith("transformers_modules"):
            raise RuntimeError(
                "this pipeline runs from code beside a checkpoint; to save it with its code install arm_hf and load it "
                "without trust_remote_code, or pass remote_code=False"
            )
        os.makedirs(save_directory, exist_ok=True)
        classes = (type(self.model), type(self.model.config))
        config, before = self.model.config, [cls._auto_class for cls in classes]
        try:
            if remote_code:
                for cls, name in zip(classes, ("AutoModel", "AutoConfig"), strict=True):
                    cls._auto_class = name
                impl = f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"
                config.custom_pipelines = {TASK: {"impl": impl, "pt": ["AutoModel"], "type": "multimodal"}}
                custom_object_save(self, save_directory)
            self.model.save_pretrained(save_directory, **model_options)
        finally:
            for cls, auto_class in zip(classes, before, strict=True):
                cls._auto_class = auto_class
            for name in ("custom_pipelines", "auto_map"):
                if remote_code and hasattr(config, name):
                    delattr(config, name)
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)

    @property
    def _preprocess_params_or_empty(self) -> dict:
        return getattr(self, "_preprocess_params", {})  # absent while the base class's __init__ runs

    @property
    def _has_arm(self) -> bool:
        return hasattr(self.model, "arm")

    def _method_name(self, method: str | None) -> str:
        method = method or self.default_method
        return method or (self.model.config.method if self._has_arm else "clearclip")

    def _background(self, background: Any) -> Any:
        return getattr(self.model.config, "background", None) if background is None else background

    @property
    def text_encoder(self) -> TextEncoder:
        """The text side with its cache, shared by all calls of this pipeline."""
        clip = self.model.clip if self._has_arm else self.model
        if self._text is None or self._text.clip is not clip:
            self._text = TextEncoder(clip, self.tokenizer)
        return self._text

    def preprocess(
        self,
        image: Any,
        candidate_labels: Any = None,
        background: Any = None,
        size: int | Mapping[str, int] | None = None,
        timeout: float | None = None,
        keep_image: bool = False,
    ) -> dict[str, list]:
        """Read, resize and normalise one image. Values are one-element lists, so that mixed sizes share a batch.

        Args:
            image: As for the call.
            candidate_labels: As for the call.
            background: As for the call.
            size: As for the call.
            timeout: As for the call.
            keep_image: Keep the image's own pixels for the steps that read them.
        """
        if isinstance(image, Mapping):
            candidate_labels = image.get("candidate_labels", candidate_labels)
            image = image["image"]
        if candidate_labels is None:
            raise ValueError("candidate_labels is missing; give the words to look for, such as 'cat, dog, sky'")
        vocabulary = Vocabulary.build(candidate_labels, self._background(background))
        image = load_image(image, timeout=timeout)
        pixels = self.image_processor(
            images=image,
            size=at_least_one_pixel(self._processor_size(size), image.size),
            do_center_crop=False,
            return_tensors="pt",
        )["pixel_values"][0]
        item = {"pixels": [pixels], "original_size": [(image.height, image.width)], "vocabulary": [vocabulary]}
        if keep_image:
            item["image"] = [torch.from_numpy(np.array(image)).permute(2, 0, 1)]  # (3, H, W) uint8
        return item

    def _processor_size(self, size: int | Mapping[str, int] | None) -> dict[str, int]:
        processor = self.image_processor
        if size is None and not getattr(processor, "do_center_crop", True):
            own = dict(processor.size)
            if "shortest_edge" in own:
                own.setdefault("longest_edge", max(LONGEST_SIDE, own["shortest_edge"]))
            return own
        if size is None or isinstance(size, int):
            short = DEFAULT_SHORT_SIDE if size is None else size
            if short < 1:
                raise ValueError(f"size must be at least 1 pixel, got {short}")
            return {"shortest_edge": short, "longest_edge": max(LONGEST_SIDE, short)}
        return dict(size)

    def _forward(
        self,
        inputs: dict[str, list],
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
        outside: Mapping[str, Any] | None = None,
        use_arm: bool | None = None,
        templates: str | Sequence[str] | None = None,
        window: int | None = None,
        stride: int | None = None,
        window_batch_size: int = 16,
        logit_scale: float | None = None,
        pamr: int | None = None,
        compensation: Any = None,
        correct_regions: bool = False,
        class_scores: bool = False,
    ) -> dict[str, list]:
        pixels, sizes, vocabularies = (_flat(inputs[key]) for key in ("pixels", "original_size", "vocabulary"))
        templates = templates or getattr(self.model.config, "templates", None) or "imagenet80"
        options: dict[str, Any] = {"method": self._method_name(method)}
        model: Any = self.model if self._has_arm else DenseCLIP(self.model)
        if self._has_arm:
            wanted = self.default_use_arm if use_arm is None else use_arm
            options["use_arm"] = wanted is not False
            if method is None and self.default_method is None:
                options["method"] = None  # the config's method with the config's settings

        groups: dict[tuple, list[int]] = {}
        for index, (image, vocabulary) in enumerate(zip(pixels, vocabularies, strict=True)):
            groups.setdefault((tuple(image.shape), vocabulary), []).append(index)
        decisions: list[Any] = [None] * len(pixels)
        for (_, vocabulary), members in groups.items():
            results = model.segment(
                torch.stack([pixels[i] for i in members]).to(self.model.device, self.model.dtype),
                self.text_encoder.class_embeddings(vocabulary.queries, templates),
                **options,
                method_options=method_options,
                outside=outside,
                logit_scale=logit_scale,
                class_of_query=vocabulary.class_of_query,
                num_classes=vocabulary.num_classes,
                sizes=[sizes[i] for i in members],
                window=window,
                stride=stride,
                window_batch_size=window_batch_size,
                threshold=vocabulary.threshold,
                background_index=vocabulary.background_index,
                return_class_scores=class_scores,
                pamr=pamr,
                correct_regions=correct_regions,
                compensate=None if compensation is None else self._compensation(compensation, inputs, members),
            )
            for index, decision in zip(members, results, strict=True):
                decisions[index] = decision
        return {"decision": [vars(d) for d in decisions], "vocabulary": list(vocabularies)}

    def _compensation(self, source: Any, inputs: dict[str, list], members: Sequence[int]) -> Callable:
        if isinstance(source, str | os.PathLike):
            source = os.fspath(source)
            if source not in self._compensations:
                self._compensations[source] = StableDiffusionCompensation.from_pretrained(source, device=self.device)
            source = self._compensations[source]
        images = _flat(inputs["image"])
        return lambda maps, index: source.compensate(maps, images[members[index]][None].float() / 255)

    def postprocess(
        self, outputs: dict[str, Any], semantic: bool = False, masks: bool = True
    ) -> list[dict] | dict[str, Any]:
        """Masks or label map of one image.

        Args:
            outputs: What the model found for it.
            semantic: As for the call.
            masks: As for the call.
        """
        # A batch was taken apart by the base class; a single image still is a list of one.
        values = (outputs[key] for key in ("decision", "vocabulary"))
        decision, vocabulary = (value[0] if isinstance(value, list) else value for value in values)
        labels, confidence = decision["labels"].numpy(), decision["confidence"].float().numpy()
        segments = describe_segments(labels, confidence, vocabulary.id2label, masks or not semantic)
        if not semantic:
            return [{key: segment[key] for key in ("label", "score", "mask")} for segment in segments]
        result = {
            "segments": segments,
            "semantic_map": labels,
            "confidence": confidence,
            "id2label": vocabulary.id2label,
        }
        if decision["class_scores"] is not None:
            result["class_scores"] = decision["class_scores"].float().numpy()
        return result


class SclipPipeline(OpenVocabSegmentationPipeline):
    """The SCLIP baseline (Wang, Mei and Yuille, ECCV 2024) on any CLIP: no ARM unless a call asks for it."""

    default_method = "sclip"
    default_use_arm = False


class CLIPerPipeline(OpenVocabSegmentationPipeline):
    """CLIPer's early-layer fusion (Sun et al., ICCV 2025) on any CLIP: no ARM unless a call asks for it."""

    default_method = "cliper"
    default_use_arm = False


def describe_segments(
    labels: np.ndarray, confidence: np.ndarray, id2label: Mapping[int, str], masks: bool = True
) -> list[dict[str, Any]]:
    """List the classes of a label map, largest first.

    Args:
        labels: Class indices, (H, W).
        confidence: Score per pixel, (H, W).
        id2label: Names.
        masks: Draw the masks.

    Returns:
        `{"label", "score", "mask", "pixels"}` per class that occurs; score is the mean confidence in the mask.
    """
    counts = np.bincount(labels.ravel(), minlength=len(id2label))
    sums = np.bincount(labels.ravel(), weights=confidence.ravel(), minlength=len(id2label))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    return [
        {
            "label": id2label[index],
            "score": float(sums[index] / counts[index]),
            **({"mask": Image.fromarray((labels == index).astype(np.uint8) * 255)} if masks else {}),
            "pixels": int(counts[index]),
        }
        for index in order
    ]


def at_least_one_pixel(size: dict[str, int], image_size: tuple[int, int]) -> dict[str, int]:
    """The size to resize to, named in full where a limit on the longer side would leave nothing of the shorter one.

    Args:
        size: What the image processor is asked for, such as `{"shortest_edge": 336, "longest_edge": 2048}`.
        image_size: Width and height of the image.
    """
    short, limit = size.get("shortest_edge"), size.get("longest_edge")
    if short is None or limit is None or int(limit * min(image_size) / max(image_size)) >= 1:
        return size
    width, height = (min(side, limit) if side == max(image_size) else 1 for side in image_size)
    return {"height": height, "width": width}


def _flat(values: Sequence) -> list:
    """Undo one level of nesting: a single item arrives as [x], a collated batch as [[x], [y]]."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


__all__ = ["CLIPerPipeline", "OpenVocabSegmentationPipeline", "SclipPipeline"]
