"""Check a card without the network: metadata that the Hub accepts, and a text without gaps.

    python -m arm_hf.hub_cards.lint CARD.md ...

prints what is wrong, a line each, and ends with 1 if there is anything. The Hub's own check needs the network; this
one knows what it refuses (nulls, free text where ids belong, words where numbers belong) and what readers hate.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

REQUIRED = ("library_name", "pipeline_tag", "license", "language", "tags")
SECTIONS = ("Use", "What it is made of", "Training", "Results", "Limits and biases", "Licences", "Citation")
GAPS = ("[More Information Needed]", "{{", "}}", "{%", "TODO", "FIXME", "TBD", "| nan |", "| None |")

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", flags=re.DOTALL)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_MACHINE = re.compile(r"(?:^|[\s(\"'`=])(/(?:home|root|work|tmp|Users|mnt|data)/[^\s)\"'`]*|file:\S+|[A-Z]:\\\S*)")


def problems(text: str, folder: Path | None = None, sections: Sequence[str] = SECTIONS) -> list[str]:
    """What is wrong with a card.

    Args:
        text: The card.
        folder: Where its relative links lead; None takes them as they are.
        sections: Titles that it must have; cards that people wrote have their own.

    Returns:
        A line for each problem; an empty list for a card that may be published.
    """
    found = _FRONT.match(text)
    if found is None:
        return ["the card has no metadata between --- lines at its head"]
    try:
        data = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping of keys to values"]
    return [*_metadata(data), *_text(text[found.end() :], folder, sections)]


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language in a card.

    Args:
        text: The card.
        language: Such as "python".
    """
    return [body for name, body in _FENCE.findall(text) if name == language]


def _metadata(data: dict[str, Any]) -> Iterator[str]:
    for key in REQUIRED:
        if not data.get(key):
            yield f"the metadata lacks {key}"
    yield from (f"the metadata has no value for {path}" for path in _nulls(data))
    if data.get("library_name") not in (None, "transformers"):
        yield f"library_name is {data['library_name']!r}; transformers' pipelines load only 'transformers'"
    if not re.fullmatch(r"[a-z-]+", str(data.get("pipeline_tag", "x"))):
        yield f"pipeline_tag is {data['pipeline_tag']!r}, not a task of the Hub"
    for code in _as_list(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}", str(code)):
            yield f"language {code!r} is no ISO 639 code"
    for key in ("base_model", "datasets"):
        for name in _as_list(data.get(key)):
            if not isinstance(name, str) or not _HUB_ID.match(name):
                yield f"{key} {name!r} is no id of the Hub"
    if not isinstance(data.get("tags", []), list):
        yield "tags is no list"
    yield from _model_index(data.get("model-index", []))


def _model_index(index: Any) -> Iterator[str]:
    for entry in index if isinstance(index, list) else [{}]:
        if not isinstance(entry, dict) or not entry.get("name") or not entry.get("results"):
            yield "model-index has an entry without name or results"
            continue
        for result in entry["results"]:
            where = (result.get("dataset") or {}).get("name", "a result")
            for path in (("task", "type"), ("dataset", "type"), ("dataset", "name"), ("metrics",)):
                value: Any = result
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
                if not value:
                    yield f"model-index, {where}: {'.'.join(path)} is missing"
            if not _HUB_ID.match(str((result.get("dataset") or {}).get("type", "x"))):
                yield f"model-index, {where}: the dataset's type {result['dataset']['type']!r} is no id"
            for metric in result.get("metrics") or []:
                value = metric.get("value")
                number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                if not number or not 0 <= value <= 100:
                    yield f"model-index, {where}: {metric.get('name')} is {value!r}, not a percentage"


def _text(body: str, folder: Path | None, sections: Sequence[str]) -> Iterator[str]:
    titles = re.findall(r"^## (.+)$", body, flags=re.MULTILINE)
    yield from (f"the section {title!r} is missing" for title in sections if title not in titles)
    prose = _FENCE.sub("", body)
    # Braces are at home in code and BibTeX.
    yield from (f"the text holds {gap!r}" for gap in GAPS if gap in prose)
    for path in _MACHINE.findall(body):
        yield f"the text holds a path of some machine: {path}"
    for target in _LINK.findall(prose):
        yield from _link(target, folder)
    for section in re.split(r"^## ", prose, flags=re.MULTILINE)[1:]:
        title, _, rest = section.partition("\n")
        if not rest.strip() and title not in ("Use", "Citation"):
            yield f"the section {title!r} is empty"
    for number, block in enumerate(code_blocks(body, "python"), start=1):
        try:
            compile(block, f"python block {number}", "exec")
        except SyntaxError as error:
            yield f"python block {number} does not compile: {error.msg} in line {error.lineno}"


def _link(target: str, folder: Path | None) -> Iterator[str]:
    parts = urlsplit(target)
    if parts.scheme:
        if parts.scheme != "https" or "." not in parts.netloc:
            yield f"the link {target!r} is no https address"
    elif target.startswith("/") or ".." in Path(parts.path).parts:
        yield f"the link {target!r} leaves the repository"
    elif folder is not None and parts.path and not (folder / parts.path).is_file():
        yield f"the link {target!r} leads nowhere"


def _nulls(value: Any, path: str = "") -> Iterator[str]:
    if value is None:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _nulls(inner, f"{path}.{key}" if path else str(key))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def main() -> None:
    """Check the cards named on the command line."""
    paths = [Path(name) for name in sys.argv[1:]]
    if not paths:
        sys.exit("usage: python -m arm_hf.hub_cards.lint CARD.md ...")
    lines = [f"{path}: {line}" for path in paths for line in problems(path.read_text(encoding="utf-8"), path.parent)]
    print("\n".join(lines) or f"{len(paths)} cards, nothing wrong")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
