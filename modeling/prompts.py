"""From the words a user types to the sentences CLIP's text tower reads.

A *label* is one class of the result: a name that people see and the words (synonyms) the text tower reads for it.
Every word is one query, put into every template of a template set; the best query of a class counts. The *background*
is one class of its own, reached by words, by a probability threshold, or by both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

# The 80 templates of "prompt engineering and ensembling" for ImageNet (Radford et al., 2021, "Learning Transferable
# Visual Models From Natural Language Supervision", section 3.1.4), as OpenAI published them for zero-shot CLIP. SCLIP,
# ClearCLIP, NACLIP, ResCLIP and CLIPer (there called "openai") read the same list. The wording is theirs.
IMAGENET_TEMPLATES: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

# The 15 templates CLIPer (Sun et al., 2024) calls "car" after CLIP as RNN (Sun et al., 2024), which has them from
# CLIP-ES (Lin et al., 2023). Two of them end without a full stop, as they do there.
CLIPER_TEMPLATES: tuple[str, ...] = (
    "a clean origami {}.",
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)

# CLIP's own default sentence (Radford et al., 2021, section 3.1.4).
SINGLE_TEMPLATE: tuple[str, ...] = ("a photo of a {}.",)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "imagenet80": IMAGENET_TEMPLATES,
    "cliper15": CLIPER_TEMPLATES,
    "single": SINGLE_TEMPLATE,
}

BACKGROUND_NAME = "background"


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return the sentences that a class word is put into.

    Args:
        templates: Name of a set (`"imagenet80"`, `"cliper15"`, `"single"`), one template of your own, or a sequence of
            them. A template holds `{}` once, where the word goes. More templates cost text-tower time only, once per
            label set: 80 sentences per word with `"imagenet80"`.

    Raises:
        ValueError: If the name is unknown, there is no template, or one of them does not hold `{}` exactly once.
    """
    if isinstance(templates, str):
        if templates in TEMPLATE_SETS:
            return TEMPLATE_SETS[templates]
        if "{" not in templates and "}" not in templates:
            raise ValueError(
                f"unknown template set {templates!r}; choose one of {', '.join(TEMPLATE_SETS)}, "
                "or give a template of your own that holds {} once, such as 'a photo of a {}.'"
            )
        templates = (templates,)
    elif not isinstance(templates, Sequence):
        raise ValueError(f"templates must be a name or a list of strings, not {type(templates).__name__}")
    if len(templates) == 0:
        raise ValueError("the list of templates is empty; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if not isinstance(template, str):
            raise ValueError(f"a template must be a string, not {type(template).__name__} ({template!r})")
        if template.count("{}") != 1 or "{" in (rest := template.replace("{}", "")) or "}" in rest:
            raise ValueError(f"template {template!r} must hold {{}} exactly once and no other brace")
    return tuple(templates)


@dataclass(frozen=True)
class Label:
    """One class: the name people see and the words the text tower reads.

    Blanks are tidied (`" potted  plant "` becomes `"potted plant"`), and a word that comes twice counts once, whatever
    its case (CLIP's tokenizer knows lower case only).

    Attributes:
        name: What the result, the legend and `id2label` say.
        words: The queries of the class; a pixel's probability for the class is that of its best word. The name is a
            query only if it stands here too. Empty only for a background that is reached by a threshold alone.

    Raises:
        ValueError: If the name or one of the words is empty or not a string.
    """

    name: str
    words: tuple[str, ...]

    def __post_init__(self):
        name = _tidy(self.name, "a label's name")
        if isinstance(self.words, str) or not isinstance(self.words, Sequence):
            raise ValueError(f"the words of label {name!r} must be a list of strings, not {self.words!r}")
        words = [_tidy(word, f"a synonym of label {name!r}") for word in self.words]
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "words", _unique(words))


def parse_labels(
    labels: str | Sequence[str | Label | Sequence[str]] | Mapping[str, str | Sequence[str]],
) -> tuple[Label, ...]:
    """Return the classes that the user asks for, in the order given.

    ```python
    >>> from arm_hf.modeling.prompts import parse_labels
    >>> [(label.name, label.words) for label in parse_labels("cat, dog=puppy|hound")]
    [('cat', ('cat',)), ('dog', ('dog', 'puppy', 'hound'))]

    ```

    Args:
        labels: One of
            - a string, labels separated by commas or line ends. `dog` is a class with one word. `dog=puppy|hound` (or
              `dog|puppy|hound`) is a class named "dog" that is also found by its synonyms. `animal:=cat|dog` is found
              by the words on the right only, the name is not read;
            - a list of such labels (a comma is then part of the word), of `Label`s, or of lists of words whose first
              is the name;
            - a mapping from names to their words: exactly the words given are read.

    Returns:
        A tuple of `Label`, each with at least one word.

    Raises:
        ValueError: If there is no label, a label or synonym is empty or not a string, or two labels share a name
            (blanks and case aside). Two classes may share a *word*; the earlier one then wins the tie.
    """
    if isinstance(labels, Label):
        labels = (labels,)
    if isinstance(labels, str):
        if not labels.strip(", \t\r\n"):
            raise ValueError(f"no labels in {labels!r}; give at least one, such as 'cat, dog=puppy|hound, sky'")
        parts = [part for line in labels.splitlines() if line.strip() for part in line.split(",")]
        parsed = [_parse_one(part, position) for position, part in enumerate(parts, start=1)]
    elif isinstance(labels, Mapping):
        parsed = []
        for name, words in labels.items():
            tidy_name = _tidy(name, "a label's name")
            given: Any = words.split("|") if isinstance(words, str) else words
            parsed.append(Label(tidy_name, given))
    elif isinstance(labels, Sequence) and not isinstance(labels, bytes | bytearray):
        parsed = [_parse_one(item, position) for position, item in enumerate(labels, start=1)]
    else:
        raise ValueError(f"labels must be a string, a list or a mapping, not {type(labels).__name__}")
    if not parsed:
        raise ValueError("the list of labels is empty; give at least one, such as 'cat' or 'dog=puppy|hound'")

    seen: dict[str, str] = {}
    for label in parsed:
        if not label.words:
            raise ValueError(f"label {label.name!r} has no words; give at least one, such as {label.name!r} itself")
        key = label.name.casefold()
        if key in seen:
            raise ValueError(f"label {label.name!r} is given twice (as {seen[key]!r} before); names must be different")
        seen[key] = label.name
    return tuple(parsed)


def format_labels(labels: Sequence[Label]) -> str:
    """Write labels as the string that `parse_labels` reads back to the same labels.

    Raises:
        ValueError: If a name or word holds `,`, `=` or `|`, or a name ends in `:`; the string form cannot say so.
    """
    parts = []
    for label in labels:
        for text in (label.name, *label.words):
            if any(character in text for character in ",=|"):
                raise ValueError(
                    f"{text!r} of label {label.name!r} cannot be written as a string: it holds ',', '=' or '|'"
                )
        if label.name.endswith(":"):
            raise ValueError(f"label {label.name!r} cannot be written as a string: it ends in ':'")
        if label.words == (label.name,):
            parts.append(label.name)
        elif label.words[:1] == (label.name,):
            parts.append(f"{label.name}={'|'.join(label.words[1:])}")
        else:
            parts.append(f"{label.name}:={'|'.join(label.words)}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Background:
    """How "none of the labels" is decided. `Background()` is the empty policy: every pixel gets a label.

    ```python
    >>> from arm_hf import Background
    >>> Background.parse("0.3|sky|wall")
    Background(threshold=0.3, words=('sky', 'wall'), name='background')

    ```

    Attributes:
        threshold: A pixel whose best class has a probability below this value becomes background. Depends on the number
            of labels and on the logit scale; the papers use 0.1 to 0.5.
        words: Words whose class is the background, such as `("sky", "wall", "grass")`: a pixel that fits one of them
            better than every label becomes background.
        name: The name of the background class in the result.

    Raises:
        ValueError: If the threshold does not lie between 0 and 1, or a word or the name is empty or not a string.
    """

    threshold: float | None = None
    words: tuple[str, ...] = ()
    name: str = BACKGROUND_NAME

    def __post_init__(self):
        if self.threshold is not None:
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, Real):
                raise ValueError(f"the background threshold must be a number, not {self.threshold!r}")
            if not 0.0 < self.threshold < 1.0:  # false for nan as well
                raise ValueError(f"the background threshold must lie between 0 and 1, got {self.threshold!r}")
            object.__setattr__(self, "threshold", float(self.threshold))
        if isinstance(self.words, str) or not isinstance(self.words, Sequence):
            raise ValueError(f"the background words must be a list of strings, not {self.words!r}")
        object.__setattr__(self, "words", _unique([_tidy(word, "a background word") for word in self.words]))
        object.__setattr__(self, "name", _tidy(self.name, "the background's name"))

    def __bool__(self) -> bool:
        return self.threshold is not None or bool(self.words)

    @classmethod
    def parse(cls, value: Any) -> Background:
        """Read a policy from what users write.

        Args:
            value: `None` or `"none"` (no background), a number (threshold), a string or list of words (`"sky|wall"`;
                a number among them is the threshold: `"0.3|sky|wall"`), a mapping with the keys `threshold`, `words`
                and `name`, or a `Background`.

        Raises:
            ValueError: If the value is none of these, or not a valid threshold or word.
        """
        if isinstance(value, Background):
            return value
        if value is None:
            return cls()
        if isinstance(value, bool):
            raise ValueError(f"background must be a threshold, words or None, not {value!r}")
        if isinstance(value, Real):
            return cls(threshold=float(value))
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in ("threshold", "words", "name")]
            if unknown:
                raise ValueError(f"unknown background key {unknown[0]!r}; allowed are threshold, words and name")
            # None stands for "not given", as it does in a JSON configuration.
            given = {key: item for key, item in value.items() if item is not None}
            if isinstance(given.get("words"), str):
                given["words"] = tuple(given["words"].replace(",", "|").split("|"))
            return cls(**given)
        if isinstance(value, str):
            if value.strip().casefold() == "none":
                return cls()
            value = value.replace(",", "|").split("|")
        if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
            raise ValueError(f"background must be a threshold, words or None, not {type(value).__name__}")
        numbers = [_as_number(item) for item in value]
        thresholds = [number for number in numbers if number is not None]
        words = tuple(item for item, number in zip(value, numbers, strict=True) if number is None)
        if len(thresholds) > 1:
            raise ValueError(
                f"background has {len(thresholds)} thresholds ({', '.join(map(str, thresholds))}); give one"
            )
        return cls(threshold=thresholds[0] if thresholds else None, words=words)


@dataclass(frozen=True)
class Vocabulary:
    """All that the decision needs to know about the words: classes, their queries, and the background.

    Attributes:
        classes: The classes in the order of the label map's indices. A background that is not among the user's labels
            comes first.
        background_index: Index of the background class, or `None` if every pixel gets a label.
        threshold: Probability below which a pixel becomes background, or `None`.
    """

    classes: tuple[Label, ...]
    background_index: int | None = None
    threshold: float | None = None

    @classmethod
    def build(cls, labels: Any, background: Any = None) -> Vocabulary:
        """Join labels and background policy.

        A label that bears the background's name (`"background"`, unless the policy names another) *is* the background
        class: it keeps its place and its words, and a threshold applies to it.

        Args:
            labels: See `parse_labels`.
            background: See `Background.parse`.

        Raises:
            ValueError: As the two of them do, and if the background's words are given in both.
        """
        classes, policy = parse_labels(labels), Background.parse(background)
        names = [label.name.casefold() for label in classes]
        index = names.index(policy.name.casefold()) if policy.name.casefold() in names else None
        if index is None:
            if not policy:
                return cls(classes)
            return cls((Label(policy.name, policy.words), *classes), 0, policy.threshold)
        if policy.words:
            raise ValueError(
                f"the labels already hold the class {classes[index].name!r}; give the background words there or in "
                "`background`, not in both"
            )
        return cls(classes, index, policy.threshold)

    @property
    def queries(self) -> tuple[str, ...]:
        """Every word of every class, class after class."""
        return tuple(word for label in self.classes for word in label.words)

    @property
    def class_of_query(self) -> tuple[int, ...]:
        """The class index of each query."""
        return tuple(index for index, label in enumerate(self.classes) for _ in label.words)

    @property
    def id2label(self) -> dict[int, str]:
        """Class index to name."""
        return {index: label.name for index, label in enumerate(self.classes)}

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.classes)


def _tidy(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, not {type(text).__name__} ({text!r})")
    if not (tidied := " ".join(text.split())):
        raise ValueError(f"{what} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in tidied):
        raise ValueError(f"{what} is no valid Unicode text: {tidied[:60]!a}")
    return tidied


def _unique(words: Sequence[str]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for word in words:
        first.setdefault(word.casefold(), word)
    return tuple(first.values())


def _parse_one(item: Any, position: int) -> Label:
    """Read one label: a `Label`, `"name=word|word"`, or a list of words whose first is the name."""
    if isinstance(item, Label):
        return item
    if isinstance(item, str):
        if not item.strip():
            raise ValueError(f"label {position} is empty; remove the extra comma or give it a name")
        name, equals, words = item.partition("=")
        if equals and name.endswith(":"):
            return Label(name[:-1], tuple(words.split("|")))
        if equals:
            return Label(name, (name, *words.split("|")))
        item = item.split("|")
    if not isinstance(item, Sequence) or isinstance(item, bytes | bytearray):
        raise ValueError(f"label {position} must be a string or a list of words, not {type(item).__name__} ({item!r})")
    if len(item) == 0:
        raise ValueError(f"label {position} is an empty list; give at least one word")
    return Label(item[0], tuple(item))


def _as_number(item: Any) -> float | None:
    if isinstance(item, str):
        try:
            number = float(item)
        except ValueError:
            return None
        return number if math.isfinite(number) else None  # "nan" and "inf" are words
    return float(item) if isinstance(item, Real) and not isinstance(item, bool) else None
