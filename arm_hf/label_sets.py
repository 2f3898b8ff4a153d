"""The label sets of the literature, and labels kept in a text file.

The words are those that the papers' code reads; each JSON file in `assets/label_sets` names its sources.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from arm_hf.modeling.prompts import Label, parse_labels

_FOLDER = Path(__file__).parent / "assets" / "label_sets"


def list_label_sets() -> list[str]:
    """Return the names `load_label_set` knows, sorted.

    A name that ends in `_clearclip` is the variant of ClearCLIP's code, which uses fewer synonyms.
    """
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_label_set(name: str) -> tuple[Label, ...]:
    """Return the classes of a label set in the order of the data set's indices.

    ```python
    >>> from arm_hf.label_sets import load_label_set
    >>> [label.name for label in load_label_set("voc21")[:3]]
    ['background', 'aeroplane', 'bicycle']

    ```

    Args:
        name: One of `list_label_sets()`. In `voc21`, `context60`, `coco_object` and their variants class 0 is named
            `"background"`; `Vocabulary.build` takes it for the background class.

    Raises:
        ValueError: If there is no such set.
    """
    return parse_labels([Label(entry["name"], tuple(entry["words"])) for entry in describe_label_set(name)["labels"]])


def describe_label_set(name: str) -> dict:
    """Return a set's whole record: title, data set, source of the words, notes, and labels with their words.

    Raises:
        ValueError: If there is no such set.
    """
    known = list_label_sets()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown label set {name!r}; {guess}known are {', '.join(known)}")
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def labels_from(source: str | os.PathLike) -> tuple[Label, ...]:
    """Return the labels of a set, or those of a text file with one label on each line.

    Args:
        source: One of `list_label_sets()` or the path of a UTF-8 text file. A line reads `dog` or `dog=puppy|hound`, a
            comma is part of the word, and empty lines and lines that begin with `#` do not count.

    Raises:
        ValueError: If the source is neither, or the file holds no valid labels.
    """
    if str(source) in list_label_sets():
        return load_label_set(str(source))
    if not os.path.isfile(source):
        raise ValueError(
            f"{os.fspath(source)!r} is neither a text file nor a label set; sets are {', '.join(list_label_sets())}"
        )
    try:
        with open(source, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
        return parse_labels([line for line in lines if line and not line.startswith("#")])
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read labels from {os.fspath(source)!r}: {error}") from error
