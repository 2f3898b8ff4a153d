"""Cards are filled from results, and say so when these are missing."""

import json
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from arm_hf.hub_cards.build_card import HERE, card

TEMPLATE = HERE / "templates" / "arm-clip-mini.md.j2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vision = {"num_hidden_layers": 10, "hidden_size": 384, "patch_size": 14}
    text = {"num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 8192}
    config = {
        "clip_config": {"vision_config": vision, "text_config": text},
        "fusion_layers": [3, 7],
        "method": "clearclip",
    }
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.int8.safetensors").write_bytes(b"0" * 2_500_000)
    measured = {"miou": 47.61, "pixel_accuracy": 68.3, "images": 12, "classes_present": 20}
    better = {**measured, "miou": 48.94}
    results = {"shortest_edge": 336, "sets": {"voc20": {"without_arm": measured, "with_arm": better}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_figures_come_from_the_results(folder: Path) -> None:
    text = card(folder / "model", folder / "results.json", TEMPLATE)
    assert "| Pascal VOC, 20 classes (balanced list) | 12 | 20 | 47.6 | 48.9 | 68.3 | 68.3 |" in text
    assert "2.5 MB" in text and "shorter\nside of 336" in text
    assert "{{" not in text and "{%" not in text


def test_front_matter_is_what_the_hub_reads(folder: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(folder / "model", folder / "results.json", TEMPLATE)).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-segmentation"
    assert data.eval_results[0].metric_value == 48.94


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json is missing; training/pretrain_mini"):
        card(folder / "model", folder / "nothing.json", TEMPLATE)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        card(folder, folder / "results.json", TEMPLATE)
