"""How coherent the patches of each CLIP layer are, and which layer's keys suit the method `cra_dsi`.

Liu et al. ("Unveiling the Knowledge of CLIP for Training-Free Open-Vocabulary Semantic Segmentation", AAAI 2025)
measure two things on labelled images:

* M, coherence: how well the cosine of two patches of one image tells whether they carry the same label, as the area
  under the ROC curve (Fig. 4). The layer whose keys have the highest M is k_M.
* C, alignment: the share of pixels whose patch is nearest to the words of the right class (Fig. 6), here for the values
  v_L (index -1) and v~ (-2 and before) that `cra_dsi` combines.

Read where the text is open: M takes the pairs of all images as one set, because the method has one threshold and one
temperature for all images (the mean over images is reported beside it); a patch has its most frequent label, if at
least half of it is labelled; every patch decides for all of its pixels. Pixels of a background class have no word and
do not count in C; pairs of two background patches do not count in M, for nobody knows whether they show the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arm_hf.data import SegmentationData
from arm_hf.modeling.attention import merge_heads, project_heads
from arm_hf.modeling.cra_dsi import regenerate
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.prompts import Label
from arm_hf.modeling.trunk import Padding, TrunkRequest

FEATURES = ("query", "key", "value")

_BINS = 2**14  # of the cosine; pairs in one bin count as ties


@dataclass
class PairCounts:
    """Counts of the cosines of patch pairs, apart for pairs of different and of the same label.

    Attributes:
        total: (2, bins), over all images.
        per_image: Coherence of each image that has both kinds of pairs.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros(2, _BINS, dtype=torch.int64))
    per_image: list[float] = field(default_factory=list)

    def add(self, features: Tensor, same: Tensor, pairs: Tensor) -> None:
        """Count one image.

        Args:
            features: (N, W), of any length.
            same: Whether a pair has the same label, (P,) bool.
            pairs: Indices of the pairs, (2, P).
        """
        units = F.normalize(features.float(), dim=-1)
        cosines = (units @ units.T)[pairs[0], pairs[1]]  # (P,)
        bins = ((cosines + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
        counts = torch.bincount(bins + _BINS * same, minlength=2 * _BINS).view(2, _BINS).cpu()
        self.total += counts
        if bool((counts.sum(dim=1) > 0).all()):
            self.per_image.append(auroc(counts))

    def summary(self) -> dict[str, float | None]:
        """M over the pairs of all images, and the mean of the images' own (None if no image has both kinds)."""
        mean = float(np.mean(self.per_image)) if self.per_image else None
        return {"coherence": auroc(self.total), "mean_of_images": mean}


def auroc(counts: Tensor) -> float:
    """Area under the ROC curve from histograms of negatives and positives, (2, bins); a tie counts half.

    Raises:
        ValueError: There is no pair of one of the two kinds.
    """
    negatives, positives = counts.double()
    if not (negatives.sum() > 0 and positives.sum() > 0):
        raise ValueError("coherence needs images with patches of one label and patches of different labels")
    below = negatives.cumsum(0) - negatives / 2
    return float((positives * below).sum() / (positives.sum() * negatives.sum()))


def patch_label_counts(labels: np.ndarray, dense: DenseCLIP, pixels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each patch, (N, K), at the size that the network sees; ignored pixels are in none.

    Args:
        labels: Class of each pixel, (H, W).
        dense: The model, for its patches and padding.
        pixels: The image as the network sees it, (..., H', W'); only its size is read.
        num_classes: K.
    """
    height, width = pixels.shape[-2:]
    patch = dense.tower.patch_size
    resized = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    values = torch.from_numpy(np.asarray(resized).astype(np.int64))
    # The border that the trunk adds shows nothing: -1, as is everything that no class has.
    values = torch.where((values >= 0) & (values < num_classes), values, -1) + 1
    values = Padding.to_multiple(height, width, patch).apply(values)
    cells = values.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2).flatten(0, 1)  # (N, patch * patch)
    rows = torch.arange(len(cells))[:, None] * (num_classes + 1)
    counts = torch.bincount((rows + cells).flatten(), minlength=len(cells) * (num_classes + 1))
    return counts.view(len(cells), num_classes + 1)[:, 1:]


@dataclass
class CoherenceReport:
    """M of every layer's query, key and value, and M and C of the values that `cra_dsi` may combine.

    Attributes:
        images: Number of images.
        layers: Per layer (from 1) and feature `{"coherence", "mean_of_images"}`.
        values: For index -1 (v_L), -2, ... `{"index", "coherence", "mean_of_images", "alignment"}`.
    """

    images: int
    layers: list[dict[str, Any]]
    values: list[dict[str, Any]]

    @property
    def key_layer(self) -> int:
        """The layer of k_M, from 1: the most coherent keys."""
        return max(self.layers, key=lambda layer: layer["key"]["coherence"])["layer"]

    @property
    def most_coherent(self) -> tuple[int, str]:
        """Layer and feature with the highest M of all."""
        best = max(((layer, name) for layer in self.layers for name in FEATURES), key=lambda x: x[0][x[1]]["coherence"])
        return best[0]["layer"], best[1]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        layer, feature = self.most_coherent
        return {
            "images": self.images,
            "k_M": {"layer": self.key_layer, **self.layers[self.key_layer - 1]["key"]},
            "most_coherent": {"layer": layer, "feature": feature, **self.layers[layer - 1][feature]},
            "layers": self.layers,
            "values": self.values,
        }

    def table(self) -> list[str]:
        """Lines for people."""
        lines = ["layer   M query     key   value   |   index   M value   C alignment"]
        for number, layer in enumerate(self.layers):
            features = "".join(f"{layer[name]['coherence']:8.4f}" for name in FEATURES)
            value = self.values[number]
            lines.append(
                f"{layer['layer']:5d}  {features}   |   {value['index']:5d}  {value['coherence']:8.4f}"
                f"  {value['alignment']:12.4f}"
            )
        best = self.layers[self.key_layer - 1]["key"]["coherence"]
        lines.append(
            f"k_M is the key of layer {self.key_layer} (M = {best:.4f}, {self.images} images): "
            f"--method cra_dsi --method-option layer={self.key_layer}"
        )
        return lines


@torch.inference_mode()
def measure_coherence(
    pipe: Any,
    data: SegmentationData,
    size: int | None = None,
    templates: str | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> CoherenceReport:
    """Measure M and C of a model on labelled images, one image at a time.

    Args:
        pipe: An `open-vocab-segmentation` pipeline; a model with ARM is measured without it.
        data: The images.
        size: Shorter side in pixels that the network sees; the pipeline's default otherwise.
        templates: Prompt templates for C; the model's own otherwise.
        progress: Wraps the rows of the data, such as `tqdm`.

    Raises:
        ValueError: An image or label map is unusable, or the images do not allow a comparison.
    """
    model = pipe.model
    dense, device = DenseCLIP(getattr(model, "clip", model)), model.device
    tower = dense.tower
    last, depth = tower.last_block, tower.num_blocks
    # The background has no word: it is nobody's nearest class.
    classes = [index for index in range(len(data.classes)) if index != data.background_index]
    words = [data.classes[index] for index in classes]
    templates = templates or getattr(model.config, "templates", None) or "imagenet80"
    embeddings = pipe.text_encoder.class_embeddings(words, templates)  # (Q, D)

    request = TrunkRequest(hidden_states=tuple(range(depth)), heads=tuple(range(depth - 1)))
    layers = [{name: PairCounts() for name in FEATURES} for _ in range(depth)]
    values = [PairCounts() for _ in range(depth)]
    right, total = [0] * depth, 0
    for row in progress(data.dataset):
        image, labels = data.read(row)
        inputs = pipe.preprocess(
            image, candidate_labels=[Label(name="any", words=("any",))], background="none", size=size
        )
        pixels = inputs["pixels"][0][None].to(device, model.dtype)
        counts = patch_label_counts(labels, dense, pixels, len(data.classes))
        same, pairs = _label_pairs(counts, data.background_index, tower.patch_size)
        same, pairs, of_class = same.to(device), pairs.to(device), counts[:, classes].to(device)
        total += int(of_class.sum())

        trunk = tower.run(pixels, request)
        for index in range(depth):
            heads = trunk.heads.get(index) or project_heads(last, trunk.last_input, "qkv")
            for name, states in zip(FEATURES, heads, strict=True):
                layers[index][name].add(merge_heads(states)[0, 1:], same, pairs)

            block = depth - 1 - index  # 0 is v_L, i the v~ of the i-th block before the last
            state = trunk.hidden_states[block][:, 1:] if index else trunk.last_input[:, 1:]
            state = regenerate(tower.blocks[block], state) if index else state
            value = last.self_attn.v_proj(last.layer_norm1(state))  # (1, N, W)
            values[index].add(value[0], same, pairs)
            features = F.normalize(tower.project(last.self_attn.out_proj(value))[0], dim=-1)
            nearest = (features @ embeddings.to(features.dtype).T).argmax(dim=-1)  # (N,)
            right[index] += int(of_class.gather(1, nearest[:, None]).sum())
    return CoherenceReport(
        len(data),
        [
            {"layer": number, **{name: counts.summary() for name, counts in layer.items()}}
            for number, layer in enumerate(layers, start=1)
        ],
        [
            {"index": -1 - index, **counts.summary(), "alignment": right[index] / max(total, 1)}
            for index, counts in enumerate(values)
        ],
    )


def _label_pairs(counts: Tensor, background_index: int | None, patch_size: int) -> tuple[Tensor, Tensor]:
    """Pairs of labelled patches that count, (2, P), and whether their labels agree, (P,)."""
    labels = counts.argmax(dim=-1)
    usable = (2 * counts.sum(dim=-1) >= patch_size**2).nonzero()[:, 0]
    pairs = usable[torch.combinations(torch.arange(len(usable))).T] if len(usable) > 1 else usable.new_zeros(2, 0)
    same = labels[pairs[0]] == labels[pairs[1]]
    if background_index is not None:
        keep = ~(same & (labels[pairs[0]] == background_index))
        pairs, same = pairs[:, keep], same[keep]
    return same, pairs
