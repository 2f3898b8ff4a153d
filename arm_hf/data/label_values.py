"""What the values in label files stand for: tables from value to class, for the conventions of the standard data sets.

`IGNORE` marks a value whose pixels do not count; a value that a table does not name is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .segmentation_data import NOT_ALLOWED

IGNORE = -2

Values = Mapping[int, int]


def in_order(num_classes: int, unlabelled: Iterable[int] = (255,)) -> Values:
    """Value i is class i ("train ids").

    Args:
        num_classes: K.
        unlabelled: Values that mean no class.
    """
    return {**dict.fromkeys(unlabelled, IGNORE), **{value: value for value in range(num_classes)}}


def from_one(num_classes: int, unlabelled: Iterable[int] = (0, 255)) -> Values:
    """Value i is class i - 1, and 0 is no class ("reduce zero label").

    Args:
        num_classes: K.
        unlabelled: Values that mean no class.
    """
    return {**dict.fromkeys(unlabelled, IGNORE), **{value: value - 1 for value in range(1, num_classes + 1)}}


def make_lookup(values: Values, ignore_index: int) -> np.ndarray:
    """Label of each value from 0 to the highest named, int32; `NOT_ALLOWED` where the table has none.

    Args:
        values: Class of each value, or `IGNORE` for no class.
        ignore_index: Label of pixels of no class.
    """
    lookup = np.full(max(values) + 1, NOT_ALLOWED, dtype=np.int32)
    for value, label in values.items():
        lookup[value] = ignore_index if label == IGNORE else label
    return lookup


# COCO numbers its categories from 1 and has dropped eleven of them; the pixel maps of COCO-Stuff 164k hold category
# minus 1: things 0..89, stuff 91..181, 255 unlabelled (Caesar et al. 2018, and the labels.txt that comes with it).
_COCO_DROPPED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
_COCO_KEPT = [value for value in range(182) if value not in _COCO_DROPPED]
COCO_STUFF_RAW: Values = {255: IGNORE, **{value: index for index, value in enumerate(_COCO_KEPT)}}

# COCO-Stuff 10k counts from 1, and 0 is unlabelled.
COCO_STUFF_10K_RAW: Values = {0: IGNORE, **{value + 1: index for index, value in enumerate(_COCO_KEPT)}}

# COCO-Object: things are 1..80; stuff and unlabelled pixels are background, so that nothing is ignored (Wang et al.,
# SCLIP, ECCV 2024, and those who follow it).
COCO_OBJECT_RAW: Values = {255: 0, **{value: i + 1 if i < 80 else 0 for i, value in enumerate(_COCO_KEPT)}}
COCO_OBJECT_FROM_STUFF: Values = {255: 0, **{i: i + 1 if i < 80 else 0 for i in range(171)}}

# Numbers of the 59 classes among the 459 of PASCAL Context (59_labels.txt and labels.txt of that data set).
# fmt: off
CONTEXT_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on
CONTEXT_60_RAW: Values = {**dict.fromkeys(range(460), 0), **{value: i + 1 for i, value in enumerate(CONTEXT_IDS)}}
CONTEXT_59_RAW: Values = {**dict.fromkeys(range(460), IGNORE), **{value: i for i, value in enumerate(CONTEXT_IDS)}}

# Cityscapes' label ids of the 19 classes that count, in the order of the train ids; the others of 0..33 are void.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_RAW: Values = {
    **dict.fromkeys([*range(34), 255], IGNORE),
    **{value: index for index, value in enumerate(CITYSCAPES_IDS)},
}
