"""Make of a trained ARM the folder that strangers load: weights, config, code, tokenizer, processor, card, pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arm_hf import resolve_model
from arm_hf.folder_cards import CARD_NAME, CardRequest, card_text, copy_pictures
from arm_hf.hub_cards.build_card import read_json
from arm_hf.hub_cards.lint import SECTIONS, problems
from arm_hf.hub_cards.metadata import is_hub_id

FORMS = ("lean", "full", "int8")
ADAPTER = "adapter"


@dataclass
class Built:
    """A folder that is ready to be published.

    Attributes:
        folder: The folder.
        source: What it was made from.
        form: One of `FORMS`.
        pipe: The pipeline it was saved from.
        exact: Whether its weights are those of the source bit for bit, so that results must not differ.
        notes: What a person should know, a line each.
    """

    folder: Path
    source: Path
    form: str
    pipe: Any
    exact: bool
    notes: list[str] = field(default_factory=list)


def find_model(name: str) -> Path:
    """The folder of a model: the embedded one by name, a model folder, or the best (else last) model of a run.

    Raises:
        ValueError: There is no ARM model.
    """
    folder = Path(resolve_model(name)).expanduser()
    found = next(
        (path for path in (folder, folder / "best", folder / "last") if (path / "config.json").is_file()), None
    )
    if found is None:
        raise ValueError(f"{name!r} holds no model: neither it nor best/ or last/ in it has a config.json")
    kind = read_json(found / "config.json", "").get("model_type")
    if kind != "arm":
        raise ValueError(f"{str(found)!r} holds a model of type {kind!r}; only ARM models are published")
    return found


def build(source: Path, folder: Path, repo_id: str, form: str | None = None, card: CardRequest | None = None) -> Built:
    """Write the folder to publish.

    Args:
        source: Folder of an ARM model (`find_model`). It is only read.
        folder: Where to write; must not exist.
        repo_id: Name in the Hub, for the card.
        form: "lean" (ARM alone, the CLIP is loaded from the Hub), "full" (towers included) or "int8" (towers included,
            a quarter of the size, lossy). By default that of the source, or "full" where its CLIP is not on the Hub.
        card: What a person adds to the card.

    Raises:
        ValueError: The form is impossible, or the card of the source is not fit to publish.
        OSError: Weights, tokenizer or image processor cannot be found.
    """
    from arm_hf.modeling.modeling_arm import PACKED_WEIGHTS_NAME, ARMModel
    from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline

    if form not in (None, *FORMS):
        raise ValueError(f"the form of the weights is one of {', '.join(FORMS)}, got {form!r}")
    card, notes = card or CardRequest(), []
    record = read_json(source / "config.json", "ARMModel.save_pretrained")
    model = ARMModel.from_pretrained(source).eval()
    config = model.config
    stored = "int8" if config.weight_packing else "full" if config.checkpoint_contents == "full" else "lean"
    adapter = record.get("adapter")  # loading has merged it into the towers
    clip_name, revision = record.get("clip_name_or_path"), record.get("clip_revision")
    base_model = clip_name if is_hub_id(clip_name) else None
    tokenizer, processor = (
        _part(kind, source, clip_name, revision) for kind in ("AutoTokenizer", "AutoImageProcessor")
    )

    chosen = form or stored
    if chosen == "lean" and base_model is None:
        if form == "lean":
            raise ValueError(
                f"a lean checkpoint needs a CLIP of the Hub, but this one names {clip_name!r}; choose the form full or "
                "int8"
            )
        chosen = "full"
        notes.append("towers included: the CLIP it was trained on is a folder of this machine")
    config.clip_name_or_path = config.clip_revision = None
    if chosen == "lean":
        config.clip_name_or_path, config.clip_revision = base_model, _pinned(base_model, revision)
        notes.append(f"lean: loads CLIP from {base_model} at revision {config.clip_revision}")
        if adapter:
            config.adapter = ADAPTER
            notes.append("LoRA: in adapter/, merged into the towers on loading (which needs peft)")
    elif adapter:
        notes.append("LoRA: merged into the towers")
    elif base_model:
        config.clip_name_or_path, config.clip_revision = base_model, revision

    pipe = OpenVocabSegmentationPipeline(model=model, tokenizer=tokenizer, image_processor=processor)
    packing = "int8" if chosen == "int8" else None
    folder.mkdir(parents=True)
    pipe.save_pretrained(folder, self_contained=chosen != "lean", weight_packing=packing)
    _drop_other_code(folder)
    if chosen == stored == "int8":  # packing what was packed would round once more
        shutil.copyfile(source / PACKED_WEIGHTS_NAME, folder / PACKED_WEIGHTS_NAME)
    if adapter and chosen == "lean":
        _copy_adapter(source / adapter, folder / ADAPTER, base_model)
    pictures = copy_pictures(source, folder, card.pictures)
    text, kept = card_text(source, folder, repo_id, card, pictures, base_model)
    if kept:
        notes.append(f"card: {CARD_NAME} of the source, which somebody wrote")
    wrong = problems(text, folder, () if kept else SECTIONS)
    if wrong:
        raise ValueError(f"the card is not fit to publish: {'; '.join(wrong)}")
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    _check_privacy(folder, source)
    return Built(folder, source, chosen, pipe, exact=chosen == stored or chosen == "full", notes=notes)


def check(built: Built) -> str:
    """Load a built folder in fresh processes, and compare with what it was made from.

    Returns:
        What was found, in words.

    Raises:
        ValueError: It does not load, or gives other results.
    """
    from arm_hf.load_check import check_folder, probe

    loaded, original = check_folder(built.folder, built.pipe.model), probe(built.pipe)
    if built.exact and not loaded.agrees(original):
        raise ValueError("the built folder gives other labels than the model it was made from")
    share = 100 * float((loaded.labels == original.labels).mean())
    same = "the labels of the original" if built.exact else f"{share:.1f} % of the original's labels after rounding"
    return f"loads in a fresh process with arm_hf, and with trust_remote_code alone; both give {same}"


def describe(built: Built) -> list[str]:
    """What would be uploaded: a line for each file, the largest first, the code in one."""
    sizes = {
        path.relative_to(built.folder).as_posix(): path.stat().st_size
        for path in built.folder.rglob("*")
        if path.is_file()
    }
    code = {name: size for name, size in sizes.items() if name.endswith(".py")}
    shown = sorted(((size, name) for name, size in sizes.items() if name not in code), reverse=True)
    lines = [f"{_megabytes(size)}  {name}" for size, name in shown]
    lines.append(f"{_megabytes(sum(code.values()))}  {len(code)} files of code (*.py)")
    return [*lines, f"{_megabytes(sum(sizes.values()))}  in {len(sizes)} files, one commit"]


def _part(kind: str, source: Path, clip_name: str | None, revision: str | None) -> Any:
    """Tokenizer or image processor of the source, else of the CLIP it names."""
    import transformers

    auto = getattr(transformers, kind)
    try:
        return auto.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not clip_name:
            what = "tokenizer" if kind == "AutoTokenizer" else "image processor"
            raise OSError(f"{str(source)!r} holds no {what}, and its config names no CLIP to take it from") from error
    return auto.from_pretrained(clip_name, revision=revision or "main", trust_remote_code=False)


def _drop_other_code(folder: Path) -> None:
    """Take out of tokenizer and processor which code of the source would read them: the folder has its own code only.

    Args:
        folder: The folder to publish.
    """
    for path in folder.glob("*.json"):
        if path.name == "config.json":
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.pop("auto_map", None) is not None:
            path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_adapter(source: Path, target: Path, base_model: str | None) -> None:
    if not (source / "adapter_model.safetensors").is_file():
        raise ValueError(f"{str(source)!r} has no adapter_model.safetensors; other formats are not published")
    target.mkdir()
    record = read_json(source / "adapter_config.json", "peft")
    record["base_model_name_or_path"] = base_model
    (target / "adapter_config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")


def _pinned(clip: str | None, revision: str | None) -> str | None:
    """The commit of the CLIP that is in the cache, so that a later change of its repository changes nothing here."""
    from transformers.utils import cached_file

    commit_hash = re.compile(r"[0-9a-f]{40}")
    if revision and commit_hash.fullmatch(revision):
        return revision
    path = cached_file(clip, "config.json", revision=revision or "main")
    commit = Path(path).parent.name if path else ""
    return commit if commit_hash.fullmatch(commit) else revision


def _check_privacy(folder: Path, source: Path) -> None:
    """Raise ValueError when a text file says where things lie on this machine."""
    private = {str(Path.home()), str(source.resolve()), str(folder.resolve()), os.getcwd()} - {"/"}
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".txt", ".jinja"):
            text = path.read_text(encoding="utf-8")
            found = next((name for name in sorted(private) if f"{name}/" in text or f'{name}"' in text), None)
            if found is not None:
                raise ValueError(f"{path.name} names the folder {found!r} of this machine; take it out and try again")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:9.2f} MB" if size >= 1e4 else f"{size / 1e3:9.2f} kB"
