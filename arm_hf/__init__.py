"""Open-vocabulary segmentation with a frozen CLIP: training-free methods and the Attention Refinement Module.

Importing this package is cheap: the names below are loaded on first use, and the Auto classes and the pipeline of
transformers learn about ARM when they are loaded themselves (see `arm_hf.registration`).

```python
import arm_hf
from transformers import pipeline

segment = pipeline("open-vocab-segmentation", model=arm_hf.resolve_model(arm_hf.DEFAULT_MODEL))
```
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not (Path(__file__).parent / "modeling").exists():
    # A checkout keeps modeling/, training/ and hub_cards/ beside arm_hf/; an installed copy has them inside.
    __path__.append(str(Path(__file__).parents[1]))

from . import registration
from .default_model import DEFAULT_MODEL, resolve_model

if TYPE_CHECKING:
    from .label_sets import list_label_sets, load_label_set
    from .modeling.configuration_arm import ARMConfig
    from .modeling.dense_clip import DenseCLIP
    from .modeling.diffusion import CompensationSettings, StableDiffusionCompensation
    from .modeling.layer_fusion_methods import CLIPER_OPTIONS
    from .modeling.method import Method, MethodSettings, get_method, list_methods, register_method, setting
    from .modeling.modeling_arm import ARMModel, ARMOutput
    from .modeling.pipeline_arm import CLIPerPipeline, OpenVocabSegmentationPipeline, SclipPipeline
    from .modeling.prompts import Background, Label, parse_labels
    from .modeling.proxy_features import ProxyFeatures
    from .modeling.regions import MaskGenerator, correct_labels, regions_from_masks

_HOMES = {
    "label_sets": ("list_label_sets", "load_label_set"),
    "modeling.configuration_arm": ("ARMConfig",),
    "modeling.dense_clip": ("DenseCLIP",),
    "modeling.diffusion": ("CompensationSettings", "StableDiffusionCompensation"),
    "modeling.layer_fusion_methods": ("CLIPER_OPTIONS",),
    "modeling.method": ("Method", "MethodSettings", "get_method", "list_methods", "register_method", "setting"),
    "modeling.modeling_arm": ("ARMModel", "ARMOutput"),
    "modeling.pipeline_arm": ("CLIPerPipeline", "OpenVocabSegmentationPipeline", "SclipPipeline"),
    "modeling.prompts": ("Background", "Label", "parse_labels"),
    "modeling.proxy_features": ("ProxyFeatures",),
    "modeling.regions": ("MaskGenerator", "correct_labels", "regions_from_masks"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ARMConfig",
    "ARMModel",
    "ARMOutput",
    "Background",
    "CLIPER_OPTIONS",
    "CLIPerPipeline",
    "CompensationSettings",
    "DEFAULT_MODEL",
    "DenseCLIP",
    "Label",
    "MaskGenerator",
    "Method",
    "MethodSettings",
    "OpenVocabSegmentationPipeline",
    "ProxyFeatures",
    "SclipPipeline",
    "StableDiffusionCompensation",
    "__version__",
    "correct_labels",
    "get_method",
    "list_label_sets",
    "list_methods",
    "load_label_set",
    "parse_labels",
    "regions_from_masks",
    "register_method",
    "resolve_model",
    "setting",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    if _HOME_OF[name] == "modeling.method":
        import_module(".modeling.dense_clip", __name__)  # fills the registry with the methods of the package
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.install()
