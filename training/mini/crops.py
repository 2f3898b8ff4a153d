"""Fresh random views of a photo: crop at a random scale around a wanted class, flip, colour."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from .common import IMAGENET_MEAN, IMAGENET_STD
from .data import IGNORE, BalancedSampler, Photo

cv2.setNumThreads(0)


@dataclass(frozen=True)
class CropOptions:
    """How views are drawn.

    Attributes:
        size: side of the square view in pixels.
        min_zoom: smallest side of the crop as a share of the photo's shorter side.
        max_zoom: largest one; above 1 the photo is padded, so that whole landscape photos are seen.
        aspect: crops are stretched by up to this factor.
        colour: strength of brightness, contrast, saturation and hue changes.
        grey: probability of a grey view.
        subpixels: label samples per patch side.
    """

    size: int = 224
    min_zoom: float = 0.4
    max_zoom: float = 1.25
    aspect: float = 1.25
    colour: float = 0.35
    grey: float = 0.04
    subpixels: int = 4


def jitter_colour(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation, a gain per channel and gamma: (H, W, 3) float32 in 0..1."""
    low, high = 1 - strength, 1 + strength
    image = image * rng.uniform(low, high)
    mean = image.mean()
    image = (image - mean) * rng.uniform(low, high) + mean
    grey = image.mean(axis=2, keepdims=True)
    image = (image - grey) * rng.uniform(low, high) + grey
    image = image * rng.uniform(1 - strength / 4, 1 + strength / 4, size=3).astype(np.float32)
    return np.clip(image, 0, 1, dtype=np.float32)


def random_view(
    photo: Photo, wanted: int, options: CropOptions, patch: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One view.

    Args:
        photo: the photo.
        wanted: a class that should be in the view; the crop contains one of its pixels.
        options: how to draw.
        patch: patch side in pixels.
        rng: random numbers.

    Returns:
        Image (S, S, 3) float32 in 0..1 and labels (S/patch*k, S/patch*k) uint8 with k = options.subpixels.
    """
    height, width = photo.label.shape
    side = min(height, width) * np.exp(rng.uniform(np.log(options.min_zoom), np.log(options.max_zoom)))
    stretch = np.exp(rng.uniform(-1, 1) * np.log(options.aspect) / 2)
    crop_h, crop_w = side * stretch, side / stretch
    ys, xs = np.nonzero(photo.label == wanted)
    if len(ys) and rng.random() < 0.8:
        pick = rng.integers(len(ys))
        top = ys[pick] - crop_h * rng.uniform(0.1, 0.9)
        left = xs[pick] - crop_w * rng.uniform(0.1, 0.9)
    else:
        top, left = (height - crop_h) * rng.random(), (width - crop_w) * rng.random()
    # stay inside the photo where the crop fits, else centre the photo loosely
    top = np.clip(top, min(0, height - crop_h), max(0, height - crop_h))
    left = np.clip(left, min(0, width - crop_w), max(0, width - crop_w))
    flip = -1.0 if rng.random() < 0.5 else 1.0

    def matrix(size: int) -> np.ndarray:
        """Affine map from view pixels to photo pixels (pixel centres at +0.5)."""
        sx, sy = crop_w / size, crop_h / size
        x0 = left if flip > 0 else left + crop_w
        return np.array([[flip * sx, 0, x0 + flip * sx / 2 - 0.5], [0, sy, top + sy / 2 - 0.5]], dtype=np.float32)

    shrink = crop_w / options.size
    source = photo.image
    if shrink > 1.4:  # the affine warp does not filter: blur first
        source = cv2.GaussianBlur(source, (0, 0), 0.4 * shrink)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    mean = tuple(255 * m for m in IMAGENET_MEAN)
    image = cv2.warpAffine(source, matrix(options.size), (options.size,) * 2, flags=flags, borderValue=mean)
    fine = options.size // patch * options.subpixels
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    label = cv2.warpAffine(photo.label, matrix(fine), (fine, fine), flags=flags, borderValue=IGNORE)
    image = image.astype(np.float32) / 255
    if options.colour:
        image = jitter_colour(image, options.colour, rng)
    if rng.random() < options.grey:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    return image, label


@dataclass
class Batch:
    """A batch of views.

    Attributes:
        pixels: (B, 3, S, S) normalised.
        labels: (B, g*k, g*k) int64, class index of the view's own set or 255.
        datasets: name of the set of each view.
    """

    pixels: Tensor
    labels: Tensor
    datasets: list[str]


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) in 0..1 -> zero mean and unit variance per ImageNet channel."""
    return (images - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def draw_batch(
    photos: list[Photo], sampler: BalancedSampler, options: CropOptions, batch_size: int, patch: int, seed: int
) -> Batch:
    """Draw one batch; the same seed always gives the same batch, which is what makes resuming exact."""
    rng = np.random.default_rng(seed)
    images, labels, datasets = [], [], []
    for _ in range(batch_size):
        index, wanted = sampler.draw(rng)
        image, label = random_view(photos[index], wanted, options, patch, rng)
        images.append(image)
        labels.append(label)
        datasets.append(photos[index].dataset)
    pixels = normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    return Batch(pixels.contiguous(), torch.from_numpy(np.stack(labels)).long(), datasets)
