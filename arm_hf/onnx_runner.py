"""Segment a photo with an exported model and without torch: numpy, Pillow, onnxruntime and tokenizers are enough.

    python run.py photo.jpg "cat, dog=puppy|hound, sky" --out labels.png

`arm-hf export --format onnx` puts this file, as run.py, beside the graphs that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_GRAPH, TEXT_GRAPH, SETTINGS = "image.onnx", "text.onnx", "export.json"


def int8_name(graph: str) -> str:
    """File of a graph's variant with 8-bit weights."""
    return graph.replace(".onnx", ".int8.onnx")


@dataclass
class Segmented:
    """A label map.

    Attributes:
        labels: Class index per pixel, (H, W) int32.
        confidence: Score of that class, (H, W) float32.
        names: Class index to name.
    """

    labels: np.ndarray
    confidence: np.ndarray
    names: list[str]


class OnnxSegmenter:
    """An exported model.

    Args:
        folder: What `arm-hf export --format onnx` wrote.
        int8: Take the graphs with 8-bit weights.
        providers: Where onnxruntime runs; by default the CPU.
        threads: Threads of onnxruntime; by default its own choice.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        int8: bool = False,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ):
        import onnxruntime
        from tokenizers import Tokenizer

        folder = Path(folder)
        self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        names = [int8_name(name) if int8 else name for name in (IMAGE_GRAPH, TEXT_GRAPH)]
        self.image_graph, self.text_graph = (
            onnxruntime.InferenceSession(folder / name, options, providers=list(providers)) for name in names
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.settings["max_tokens"])
        # Without the end-of-text token as padding: `pad_token` may be another one, and the mask says what counts.
        self.tokenizer.enable_padding(pad_id=self.settings["pad_token_id"], pad_token=self.settings["pad_token"])

    def class_embeddings(self, words: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """Embed words, each as the mean over templates: (Q, D) of unit length.

        Args:
            words: The queries.
            templates: Sentences with one `{}` each; by default those of the export.
        """
        templates = templates or self.settings["templates"]
        embeddings = []
        for word in words:
            encoded = self.tokenizer.encode_batch([template.replace("{}", word) for template in templates])
            ids = np.array([prompt.ids for prompt in encoded], dtype=np.int64)
            mask = np.array([prompt.attention_mask for prompt in encoded], dtype=np.int64)
            (prompts,) = self.text_graph.run(None, {"input_ids": ids, "attention_mask": mask})
            embeddings.append(_unit(prompts.mean(axis=0)))
        return np.stack(embeddings)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and normalise an image, (3, H, W) float32."""
        resized = image.resize(self._target(*image.size), self.settings["resample"])
        values = np.asarray(resized, dtype=np.float32) / 255
        mean, std = (np.array(self.settings[name], dtype=np.float32) for name in ("mean", "std"))
        return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that the network sees: the shorter side as set, unless the longer one becomes too long."""
        short, longest = self.settings["shortest_edge"], self.settings["longest_edge"]
        small, large = sorted((width, height))
        exact = float(short)
        if large / small * short > longest:
            exact = longest * small / large
            short = round(exact)
        long = max(1, int(exact * large / small))
        return (short, long) if width < height else (long, short)

    def maps(self, pixels: np.ndarray, class_embeddings: np.ndarray) -> np.ndarray:
        """Scores of one image at its own size, (Q, H, W), with zero pixels around it up to whole patches.

        Args:
            pixels: Normalised image, (3, H, W).
            class_embeddings: Of the words, (Q, D).
        """
        side = self.settings["patch_size"]
        height, width = pixels.shape[-2:]
        above, left = -height % side // 2, -width % side // 2
        below, right = -height % side - above, -width % side - left
        padded = np.pad(pixels, ((0, 0), (above, below), (left, right)))[None]
        feed = {"pixel_values": padded, "class_embeddings": class_embeddings.astype(np.float32)}
        (maps,) = self.image_graph.run(None, feed)
        upsampled = resize(maps[0], padded.shape[-2:])
        return upsampled[:, above : above + height, left : left + width]

    def __call__(
        self, image: Image.Image, labels: Mapping[str, Sequence[str]], embeddings: np.ndarray | None = None
    ) -> Segmented:
        """Segment an image.

        Args:
            image: Any Pillow image.
            labels: Name of each class and its words; the best word of a class counts.
            embeddings: Of all words, class after class, if they were computed before.
        """
        image = ImageOps.exif_transpose(image).convert("RGB")
        words = [word for synonyms in labels.values() for word in synonyms]
        class_of_word = np.array([index for index, synonyms in enumerate(labels.values()) for _ in synonyms])
        embeddings = self.class_embeddings(words) if embeddings is None else embeddings
        maps = self.maps(self.pixels(image), embeddings)
        size = (image.height, image.width)
        best = np.full(size, -np.inf, dtype=np.float32)
        winner = np.zeros(size, dtype=np.int64)
        total = np.zeros(size, dtype=np.float64)
        scale = np.float32(self.settings["scale"])
        for index, scores in enumerate(maps):  # one by one: all maps at the size of a photo may not fit
            values = resize(scores[None], size)[0]
            if self.settings["activation"] == "softmax":
                total += np.exp(np.float64(scale) * values)
            winner[values > best] = index
            best = np.maximum(best, values)
        confidence: np.ndarray
        if self.settings["activation"] == "softmax":
            confidence = np.exp(np.float64(scale) * best) / total
        elif self.settings["activation"] == "sigmoid":
            confidence = 1 / (1 + np.exp(-best))
        else:
            confidence = scale * best
        return Segmented(class_of_word[winner].astype(np.int32), confidence.astype(np.float32), list(labels))


def resize(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize maps (C, h, w) bilinearly to (C, H, W), corners not aligned, as torch's `interpolate` does.

    Args:
        maps: (C, h, w).
        size: (H, W).
    """
    for axis, length in ((1, size[0]), (2, size[1])):
        if maps.shape[axis] == length:
            continue
        places = np.maximum((np.arange(length) + 0.5) * maps.shape[axis] / length - 0.5, 0)
        first = places.astype(np.int64)
        second = np.minimum(first + 1, maps.shape[axis] - 1)
        share = (places - first).astype(np.float32)
        share = share[:, None] if axis == 1 else share
        maps = np.take(maps, first, axis) * (1 - share) + np.take(maps, second, axis) * share
    return maps


def parse_labels(text: str) -> dict[str, list[str]]:
    """Read `"cat, dog=puppy|hound, sky"`."""
    labels: dict[str, list[str]] = {}
    for item in text.split(","):
        name, _, synonyms = item.partition("=")
        words = [word.strip() for word in (name, *synonyms.split("|")) if word.strip()]
        if not words or words[0] in labels:
            raise SystemExit(f"each label needs a name of its own, got {item.strip()!r} in {text!r}")
        labels[words[0]] = words
    return labels


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def main() -> None:
    """Write the label map of one photo and print the share of each class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="the photo")
    parser.add_argument("labels", help='what to look for: "cat, dog=puppy|hound, sky"')
    parser.add_argument("--out", default="labels.png", help="the label map, pixel values are class indices")
    parser.add_argument("--int8", action="store_true", help="take the graphs with 8-bit weights")
    parser.add_argument("--model", default=Path(__file__).parent, help="folder of the exported model")
    arguments = parser.parse_args()
    if Path(arguments.out).exists():
        raise SystemExit(f"{arguments.out} is there already; choose another --out")
    labels = parse_labels(arguments.labels)
    if len(labels) > 256:
        raise SystemExit(f"this example writes 8-bit label maps, up to 256 classes; got {len(labels)}")
    found = OnnxSegmenter(arguments.model, arguments.int8)(Image.open(arguments.image), labels)
    Image.fromarray(found.labels.astype(np.uint8)).save(arguments.out)
    for index, name in enumerate(found.names):
        print(f"{name}: {(found.labels == index).mean():.1%}")
    print(f"label map: {arguments.out}")


if __name__ == "__main__":
    main()
