"""Cards are filled from results and configs, and say so when these are missing."""

import json
from pathlib import Path

import pytest
import yaml

from arm_hf import resolve_model
from arm_hf.hub_cards.build_card import HERE, MINI_FACTS, RECIPES, model_card, read_json, recipe_card, write_card
from arm_hf.hub_cards.lint import code_blocks, problems
from arm_hf.modeling.modeling_arm import ARMModel

MINI = Path(resolve_model("arm-clip-mini"))
MEASURED = {"miou": 47.61, "pixel_accuracy": 68.3, "images": 12, "classes_present": 20}


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def folder(tmp_path: Path, tiny_clip) -> Path:
    model = ARMModel.from_clip(tiny_clip, fusion_layers=(2, 5))
    model.save_pretrained(tmp_path / "model", weight_packing="int8")
    return tmp_path / "model"


def mini_card(folder: Path, results: dict, **options) -> str:
    return model_card(folder, "arm-clip-mini", "arm-clip-mini.md.j2", MINI_FACTS, [results], **options)


def test_figures_come_from_results_and_config(folder: Path) -> None:
    better = {**MEASURED, "miou": 48.94}
    results = {"shortest_edge": 336, "sets": {"voc20": {"without_arm": MEASURED, "with_arm": better}}}
    text = mini_card(folder, results)
    row = "| Pascal VOC, 20 classes (balanced list) | 12 | 20 | `clearclip` | 47.6 | 48.9 | 68.3 | 68.3 |"
    assert row in text and "shorter side 336" in text
    assert "12 blocks of width 128, patch 16" in text and "blocks 2 and 5" in text and "int8" in text
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert f"(ARM), {size / 1e6:.1f} MB" in text
    values = [metric["value"] for entry in metadata(text)["model-index"][0]["results"] for metric in entry["metrics"]]
    assert sorted(values) == [47.61, 48.94]


def test_what_was_not_measured_is_not_invented(folder: Path) -> None:
    results = {
        "sets": {"camvid": {"without_arm": {**MEASURED, "classes_present": 11}}, "new_set": {"with_arm": MEASURED}}
    }
    text = mini_card(folder, results)
    assert "| CamVid | 12 | 11 | `clearclip` | 47.6 | - | 68.3 | - |" in text
    assert "| new_set | 12 | 20 | `clearclip` | - | 47.6 | - | 68.3 |" in text
    assert len(metadata(text)["model-index"][0]["results"]) == 2
    with pytest.raises(ValueError, match="these are no results"):
        mini_card(folder, {"loss": 1})


def test_metadata_is_what_the_hub_reads(folder: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(mini_card(folder, {"sets": {"voc20": {"with_arm": MEASURED}}})).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-segmentation"
    assert data.eval_results[0].metric_value == 47.61 and data.eval_results[0].metric_type == "mean_iou"
    assert "open-vocabulary-segmentation" in data.tags


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json is missing; training/pretrain_mini"):
        read_json(tmp_path / "nothing.json", "training/pretrain_mini.py --results")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        mini_card(tmp_path, {"sets": {}})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_that_they_have_no_weights(name: str) -> None:
    text = recipe_card(name, RECIPES[name])
    assert (HERE / f"{name}.md").read_text(encoding="utf-8") == text, "run make card"
    assert "**A recipe without weights.**" in text and problems(text) == []
    data = metadata(text)
    assert data["base_model"] == RECIPES[name] and "recipe-without-weights" in data["tags"]
    assert "model-index" not in data  # nothing was measured
    # The paper's numbers are marked with their source, and stand in columns of their own.
    figures = {"arm-clip-b16": "73.3 (ARM paper, Table 1", "arm-clip-l14": "69.3 (ARM paper, Table 1"}
    row = next(line for line in text.splitlines() if "(`voc21`)" in line)
    assert figures[name] in row and row.endswith("| - | - |")
    assert {"arm-clip-b16": "9.5 M parameters", "arm-clip-l14": "18.7 M parameters"}[name] in text


def test_the_embedded_card_is_up_to_date_and_clean() -> None:
    results = read_json(HERE / "results" / "arm-clip-mini.json", "training/pretrain_mini.py --results")
    text = (MINI / "README.md").read_text(encoding="utf-8")
    assert text == mini_card(MINI, results), "run make card"
    assert problems(text, MINI) == []
    measured = sum("miou" in variant for variants in results["sets"].values() for variant in variants.values())
    entries = metadata(text)["model-index"][0]["results"]
    assert sum(len(entry["metrics"]) for entry in entries) == measured


def test_a_bad_card_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("before")
    with pytest.raises(ValueError, match="not fit to publish"):
        write_card(path, "no metadata")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_snippets_run(tmp_path: Path, tiny_clip, tiny_tokenizer, tiny_image_processor, photo, run_python) -> None:
    """Every Python block of the three cards, where a photo, a trained run and a published repository are at hand."""
    from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline

    photo.save(tmp_path / "photo.jpg")
    model = ARMModel.from_clip(tiny_clip)
    pipe = OpenVocabSegmentationPipeline(model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor)
    commit, hub = "1" * 40, tmp_path / "home" / "hub"
    cards = [(MINI / "README.md").read_text(encoding="utf-8")]
    for name in ("arm-clip-mini", *RECIPES):
        repository = hub / f"models--your-name--{name}"
        pipe.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    for name in RECIPES:
        pipe.save_pretrained(tmp_path / "runs" / name / "best")
        cards.append((HERE / f"{name}.md").read_text(encoding="utf-8"))
    blocks = [block for card in cards for block in code_blocks(card, "python")]
    assert len(blocks) == 6
    output = run_python(
        "\n".join([*blocks, "print(result['semantic_map'].shape)"]),
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert output.strip().endswith(str((photo.height, photo.width)))


@pytest.mark.parametrize("path", sorted((HERE / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_of_the_repository_are_strict_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{path.name}: {name}"))
