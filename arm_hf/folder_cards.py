"""The card of a model folder, from what lies beside the weights: config, results, options of the run, pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_hf import DEFAULT_MODEL, resolve_model
from arm_hf.hub_cards.build_card import HERE, MARKER, MINI_FACTS, MINI_PICTURE, Picture, model_card, read_json
from arm_hf.hub_cards.metadata import CardFacts, is_hub_id

CARD_NAME, PICTURES = "README.md", "pictures"
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")
GPS = 0x8825  # EXIF's pointer to the place
TRAINING_OPTIONS = (  # of a run's options.yaml, those that a reader of the card asks for
    *("data", "split", "class_names", "epochs", "max_steps", "batch_size", "learning_rate", "weight_decay", "schedule"),
    *("loss", "ignored_pixels", "crop_size", "resize_min", "resize_max", "seed", "lora", "lora_rank"),
)


@dataclass(frozen=True)
class CardRequest:
    """What a person adds to a card.

    Attributes:
        results: JSON files of measurements; by default `results.json` and `results/*.json` beside the weights.
        pictures: Sample pictures, beside those in `pictures/`.
        license: Identifier of the weights' licence.
        datasets: Hub ids of the training data.
    """

    results: Sequence[str | os.PathLike] = ()
    pictures: Sequence[str | os.PathLike] = ()
    license: str = "apache-2.0"
    datasets: Sequence[str] = ()


def write_card(source: Path, repo_id: str | None, card: CardRequest, overwrite: bool = False) -> Path:
    """Build the card of a folder anew, in place.

    Args:
        source: Model folder.
        repo_id: Repository that the examples name, if there is one.
        card: What a person adds.
        overwrite: Replace a card that somebody wrote.

    Raises:
        ValueError: A card is there that somebody wrote, and `overwrite` is off; or the new one is not fit to publish.
    """
    from arm_hf.hub_cards.build_card import write_card as write

    path = source / CARD_NAME
    if path.exists() and MARKER not in path.read_text(encoding="utf-8") and not overwrite:
        raise ValueError(f"{str(path)!r} is a card that somebody wrote; pass --overwrite to replace it")
    base = read_json(source / "config.json", "").get("clip_name_or_path")
    pictures = [Picture(f"{PICTURES}/{found.name}", _words(found)) for found in _pictures_of(source)]
    write(path, _new_card(source, source, repo_id, card, pictures, base if is_hub_id(base) else None))
    return path


def card_text(
    source: Path,
    folder: Path,
    repo_id: str,
    card: CardRequest,
    pictures: Sequence[Picture],
    base_model: str | None,
) -> tuple[str, bool]:
    """The text of a card, and whether it is the one of the source, which somebody wrote by hand.

    Args:
        source: Model folder.
        folder: The folder that the card is for.
        repo_id: Repository that the examples name.
        card: What a person adds.
        pictures: In `folder`.
        base_model: Hub id of the CLIP, or None.
    """
    own = source / CARD_NAME
    if own.is_file() and not _is_mini(source):
        text = own.read_text(encoding="utf-8")
        if MARKER not in text:
            return text, True
    return _new_card(source, folder, repo_id, card, pictures, base_model), False


def copy_pictures(source: Path, folder: Path, more: Sequence[str | os.PathLike]) -> list[Picture]:
    """Put the sample pictures of a model, and some more, into a folder.

    Args:
        source: Model folder, whose `pictures/` are taken.
        folder: Where to.
        more: Further files.

    Raises:
        ValueError: Two have the same name, or one says where it was taken.
        OSError: One is no picture.
    """
    from PIL import Image

    if _is_mini(source) and not more and (HERE / MINI_PICTURE.path).is_file():
        (folder / PICTURES).mkdir()
        shutil.copyfile(HERE / MINI_PICTURE.path, folder / MINI_PICTURE.path)
        return [MINI_PICTURE]
    pictures = []
    for path in (*_pictures_of(source), *map(Path, more)):
        target = folder / PICTURES / path.name
        if target.exists():
            raise ValueError(f"two sample pictures are called {path.name!r}; rename one")
        with Image.open(path) as image:
            if GPS in image.getexif():
                raise ValueError(f"{path.name!r} says where it was taken (GPS in its EXIF data); take that out first")
            image.load()  # all of it can be read
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        pictures.append(Picture(f"{PICTURES}/{path.name}", _words(path)))
    return pictures


def _new_card(
    source: Path,
    folder: Path,
    repo_id: str | None,
    card: CardRequest,
    pictures: Sequence[Picture],
    base_model: str | None,
) -> str:
    mini = _is_mini(source)
    results = [read_json(Path(path), "arm-hf evaluate") for path in card.results] or _results_of(source)
    options = {} if mini else _options_of(source)
    trained_on = card.datasets or [name for name in options.get("data") or () if is_hub_id(name)]
    facts = MINI_FACTS if mini else CardFacts(card.license, tuple(trained_on), base_model)
    name = repo_id.rpartition("/")[2] if repo_id else DEFAULT_MODEL if mini else _name_of(source)
    template = f"{DEFAULT_MODEL}.md.j2" if mini else "trained.md.j2"
    training = _training(source, options)
    tuned = bool(read_json(source / "config.json", "").get("adapter"))
    return model_card(folder, name, template, facts, results, pictures, repo_id, training, tuned)


def _is_mini(source: Path) -> bool:
    try:
        return source.samefile(resolve_model(DEFAULT_MODEL))
    except FileNotFoundError:
        return False


def _name_of(source: Path) -> str:
    path = source.resolve()
    return path.parent.name if path.name in ("best", "last") else path.name


def _results_of(source: Path) -> list[dict[str, Any]]:
    if _is_mini(source):
        return [read_json(HERE / "results" / f"{DEFAULT_MODEL}.json", "training/pretrain_mini.py --results")]
    paths = [source / "results.json", *sorted((source / "results").glob("*.json"))]
    return [read_json(path, "arm-hf evaluate") for path in paths if path.is_file()]


def _run_of(source: Path) -> Path:
    """The folder of the run that a model came from: it holds best/ and last/."""
    return source if (source / "options.yaml").is_file() else source.parent


def _options_of(source: Path) -> dict[str, Any]:
    import yaml

    path = _run_of(source) / "options.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def _training(source: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says about the run: its options, and the steps it took."""
    found = {name: options[name] for name in TRAINING_OPTIONS if options.get(name) not in (None, [], False)}
    for name, value in found.items():
        if isinstance(value, list):
            found[name] = ", ".join(_public_name(str(item)) for item in value)
    log = _run_of(source) / "log.jsonl"
    steps = (
        [json.loads(line)["step"] for line in log.read_text().splitlines() if line] if found and log.is_file() else []
    )
    return {**found, **({"steps taken": max(steps)} if steps else {})}


def _public_name(text: str) -> str:
    """A hub id as it is, of a path its last part: where data lie on this machine is nobody's business."""
    return text if is_hub_id(text) else Path(text).name


def _pictures_of(source: Path) -> list[Path]:
    found = sorted((source / PICTURES).glob("*")) if (source / PICTURES).is_dir() else []
    return [path for path in found if path.suffix.lower() in PICTURE_ENDINGS]


def _words(path: Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ")
