"""Writes the cards of models from measured results and the models' own files, so that no figure is typed by hand.

    python -m arm_hf.hub_cards.build_card

writes all cards of this repository: that of the embedded model from `results/arm-clip-mini.json`, and those of the
recipes whose weights nobody has trained yet. `arm-hf card` and `arm-hf publish` call `model_card` for other folders.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_hf.hub_cards.lint import problems
from arm_hf.hub_cards.measurements import Measurement, read_measurements
from arm_hf.hub_cards.metadata import CardFacts, front_matter, is_hub_id

HERE = Path(__file__).resolve().parent
MARKER = "<!-- Written by `arm-hf card`: what is edited here is lost when the card is built again. -->"
NO_FIGURE = "-"
HOSTS = ("sclip", "cliper")  # beside the one ARM is trained on, the paper attaches it to these


@dataclass(frozen=True)
class Picture:
    """A sample picture: its path in the repository, what it shows, and who made it."""

    path: str
    alt: str
    caption: str = ""


MINI_FACTS = CardFacts(datasets=("nateraw/pascal-voc-2012", "GATE-engine/COCOStuff164K", "1aurent/ADE20K"))
MINI_PICTURE = Picture(
    "pictures/temple_overlay.jpg",
    "A temple, trees and sky, each under its own colour, with a legend",
    "Made with these weights; photo: danielbuechele on Flickr, CC BY 2.0.",
)
RECIPES = {"arm-clip-b16": "openai/clip-vit-base-patch16", "arm-clip-l14": "openai/clip-vit-large-patch14"}


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON file, or FileNotFoundError with what makes it.

    Args:
        path: The file.
        made_by: What makes it, for the message.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {made_by} writes it")
    return json.loads(path.read_text(encoding="utf-8"))


def rows(results: Mapping[str, Any]) -> list[Measurement]:
    """The measurements of one results file, a row a set."""
    return read_measurements([results], "clearclip")


def model_card(
    folder: Path,
    name: str,
    template: str,
    facts: CardFacts,
    results: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[Picture] = (),
    repo_id: str | None = None,
    training: Mapping[str, Any] | None = None,
    tuned: bool = False,
) -> str:
    """The card of a model folder.

    Args:
        folder: The model: config.json and weights.
        name: What the card calls it.
        template: Name of a template in `templates/`.
        facts: What the files do not say.
        results: Contents of results files.
        pictures: Sample pictures that lie in the repository.
        repo_id: Where it is published; None for a folder that is not.
        training: Options of its training, for the table.
        tuned: Whether CLIP was tuned with LoRA beside ARM.

    Raises:
        FileNotFoundError: The folder holds no model.
        ImportError: jinja2 is not installed.
    """
    from arm_hf.modeling.configuration_arm import ARMConfig

    record = read_json(folder / "config.json", "ARMModel.save_pretrained")
    if record.get("model_type") != "arm":
        raise ValueError(f"{folder} holds a model of type {record.get('model_type')!r}; cards are for ARM models")
    config = ARMConfig.from_dict(record)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    measured = read_measurements(results, config.method)
    if facts.base_model is None and is_hub_id(config.clip_name_or_path):
        facts = CardFacts(**{**vars(facts), "base_model": config.clip_name_or_path})
    return _render(
        template,
        config,
        facts,
        measured,
        name=name,
        model_name=repo_id or f"your-name/{name}",
        published=repo_id is not None,
        weights=_weights(record, size),
        size_mb=size / 1e6,
        pictures=pictures,
        training=training,
        tuned=tuned,
        lean=record.get("checkpoint_contents") == "head" and record.get("weight_packing") is None,
    )


def recipe_card(name: str, clip: str) -> str:
    """The card of a recipe that nobody has trained: the paper's figures, and room for ours.

    Args:
        name: Of the recipe.
        clip: Hub id of its CLIP.
    """
    from arm_hf.known_models import known_model

    known = known_model(clip)
    if known is None:
        raise ValueError(f"{clip} is not in arm_hf.known_models")
    config = known.arm_config()
    return _render(
        "recipe.md.j2",
        config,
        CardFacts(datasets=("GATE-engine/COCOStuff164K",), base_model=clip, tags=("recipe-without-weights",)),
        [],
        name=name,
        model_name=f"your-name/{name}",
        published=False,
        weights="none yet",
        size_mb=0.0,
        pictures=(),
        protocols=_protocol_rows(config.method, known.shape.removesuffix("-336")),
        hosts=HOSTS,
        evidence=known.evidence,
    )


def _render(
    template: str, config: Any, facts: CardFacts, measured: Sequence[Measurement], *, name: str, **more: Any
) -> str:
    import jinja2
    import torch
    from transformers import CLIPModel

    from arm_hf.known_models import known_model
    from arm_hf.modeling.arm import AttentionRefinementModule
    from arm_hf.modeling.dense_clip import get_method

    with torch.device("meta"):
        parts = CLIPModel(config.clip_config), AttentionRefinementModule(config)
    clip_parameters, arm_parameters = (sum(p.numel() for p in part.parameters()) for part in parts)
    inputs: dict[str, list[str]] = {}
    for row in measured:
        if row.seen and row.key not in inputs.setdefault(row.seen, []):
            inputs[row.seen].append(f"`{row.key}`")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "paper": _paper}
    clip_name = facts.base_model or (config.clip_name_or_path if is_hub_id(config.clip_name_or_path) else None)
    text = environment.get_template(template).render(
        name=name,
        config=config,
        vision=config.clip_config.vision_config,
        text=config.clip_config.text_config,
        facts=facts,
        clip_name=clip_name,
        known=known_model(clip_name) if clip_name else None,
        clip_parameters=clip_parameters,
        arm_parameters=arm_parameters,
        scale=2**config.num_scale_blocks_for_patch,
        measurements=measured,
        measured_note="The lists of photos are small: **these are not the benchmarks' numbers.**"
        if any(row.images < 500 for row in measured)
        else "",
        has_paper=any(row.paper_alone or row.paper_with_arm for row in measured),
        inputs=inputs,
        method_paper=get_method(config.method).paper,
        marker=MARKER,
        **more,
    )
    return front_matter(name, facts, measured) + "\n" + _tidy(text)


def _tidy(text: str) -> str:
    """No more than one empty line in a row, none between the lines of a table, one line end at the end."""
    lines: list[str] = []
    for line in text.rstrip().split("\n"):
        if lines and not line and not lines[-1]:
            continue
        lines.append(line.rstrip())
    kept = [
        line
        for index, line in enumerate(lines)
        if line or not (0 < index < len(lines) - 1 and lines[index - 1][:1] == lines[index + 1][:1] == "|")
    ]
    return "\n".join(kept) + "\n"


def _weights(record: Mapping[str, Any], size: int) -> str:
    if record.get("weight_packing") == "int8":
        form = "ARM and CLIP's towers as int8 rows with fp16 scales, unpacked when loaded"
    elif record.get("checkpoint_contents") == "full":
        form = "ARM and CLIP's towers"
    else:
        form = f"ARM alone; CLIP's towers are loaded from `{record.get('clip_name_or_path')}`"
    return f"{form}; safetensors, {size / 1e6:.1f} MB with everything"


def _protocol_rows(method: str, backbone: str) -> list[dict[str, Any]]:
    """The protocols for which a paper has a figure with ARM, with the papers' figures."""
    from arm_hf.protocols import list_protocols, load_protocol

    found = []
    for name in list_protocols():
        protocol = load_protocol(name)
        figures = {
            host: [protocol.published_for(host, arm, backbone, False) for arm in (False, True)]
            for host in (method, *HOSTS)
        }
        if any(with_arm for _, with_arm in figures.values()):
            found.append(
                {
                    "name": name,
                    "title": protocol.title,
                    "classes": protocol.num_classes,
                    "seen": protocol.setup(method, backbone).input.describe(),
                    "paper_alone": figures[method][0],
                    "paper_with_arm": figures[method][1],
                    "others": figures,
                    "alone": None,
                    "with_arm": None,
                }
            )
    return found


def _number(value: float | None) -> str:
    return NO_FIGURE if value is None or not math.isfinite(value) else f"{value:.1f}"


def _paper(entries: Sequence[Mapping[str, Any]]) -> str:
    notes = [f", {entry['note']}" if entry.get("note") else "" for entry in entries]
    figures = [f"{entry['miou']:.1f} ({entry['source']}{note})" for entry, note in zip(entries, notes, strict=True)]
    return "; ".join(figures) or NO_FIGURE


def write_card(path: Path, text: str) -> None:
    """Write a card that passes the lint, under its name at once.

    Args:
        path: Where to.
        text: The card.

    Raises:
        ValueError: It does not; the file stays as it was.
    """
    from arm_hf.folders import atomic_path

    wrong = problems(text, path.parent)
    if wrong:
        raise ValueError(f"the card for {path} is not fit to publish: {'; '.join(wrong)}")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Write the cards of this repository."""
    from arm_hf import DEFAULT_MODEL, resolve_model

    parser = argparse.ArgumentParser(
        prog="python -m arm_hf.hub_cards.build_card", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", type=Path, help="folder of the small model (default: the embedded one)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / f"{DEFAULT_MODEL}.json")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the recipes' cards")
    arguments = parser.parse_args()
    mini = arguments.model or Path(resolve_model(DEFAULT_MODEL))
    measured = read_json(arguments.results, "training/pretrain_mini.py --results")
    cards = {mini / "README.md": model_card(mini, DEFAULT_MODEL, "arm-clip-mini.md.j2", MINI_FACTS, [measured])}
    cards |= {arguments.out / f"{name}.md": recipe_card(name, clip) for name, clip in RECIPES.items()}
    for path, text in cards.items():
        write_card(path, text)
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
