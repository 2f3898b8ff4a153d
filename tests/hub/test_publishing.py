"""The folder that is published: what it holds, in which form, and that it is the model it was made from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from arm_hf.folder_cards import CardRequest, write_card
from arm_hf.hub_cards.build_card import MARKER
from arm_hf.hub_cards.lint import problems
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.publishing import build, describe, find_model

COMMIT = "1" * 40


@pytest.fixture
def clip(tiny_clip_config: CLIPConfig) -> CLIPModel:
    config = tiny_clip_config.to_dict()
    config["vision_config"].update(num_hidden_layers=8, hidden_size=64, intermediate_size=96)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return CLIPModel(CLIPConfig.from_dict(config)).eval()


@pytest.fixture
def cached(tmp_path, clip, tiny_tokenizer, tiny_image_processor, monkeypatch) -> str:
    """A CLIP of the Hub that is in the cache; its id."""
    repository = tmp_path / "hub" / "models--org--tiny-clip"
    for part in (clip, tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "org/tiny-clip"


@pytest.fixture
def save(tmp_path, clip, tiny_tokenizer, tiny_image_processor):
    """Saves an ARM in a form, as training or a user leaves it."""

    def run(name: str = "model", clip_name: str | None = None, **options) -> Path:
        folder = tmp_path / name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ARMModel.from_clip(clip, clip_name_or_path=clip_name).eval()
        model.save_pretrained(folder, **options)
        for part in (tiny_tokenizer, tiny_image_processor):
            part.save_pretrained(folder)
        return folder

    return run


def logits(folder: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels, words = torch.randn(1, 3, 64, 64, generator=generator), torch.randn(3, 64, generator=generator)
    with torch.no_grad():
        return ARMModel.from_pretrained(folder).eval()(pixels, class_embeddings=words).logits


def test_self_contained(save, tmp_path):
    source = save(self_contained=True)
    built = build(source, tmp_path / "built", "org/arm")
    assert built.form == "full" and built.exact and built.notes == []
    assert torch.equal(logits(built.folder), logits(source))
    names = {path.relative_to(built.folder).as_posix() for path in built.folder.rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert {"modeling_arm.py", "configuration_arm.py", "pipeline_arm.py", "trunk.py"} <= names
    config = json.loads((built.folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_arm.ARMModel" and "open-vocab-segmentation" in str(config)
    lines = describe(built)
    size = sum(path.stat().st_size for path in built.folder.rglob("*") if path.is_file())
    assert lines[0].endswith("model.safetensors")
    assert lines[-1].split() == [f"{size / 1e6:.2f}", "MB", "in", str(len(names)), "files,", "one", "commit"]
    assert problems((built.folder / "README.md").read_text(), built.folder) == []


def test_packed(save, tmp_path):
    """Packing rounds once: what is packed already is carried bit for bit."""
    packed = build(save(self_contained=True), tmp_path / "a", "org/arm", form="int8")
    assert not packed.exact and (packed.folder / "model.int8.safetensors").is_file()
    assert not (packed.folder / "model.safetensors").exists()
    again = build(packed.folder, tmp_path / "b", "org/arm")
    assert again.form == "int8" and again.exact
    one, other = (load_file(built.folder / "model.int8.safetensors") for built in (packed, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(logits(packed.folder), logits(again.folder))
    assert build(packed.folder, tmp_path / "c", "org/arm", form="full").exact


def test_lean(save, cached, tmp_path):
    source = save(clip_name=cached)
    built = build(source, tmp_path / "built", "org/arm")
    assert built.form == "lean"
    assert built.notes == [f"lean: loads CLIP from org/tiny-clip at revision {COMMIT}"]
    config = json.loads((built.folder / "config.json").read_text())
    assert (config["clip_name_or_path"], config["clip_revision"]) == (cached, COMMIT)
    assert all(key.startswith("arm.") for key in load_file(built.folder / "model.safetensors"))
    assert torch.equal(logits(built.folder), logits(source))
    card = (built.folder / "README.md").read_text()
    assert "base_model: org/tiny-clip" in card and "`org/tiny-clip` at revision `111111111111`" in card
    full = build(source, tmp_path / "full", "org/arm", form="full")
    assert torch.equal(logits(full.folder), logits(source))
    assert any(key.startswith("clip.") for key in load_file(full.folder / "model.safetensors"))


def test_lean_on_a_folder_of_this_machine(save, clip, tmp_path):
    """Nobody else has that folder: the towers go along, and the path does not."""
    clip.save_pretrained(tmp_path / "clip")
    source = save(clip_name=str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="a lean checkpoint needs a CLIP of the Hub"):
        build(source, tmp_path / "lean", "org/arm", form="lean")
    built = build(source, tmp_path / "built", "org/arm")
    assert built.form == "full" and "towers included" in built.notes[0]
    assert torch.equal(logits(built.folder), logits(source))
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in built.folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 reads it
def test_with_lora(save, clip, cached, tmp_path):
    """An adapter of CLIP stays beside a lean head, and is merged into towers that go along."""
    from peft import LoraConfig, get_peft_model

    source = save(clip_name=cached)
    before = logits(source)
    model = ARMModel.from_pretrained(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=r".*vision_model.*(q|v)_proj", init_lora_weights=False)
        )
        adapted.save_pretrained(source / "adapter")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "adapter": "adapter"}))
    expected = logits(source)
    assert not torch.allclose(expected, before, atol=1e-3)

    lean = build(source, tmp_path / "lean", "org/arm")
    assert lean.form == "lean" and any("LoRA" in note for note in lean.notes)
    assert torch.allclose(logits(lean.folder), expected, atol=1e-5)
    record = json.loads((lean.folder / "adapter" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == cached
    assert "merges them into the towers" in (lean.folder / "README.md").read_text()

    full = build(source, tmp_path / "full", "org/arm", form="full")
    assert torch.allclose(logits(full.folder), expected, atol=1e-5)
    assert not (full.folder / "adapter").exists()
    config = json.loads((full.folder / "config.json").read_text())
    assert config["adapter"] is None and config["clip_name_or_path"] is None
    assert "hold these matrices merged" in (full.folder / "README.md").read_text()


def test_results_reach_table_and_metadata(save, tmp_path):
    source = save(self_contained=True)
    row = {"method": "clearclip", "pamr": None, "overall_accuracy": 70.0, "classes_in_labels": 19}
    published = [{"miou": 73.3, "source": "ARM paper, Table 1", "backbone": "B/16"}]
    results = {
        "data": {"name": "voc2012", "split": "val", "images": 7},
        "protocol": {"name": "voc21", "methods": {}},
        "results": [
            {**row, "arm": False, "mean_iou": 50.25, "published": []},
            {**row, "arm": True, "mean_iou": 61.5, "published": published},
        ],
    }
    (source / "results.json").write_text(json.dumps(results))
    built = build(source, tmp_path / "built", "org/arm", card=CardRequest(license="mit", datasets=["org/coco"]))
    card = (built.folder / "README.md").read_text()
    row = "| voc2012 (val), protocol voc21 | 7 | 19 | `clearclip` | 50.2 | 61.5 | 70.0 | 70.0 | - | 73.3 (ARM paper"
    assert row in card and "not the benchmarks' numbers" in card
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert {result.metric_value for result in data.eval_results} == {50.25, 61.5}
    assert data.license == "mit" and data.datasets == ["org/coco"]


def test_the_run_that_it_came_from_is_told(save, tmp_path):
    """Options and steps of the run; of its data what is public."""
    source = save("run/best", self_contained=True)
    options = "data: [org/coco-stuff, /home/somebody/voc2012]\nepochs: 3\nlora: false\nmax_steps: null\n"
    (tmp_path / "run" / "options.yaml").write_text(options)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 10, "loss": 1}\n{"step": 20, "mean_iou": {}}\n')
    card = (build(source, tmp_path / "built", "org/arm").folder / "README.md").read_text()
    assert "| `data` | org/coco-stuff, voc2012 |" in card and "/home" not in card
    assert "| `epochs` | 3 |" in card and "| `steps taken` | 20 |" in card and "max_steps" not in card
    assert "datasets:\n- org/coco-stuff\n" in card


def test_a_card_that_somebody_wrote_is_kept(save, tmp_path):
    source = save(self_contained=True)
    own = (
        "---\nlibrary_name: transformers\npipeline_tag: image-segmentation\nlicense: mit\nlanguage: en\n"
        "tags: [clip]\n---\n\n# Mine\n\nMy words.\n"
    )
    (source / "README.md").write_text(own)
    built = build(source, tmp_path / "built", "org/arm")
    assert (built.folder / "README.md").read_text() == own and "somebody wrote" in built.notes[-1]
    with pytest.raises(ValueError, match="somebody wrote; pass --overwrite"):
        write_card(source, None, CardRequest())
    assert (source / "README.md").read_text() == own
    (source / "README.md").write_text(own.replace("license: mit\n", "license: null\n"))
    with pytest.raises(ValueError, match="not fit to publish: the metadata lacks license"):
        build(source, tmp_path / "again", "org/arm")
    write_card(source, None, CardRequest(), overwrite=True)
    text = (source / "README.md").read_text()
    assert MARKER in text and "# model" in text
    write_card(source, "org/arm", CardRequest())  # our own may be replaced
    assert 'model="org/arm"' in (source / "README.md").read_text()


def test_pictures(save, tmp_path):
    source = save(self_contained=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "two_cats.png")
    built = build(source, tmp_path / "built", "org/arm", card=CardRequest(pictures=[tmp_path / "two_cats.png"]))
    assert (built.folder / "pictures" / "two_cats.png").is_file()
    assert "![two cats](pictures/two_cats.png)" in (built.folder / "README.md").read_text()
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    Image.new("RGB", (8, 8)).save(tmp_path / "home.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"'home\.jpg' says where it was taken"):
        build(source, tmp_path / "place", "org/arm", card=CardRequest(pictures=[tmp_path / "home.jpg"]))
    (tmp_path / "no_picture.png").write_text("text")
    with pytest.raises(OSError, match="cannot identify"):
        build(source, tmp_path / "other", "org/arm", card=CardRequest(pictures=[tmp_path / "no_picture.png"]))


def test_nothing_about_this_machine(save, tmp_path):
    source = save(self_contained=True)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "made_in": f"{source}/x"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names the folder"):
        build(source, tmp_path / "built", "org/arm")


def test_what_is_no_model(save, clip, tmp_path):
    source = save(self_contained=True)
    for name in ("run/last", "run/best"):
        shutil.copytree(source, tmp_path / name)
        assert find_model(str(tmp_path / "run")) == tmp_path / name
    assert find_model("arm-clip-mini").name == "arm-clip-mini"
    with pytest.raises(ValueError, match="holds no model"):
        find_model(str(tmp_path / "absent"))
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="of type 'clip'; only ARM models"):
        find_model(str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="one of lean, full, int8"):
        build(source, tmp_path / "built", "org/arm", form="tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(OSError, match="holds no tokenizer, and its config names no CLIP"):
        build(source, tmp_path / "built", "org/arm")


def test_the_commands(save, tmp_path, monkeypatch):
    """One line and an exit code for what the user can mend; nothing is built before a token is there."""
    from typer.testing import CliRunner

    from arm_hf.cli import app

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    source = save(self_contained=True)
    done = CliRunner().invoke(app, ["card", str(source), "--repo-id", "org/arm"])
    assert done.exit_code == 0 and done.output == f"card: {source / 'README.md'}\n"
    assert 'model="org/arm"' in (source / "README.md").read_text()
    for arguments, code, line in (
        (["--repo-id", "org/arm"], 1, "arm-hf: error: there is no access token: make one"),
        (["--repo-id", "a/b/c", "--dry-run"], 2, "arm-hf: error: Repo id must be in the form"),
        (["--repo-id", "org/arm", "--dry-run", "--keep", str(source)], 2, "is there already; choose another folder"),
    ):
        done = CliRunner().invoke(app, ["publish", str(source), *arguments])
        assert done.exit_code == code, done.output
        assert line in done.stderr and done.stderr.count("\n") == 1
