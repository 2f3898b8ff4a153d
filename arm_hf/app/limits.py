"""What a visitor may ask of the page, so that no single one can exhaust the machine behind it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from arm_hf.modeling.images import IMAGE_FORMATS, UnreadableImage, load_image
from arm_hf.modeling.prompts import Background, Label, parse_labels


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all visitors together.

    Attributes:
        file_megabytes: Largest file that can be uploaded.
        megapixels: Most pixels of a photo, looked up in its header before it is unpacked.
        longest_side: Photos with a longer side are reduced to it.
        labels: Most labels, the background's words not counted.
        words: Most words of all labels and the background together; each costs as many sentences as there are
            templates.
        letters: Longest label or word.
        network_side: Largest shorter side that the network sees.
        queue: Visitors that may wait; the next one is asked to come back.
        sessions: Results that are kept for redrawing, the oldest go first.
        disk_megabytes: Uploads and results of all visitors; the oldest files go first.
        keep_seconds: Age at which these files go in any case.
    """

    file_megabytes: int = 20
    megapixels: int = 50
    longest_side: int = 1280
    labels: int = 40
    words: int = 80
    letters: int = 60
    network_side: int = 672
    queue: int = 16
    sessions: int = 64
    disk_megabytes: int = 1024
    keep_seconds: int = 3600

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"the limit {name} must be at least 1, got {value}")


def read_labels(text: str | None, limits: Limits) -> tuple[Label, ...]:
    """Return the labels of the text field.

    Args:
        text: What was typed.
        limits: Of this page.

    Raises:
        ValueError: There are none, too many, one is too long, or as `parse_labels` does.
    """
    if not text or not text.strip():
        raise ValueError("type what to look for, such as: cat, dog=puppy|hound, sky")
    if len(text) > limits.words * (limits.letters + 2):
        raise ValueError(f"the labels are {len(text)} letters long; this page takes {limits.words} words at most")
    labels = parse_labels(text.strip().strip(","))
    if len(labels) > limits.labels:
        raise ValueError(f"{len(labels)} labels are too many for this page; it takes {limits.labels}")
    _check_words([text for label in labels for text in (label.name, *label.words)], limits)
    _check_count(sum(len(label.words) for label in labels), limits)
    return labels


def read_background(text: str | None, labels: Sequence[Label], limits: Limits) -> Background | None:
    """Return the background policy of the text field, or None (the model's own) if it is empty.

    Args:
        text: What was typed.
        labels: The request's labels; their words count, too, towards the most words of a request.
        limits: Of this page.

    Raises:
        ValueError: As `Background.parse` does, or a word is too long, or there are too many.
    """
    if not text or not text.strip():
        return None
    if len(text) > limits.words * (limits.letters + 2):
        raise ValueError(f"the background is {len(text)} letters long; this page takes {limits.words} words at most")
    policy = Background.parse(text)
    _check_words(policy.words, limits)
    _check_count(sum(len(label.words) for label in labels) + len(policy.words), limits)
    return policy


def read_photo(path: str | None, limits: Limits) -> tuple[Image.Image, str]:
    """Return an uploaded photo, reduced where it is too large, and a sentence that says so (or nothing).

    Args:
        path: File of the upload.
        limits: Of this page.

    Raises:
        ValueError: There is none, it cannot be read, or it has too many pixels.
    """
    if path is None:
        raise ValueError("drop a photo into the field on the left first, or choose one of the examples")
    try:
        size = os.path.getsize(path)
        if size > limits.file_megabytes * 10**6:
            raise ValueError(f"the file has {size / 1e6:.0f} MB; this page takes {limits.file_megabytes}")
        with open(path, "rb") as file:
            data = io.BytesIO(file.read())
    except OSError as error:
        raise ValueError("the photo is no longer here; drop it once more") from error
    data.name = os.path.basename(path)  # what an error calls it: the name without the server's folders
    photo = _open(data, limits)
    if max(photo.size) <= limits.longest_side:
        return photo, ""
    before = f"{photo.width} × {photo.height}"
    photo.thumbnail((limits.longest_side, limits.longest_side), Image.Resampling.LANCZOS)
    return photo, f"The photo was reduced from {before} to {photo.width} × {photo.height} pixels."


def _open(data: io.BytesIO, limits: Limits) -> Image.Image:
    Image.init()
    try:
        with Image.open(data, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN]) as header:
            pixels = header.width * header.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pixels = 0  # what is wrong with it, load_image says
    if pixels > limits.megapixels * 10**6:
        raise ValueError(f"the photo has {pixels / 1e6:.0f} megapixels; this page takes {limits.megapixels}")
    data.seek(0)
    try:
        return load_image(data)
    except UnreadableImage as error:
        raise ValueError(str(error)) from error


def _check_words(words: Sequence[str], limits: Limits) -> None:
    for word in words:
        if len(word) > limits.letters:
            raise ValueError(f"{word[:24] + '…'!r} is {len(word)} letters long; this page takes {limits.letters}")


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.words:
        raise ValueError(f"{count} words (synonyms included) are too many for this page; it takes {limits.words}")
