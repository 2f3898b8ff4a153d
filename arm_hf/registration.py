"""Tells transformers about ARM: `AutoConfig`, `AutoModel` and the `open-vocab-segmentation` pipeline.

Registering needs the classes, and the classes need torch, which takes seconds to import. So `import arm_hf` registers
nothing by itself; it leaves two notes, "once transformers' Auto classes are loaded, register ours" and "once its
pipelines are loaded, register ours", and an import hook that acts on them. Whichever of arm_hf and transformers is
imported first, a user who can call `AutoModel.from_pretrained` or `pipeline` finds ARM registered.

The hook acts only when the outermost import of a watched package has ended, never in the middle of one: at that point
no module that ours import is half-initialised, so the order of imports cannot produce a circular one.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TASK = "open-vocab-segmentation"

# arm_hf because its modules import transformers; the others because our modules may import them and they import
# transformers' Auto classes while they are being imported themselves.
_WATCHED = ("transformers", "arm_hf", "diffusers", "peft", "timm")


def _register_auto_classes() -> None:
    from transformers import AutoConfig, AutoModel

    from .modeling.configuration_arm import ARMConfig
    from .modeling.modeling_arm import ARMModel

    AutoConfig.register(ARMConfig.model_type, ARMConfig, exist_ok=True)
    AutoModel.register(ARMConfig, ARMModel, exist_ok=True)


def _register_pipeline() -> None:
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .default_model import DEFAULT_MODEL, resolve_model
    from .modeling.pipeline_arm import OpenVocabSegmentationPipeline

    try:
        default = {"model": (resolve_model(DEFAULT_MODEL), "main")}
    except FileNotFoundError:
        default = None  # only `pipeline(task)` without a model needs it
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, OpenVocabSegmentationPipeline, pt_model=AutoModel, default=default, type="multimodal"
        )


# What to do once a module of transformers is loaded; an entry leaves when it is done.
_pending: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_auto_classes,
    "transformers.pipelines": _register_pipeline,
}


class _Depth(threading.local):
    """How many watched modules this thread is in the middle of importing."""

    value = 0


_depth = _Depth()


@contextmanager
def _one_level_deeper() -> Iterator[None]:
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def _register_what_is_ready() -> None:
    """Runs the pending registrations whose module is loaded, unless an import is still under way."""
    while _depth.value == 0:
        ready = next((name for name in _pending if name in sys.modules), None)
        if ready is None:
            break
        register = _pending.pop(ready)
        with _one_level_deeper():
            register()
    if not _pending and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _WatchingFinder(MetaPathFinder):
    """Finds watched modules as usual and looks after the pending registrations when one has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _WATCHED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            with _one_level_deeper():
                execute(module)
            _register_what_is_ready()

        # On the instance: the loader keeps its class, so resources and sources are found as ever.
        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


_finder = _WatchingFinder()


def install() -> None:
    """Registers ARM with the parts of transformers that are loaded, and with the others as soon as they are."""
    if _pending and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _register_what_is_ready()
