"""`import arm_hf` registers ARM with transformers, in whatever order things are imported, and costs little."""

import json
import statistics
from collections.abc import Callable

import pytest

CHECK = """
import json
from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY
config = AutoConfig.for_model("arm")
impl = PIPELINE_REGISTRY.check_task("open-vocab-segmentation")[1]["impl"]
model = AutoModel._model_mapping[type(config)]
import arm_hf
assert type(config) is arm_hf.ARMConfig and model is arm_hf.ARMModel and impl is arm_hf.OpenVocabSegmentationPipeline
print(config.model_type, model.__name__, impl.__name__)
"""

ORDERS = {
    "arm_hf first": "import arm_hf",
    "pipeline first": "from transformers import pipeline; import arm_hf",
    "AutoModel first": "from transformers import AutoModel; import arm_hf",
    "AutoConfig first": "from transformers import AutoConfig; import arm_hf",
    "transformers alone first": "import transformers; import arm_hf; from transformers import pipeline",
    "arm_hf, then pipeline": "import arm_hf; from transformers import pipeline",
    "arm_hf, then a CLIP module": "import arm_hf; import transformers.models.clip.modeling_clip",
    "arm_hf, then a module that imports AutoModel": "import arm_hf; import transformers.models.llava.modeling_llava",
    "arm_hf, then Trainer": "import arm_hf; from transformers import Trainer",
    "arm_hf, then peft": "import arm_hf; import peft",
    "arm_hf, then diffusers": "import arm_hf; from diffusers import UNet2DConditionModel",
    "a public name": "from arm_hf import ARMModel",
    "a module inside": "import arm_hf.modeling.modeling_arm",
    "the pipeline's module": "import arm_hf.modeling.pipeline_arm",
    "arm_hf in a thread": "import threading, arm_hf; from transformers import pipeline\n"
    "thread = threading.Thread(target=lambda: __import__('transformers.models.auto.modeling_auto')); thread.start(); "
    "thread.join()",
}


@pytest.mark.parametrize("order", ["arm_hf first", "pipeline first", "AutoModel first", "a public name"])
def test_registered_in_every_order(order: str, run_python: Callable[..., str]) -> None:
    assert run_python(ORDERS[order] + "\n" + CHECK).split() == ["arm", "ARMModel", "OpenVocabSegmentationPipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("order", list(ORDERS))
def test_registered_in_rarer_orders(order: str, run_python: Callable[..., str]) -> None:
    assert run_python(ORDERS[order] + "\n" + CHECK).split() == ["arm", "ARMModel", "OpenVocabSegmentationPipeline"]


def test_hook_leaves_when_done(run_python: Callable[..., str]) -> None:
    code = "import sys, arm_hf\nfrom transformers import pipeline\n"
    code += "print([type(f).__module__ for f in sys.meta_path if 'arm_hf' in type(f).__module__])"
    assert run_python(code).strip() == "[]"


def test_modules_keep_their_loaders(run_python: Callable[..., str]) -> None:
    code = "import inspect, arm_hf\nfrom transformers import CLIPModel\n"
    code += "import importlib.resources as r\n"
    code += "assert 'class CLIPModel' in inspect.getsource(inspect.getmodule(CLIPModel))\n"
    code += "print(r.files('transformers').joinpath('__init__.py').is_file())"
    assert run_python(code).strip() == "True"


def test_methods_are_registered_without_any_model(run_python: Callable[..., str]) -> None:
    assert "sclip" in run_python("from arm_hf import list_methods; print(list_methods())")


def test_import_is_cheap(run_python: Callable[..., str]) -> None:
    """Less than 0.3 s on top of `import transformers`, and without torch."""
    code = """
import json, sys, time
import transformers
start = time.perf_counter()
import arm_hf
print(json.dumps([time.perf_counter() - start, "torch" in sys.modules]))
"""
    runs = [json.loads(run_python(code)) for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in runs) < 0.3
    assert not any(torch_loaded for _, torch_loaded in runs)


def test_public_names_exist_and_agree() -> None:
    """Every name of `__all__` loads; the lazy table and what type checkers see name the same things."""
    import ast
    from pathlib import Path

    import arm_hf

    for name in arm_hf.__all__:
        assert getattr(arm_hf, name) is not None
    tree = ast.parse(Path(arm_hf.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    seen = {(node.module, alias.name) for node in guarded.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {(module, name) for module, names in arm_hf._HOMES.items() for name in names}
    assert {name for _, name in seen} <= set(arm_hf.__all__) <= set(dir(arm_hf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        arm_hf.nothing  # noqa: B018


def test_resolve_model(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from arm_hf import DEFAULT_MODEL, default_model, resolve_model

    assert resolve_model("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"
    assert resolve_model("./arm-clip-mini") == "./arm-clip-mini"
    monkeypatch.setattr(default_model, "_ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config"):
        resolve_model(DEFAULT_MODEL)
    (tmp_path / DEFAULT_MODEL).mkdir()
    (tmp_path / DEFAULT_MODEL / "config.json").write_text("{}")
    assert resolve_model(DEFAULT_MODEL) == str(tmp_path / DEFAULT_MODEL)
