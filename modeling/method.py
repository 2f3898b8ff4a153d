"""What a training-free method is, its settings, and the registry that everything else reads.

A method says what it needs from the trunk and turns the trunk's output into patch features. A new one is a small
function or class plus a settings dataclass:

```python
from dataclasses import dataclass
from arm_hf import MethodSettings, register_method

@dataclass(frozen=True)
class PlainSettings(MethodSettings):
    pass

@register_method("plain", settings=PlainSettings, paper="none", summary="project the last hidden state")
def plain(context, settings):
    return context.tower.project(context.trunk.last_input)[:, 1:]
```

after which the pipeline, the command line and ARM accept `method="plain"`.
"""

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .trunk import TrunkOutput, TrunkRequest, VisionTower


def setting(default: Any, help: str) -> Any:
    """A settings field whose help text serves the command line, the docs and the error messages.

    Args:
        default: Its default.
        help: One line; what a value does, and where the default is from.
    """
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MethodSettings:
    """Settings that every method has. Subclasses add their own, with `setting(default, help)`."""

    logit_scale: float | None = setting(
        None, "factor on the cosines before the softmax over queries; None takes CLIP's learned scale"
    )
    position_rule: str = setting(
        "reference", 'resizing of the position table: "reference", "bilinear", "antialias" or "transformers"'
    )


@dataclass
class MethodContext:
    """All that a method may read.

    Attributes:
        tower: The image tower (weights, projections).
        trunk: Output of blocks 1..n-1 with what the method requested.
        class_embeddings: L2-normalised query vectors, (Q, D), or None when the caller wants features only.
        background_queries: Rows of `class_embeddings` that describe the background class.
        outside: Features or maps from other models, by name (proxy features, region maps, ...).
        scratch: What `patch_features` leaves for `score_map` of the same method.
    """

    tower: VisionTower
    trunk: TrunkOutput
    class_embeddings: Tensor | None = None
    background_queries: tuple[int, ...] = ()
    outside: Mapping[str, Any] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def logit_scale(self) -> float:
        """CLIP's learned temperature."""
        return self.tower.logit_scale


@dataclass(frozen=True)
class ScoreGate:
    """A decision rule that lets only convincing classes and pixels pass; the rest is background.

    Each class's upsampled map is divided by its maximum and multiplied by its peak, so that it reaches the peak that it
    had on the grid; classes whose peak is not above `score_threshold` are removed, and values below
    `background_threshold` count as background.

    Attributes:
        score_threshold: Least peak of a class.
        background_threshold: Least value of a pixel.
        normalise: Stretch every class to 0..1 over the image before the second threshold.
    """

    score_threshold: float
    background_threshold: float
    normalise: bool = False

    def __call__(self, scores: Tensor, peaks: Tensor) -> Tensor:
        """Gate scores (q, H, W) with the classes' peaks (q,)."""
        peaks = peaks[:, None, None]
        scores = scores / (scores.amax(dim=(1, 2), keepdim=True) + 1e-5) * peaks
        if self.normalise:
            lowest = scores.amin(dim=(1, 2), keepdim=True)
            scores = (scores - lowest) / (scores.amax(dim=(1, 2), keepdim=True) - lowest + 1e-5)
        passed = (peaks > self.score_threshold) & (scores >= self.background_threshold)
        return scores.masked_fill(~passed, 0)


@dataclass
class ScoreMap:
    """Per-query scores on a grid, before upsampling.

    Attributes:
        values: (B, Q, h, w).
        activation: How scores become numbers in [0, 1] after upsampling: "softmax" over queries (of scale * values),
            "sigmoid" per query, or "none" when `scale * values` already is.
        scale: That factor; unused by "sigmoid".
        gate: Rule of the method for what becomes background.
    """

    values: Tensor
    activation: str = "softmax"
    scale: float = 1.0
    gate: ScoreGate | None = None


class Method:
    """One training-free method. Subclass it, or decorate a function with `register_method`."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, str]] = {}
    """Systems of the literature that are this method with certain options: name -> the options of the command line."""
    settings_class: ClassVar[type[MethodSettings]] = MethodSettings
    needs_class_embeddings: ClassVar[bool] = False
    """Whether the patch features themselves depend on the words (a first pass, for example)."""

    def needs_words(self, settings: Any) -> bool:
        """`needs_class_embeddings` for given settings; override it where it depends on them."""
        return self.needs_class_embeddings

    def request(self, settings: Any, num_blocks: int) -> TrunkRequest:
        """What the trunk must keep for this method in a tower of `num_blocks` blocks.

        Args:
            settings: Of this method.
            num_blocks: n, the number of the tower's blocks; the trunk runs n - 1.
        """
        return TrunkRequest(position_rule=settings.position_rule)

    def patch_features(self, context: MethodContext, settings: Any) -> Tensor:
        """Patch features after post-norm and projection, not normalised.

        Args:
            context: All that the method may read.
            settings: Of this method.

        Returns:
            (B, N, D) on the trunk's grid, or (B, h, w, D) on a grid of the method's own.
        """
        raise TypeError(f"method {self.name!r} does not define patch_features")

    def score_map(self, context: MethodContext, settings: Any, patch_features: Tensor) -> ScoreMap | None:
        """The method's own scores from its features (B, h, w, D); None means cosine similarity with the queries.

        Args:
            context: What `patch_features` was given, with what it left in `scratch`.
            settings: Of this method.
            patch_features: (B, h, w, D).
        """
        return None

    def settings(self, options: Mapping[str, Any] | None = None) -> Any:
        """Build this method's settings from keyword options.

        Raises:
            TypeError: An option is unknown; the message lists the allowed ones.
        """
        options = dict(options or {})
        allowed = [f.name for f in dataclasses.fields(self.settings_class)]
        unknown = [key for key in options if key not in allowed]
        if unknown:
            raise TypeError(
                f"method {self.name!r} has no setting {', '.join(unknown)}; allowed are {', '.join(allowed)}"
            )
        return self.settings_class(**options)


class _FunctionMethod(Method):
    """A method made from a single function `(context, settings) -> patch features`."""

    def __init__(self, function: Callable[[MethodContext, Any], Tensor], request: Callable | None):
        self._function, self._request = function, request

    def request(self, settings: Any, num_blocks: int) -> TrunkRequest:
        return self._request(settings, num_blocks) if self._request else super().request(settings, num_blocks)

    def patch_features(self, context: MethodContext, settings: Any) -> Tensor:
        return self._function(context, settings)


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    settings: type[MethodSettings] | None = None,
    paper: str = "",
    reference: str = "",
    summary: str = "",
    cost: str = "one pass",
    variants: Mapping[str, str] | None = None,
    request: Callable[[Any, int], TrunkRequest] | None = None,
) -> Callable:
    """Register a method under a name; use it as a decorator on a function or on a `Method` subclass.

    ```python
    >>> from arm_hf import list_methods, register_method
    >>> @register_method("last_state", paper="none", summary="project the last hidden state")
    ... def last_state(context, settings):
    ...     return context.tower.project(context.trunk.last_input)[:, 1:]
    >>> "last_state" in list_methods()
    True

    ```

    Args:
        name: What users type; letters, digits and underscores.
        settings: The settings dataclass, a subclass of `MethodSettings`.
        paper: Title, venue and identifier of the paper.
        reference: The authors' code that the numbers follow (name and commit), or why there is none.
        summary: One line saying what is computed.
        cost: One line on time or memory against a plain CLIP image pass.
        variants: See `Method.variants`.
        request: For functions, what the trunk must keep: `(settings, num_blocks) -> TrunkRequest`.

    Raises:
        ValueError: The name is not an identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"method name {name!r} must consist of letters, digits and underscores")

    def decorate(target: Any) -> Any:
        method: Any = target() if isinstance(target, type) else _FunctionMethod(target, request)
        given = {"name": name, "paper": paper, "reference": reference, "summary": summary, "cost": cost}
        for key, value in given.items():
            if value or not getattr(method, key):
                setattr(method, key, value)
        if variants is not None:
            method.variants = variants
        if settings is not None:
            method.settings_class = settings
        if name in _METHODS:
            warnings.warn(f"method {name!r} was registered before and is replaced", stacklevel=2)
        _METHODS[name] = method
        return target

    return decorate


def list_methods() -> list[str]:
    """Names of all registered methods, sorted.

    ```python
    >>> from arm_hf import list_methods
    >>> "naclip" in list_methods()
    True

    ```
    """
    return sorted(_METHODS)


def get_method(name: str) -> Method:
    """The method registered under a name.

    ```python
    >>> from arm_hf import get_method
    >>> method = get_method("naclip")
    >>> method.settings({"gaussian_std": 3.0}).gaussian_std
    3.0

    ```

    Args:
        name: What users type.

    Raises:
        ValueError: There is none; the message lists the known ones and the nearest.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}; registered are {', '.join(list_methods())}.{hint}")
    return _METHODS[name]
