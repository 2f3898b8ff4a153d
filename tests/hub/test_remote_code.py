"""Checkpoints as a user meets them: a folder or a hub id, with this package or with the code beside the weights.

Hub ids are served offline from a cache made by hand, `hub/models--<org>--<name>/{refs/main,snapshots/<commit>}`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline

LABELS = "cat, grass, sky=blue sky|clouds"
OLD, NEW = "1" * 40, "2" * 40

WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "arm_hf":
            raise ModuleNotFoundError("No module named 'arm_hf'", name="arm_hf")
sys.meta_path.insert(0, Absent())
"""
RUN = """
import hashlib, json, sys
import numpy as np
from PIL import Image
from transformers import pipeline

image = Image.open({image!r})
def show(model, **options):
    pipe = pipeline("open-vocab-segmentation", model=model, **options)
    result = pipe(image, candidate_labels={labels!r}, semantic=True, templates="single")
    module = type(pipe.model).__module__.partition(".")[0]
    print(json.dumps([module, type(pipe).__module__.partition(".")[0], float(result["confidence"].sum()),
                      result["semantic_map"].tolist()]))
"""


def tiny(tiny_clip_config: CLIPConfig, seed: int) -> CLIPModel:
    config = tiny_clip_config.to_dict()
    config["vision_config"].update(num_hidden_layers=8, hidden_size=64, intermediate_size=96)
    config["text_config"].update(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig.from_dict(config)).eval()


def put_in_cache(home: Path, name: str, commit: str, folder: Path, main: bool = True) -> None:
    """Lay a folder into the hub cache as one commit of a repository."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    if main:
        (repository / "refs" / "main").write_text(commit)


class Published:
    """A hub cache with a CLIP in two commits, a self-contained and a lean ARM, and what their results are."""

    def __init__(self, home: Path, clip_config: CLIPConfig, tokenizer, image_processor):
        self.home, self.folder = home, home / "folders"
        self.image = home / "image.png"
        values = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((80, 60)).save(self.image)
        for commit, seed in ((OLD, 1), (NEW, 2)):
            clip = tiny(clip_config, seed)
            for part in (clip, tokenizer, image_processor):
                part.save_pretrained(self.folder / commit)
            put_in_cache(home, "org/tiny-clip", commit, self.folder / commit, main=commit == NEW)
        self.expected = {}
        options = {"full": {"self_contained": True}, "packed": {"weight_packing": "int8"}, "lean": {}}
        for form, save_options in options.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                # Made on the old commit, which is not what refs/main names.
                model = ARMModel.from_clip(tiny(clip_config, 1), clip_name_or_path="org/tiny-clip", clip_revision=OLD)
            pipe = OpenVocabSegmentationPipeline(
                model=model.eval(), tokenizer=tokenizer, image_processor=image_processor
            )
            pipe.save_pretrained(self.folder / form, **save_options)
            put_in_cache(home, f"org/arm-{form}", "3" * 40, self.folder / form)
            self.expected[form] = pipe(
                Image.open(self.image), candidate_labels=LABELS, semantic=True, templates="single"
            )

    def code(self, *calls: str) -> str:
        return RUN.format(image=str(self.image), labels=LABELS) + "\n" + "\n".join(calls)

    def check(self, line: str, form: str, module: str) -> None:
        found_module, pipeline_module, confidence, labels = json.loads(line)
        assert (found_module, pipeline_module) == (module, module)
        if form == "packed":
            assert (np.array(labels) == self.expected[form]["semantic_map"]).mean() > 0.9
        else:
            assert np.array_equal(np.array(labels), self.expected[form]["semantic_map"])
            assert confidence == pytest.approx(float(self.expected[form]["confidence"].sum()), rel=1e-6)


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor) -> Published:
    return Published(tmp_path_factory.mktemp("home"), tiny_clip_config, tiny_tokenizer, tiny_image_processor)


@pytest.fixture
def environment(published, tmp_path) -> dict[str, str]:
    return {"HF_HOME": str(published.home), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}


def test_without_the_package(published, environment, run_python, tmp_path):
    """With trust_remote_code=True the code beside the weights runs; without it transformers refuses."""
    output = run_python(
        WITHOUT_PACKAGE
        + published.code(
            f"show({str(published.folder / 'full')!r}, trust_remote_code=True)",
            "show('org/arm-full', trust_remote_code=True)",
            "show('org/arm-lean', trust_remote_code=True)",
            "show('org/arm-packed', trust_remote_code=True)",
            "from transformers import AutoConfig, AutoModel",
            "model = AutoModel.from_pretrained('org/arm-lean', trust_remote_code=True)",
            "print(type(model).__name__, type(model.config).__name__)",
            "print({parameter.requires_grad for parameter in model.clip.parameters()})",
            "try:\n    show('org/arm-full', trust_remote_code=False)\nexcept ValueError as error:\n    print(error)",
            "pipe = pipeline('open-vocab-segmentation', model='org/arm-full', trust_remote_code=True)",
            f"try:\n    pipe.save_pretrained({str(tmp_path / 'x')!r})\nexcept RuntimeError as error:\n    print(error)",
            f"pipe.save_pretrained({str(tmp_path / 'y')!r}, remote_code=False, self_contained=True)",
            "print('arm_hf' in sys.modules)",
        ),
        path=None,
        env=environment,
    )
    lines = output.strip().splitlines()
    for line, form in zip(lines, ("full", "full", "lean", "packed"), strict=False):
        published.check(line, form, "transformers_modules")
    assert lines[4:6] == ["ARMModel ARMConfig", "{False}"]
    assert "trust_remote_code" in " ".join(lines[6:-2])
    # It lacks the pipeline's own file, so it is saved without code or not at all.
    assert "install arm_hf" in lines[-2]
    assert lines[-1] == "False"
    again, full = ARMModel.from_pretrained(tmp_path / "y"), ARMModel.from_pretrained(published.folder / "full")
    assert all(torch.equal(value, full.state_dict()[key]) for key, value in again.state_dict().items())


def test_with_the_package(published, environment, run_python):
    """The installed package wins, and nobody is asked to trust anything."""
    output = run_python(
        "import arm_hf\n"
        + published.code(
            f"show({str(published.folder / 'full')!r})",
            "show('org/arm-full')",
            "show('org/arm-lean')",
            "show('org/arm-packed')",
            "show('org/arm-full', trust_remote_code=True)",
            "pipe = pipeline('open-vocab-segmentation', model='org/tiny-clip')",
            "print(type(pipe.model).__name__, type(pipe).__module__)",
            "from arm_hf import ARMModel",
            "lean = ARMModel.from_pretrained('org/arm-lean')",
            "print(lean.config.clip_revision[:3], lean.config.name_or_path)",
            f"new = ARMModel.from_clip('org/tiny-clip', revision={NEW!r})",
            "print(new.config.clip_name_or_path, new.config.clip_revision[:3])",
            "import torch",
            "print(torch.equal(new.clip.logit_scale, lean.clip.logit_scale), "
            "torch.equal(new.clip.visual_projection.weight, lean.clip.visual_projection.weight))",
            "for load in (lambda: ARMModel.from_clip('org/tiny-clip', revision='9' * 40),",
            "             lambda: ARMModel.from_pretrained('org/absent')):",
            "    try:\n        load()\n    except OSError:\n        print('OSError')",
        ),
        env=environment,
    )
    lines = output.strip().splitlines()
    for line, form in zip(lines, ("full", "full", "lean", "packed", "full"), strict=False):
        published.check(line, form, "arm_hf")
    assert lines[5:] == [
        "CLIPModel arm_hf.modeling.pipeline_arm",
        "111 org/arm-lean",
        "org/tiny-clip 222",
        "True False",
        "OSError",
        "OSError",
    ]


def test_published_folder(published):
    """The folder holds all code, names it in its config, and says nothing about this machine."""
    folder = published.folder / "full"
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_arm.ARMConfig", "AutoModel": "modeling_arm.ARMModel"}
    assert config["custom_pipelines"]["open-vocab-segmentation"]["impl"] == "pipeline_arm.OpenVocabSegmentationPipeline"
    code = {file.name for file in folder.glob("*.py")}
    assert {"configuration_arm.py", "modeling_arm.py", "pipeline_arm.py", "decision.py", "prompts.py"} <= code
    for name in ("config.json", "tokenizer_config.json"):
        assert str(published.home) not in (folder / name).read_text()
    assert not list(folder.glob("*.bin"))


def test_saving_does_not_mark_the_installed_classes(published):
    assert ARMModel._auto_class is None and ARMModel.config_class._auto_class is None
    model = ARMModel.from_pretrained(published.folder / "full")
    assert not hasattr(model.config, "custom_pipelines")
