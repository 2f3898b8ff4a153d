"""Fixtures of the modeling tests: a tiny ARM, pipelines around tiny models, class vectors and pixels."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


_templates: dict[str, CLIPModel] = {}


@pytest.fixture
def tiny_clip(request: pytest.FixtureRequest) -> CLIPModel:
    """The suite's tiny CLIP, built once and copied for each test: building takes longer than most tests here."""
    if "clip" not in _templates:
        _templates["clip"] = request.getfixturevalue("tiny_clip")
    return copy.deepcopy(_templates["clip"])


@pytest.fixture
def pixels() -> Tensor:
    """Two images of 4 x 6 patches, (2, 3, 64, 96)."""
    return noise(2, 3, 64, 96)


@pytest.fixture
def words(tiny_clip: CLIPModel) -> Tensor:
    """Five unit class vectors, (5, D)."""
    return F.normalize(noise(5, tiny_clip.config.projection_dim, seed=1), dim=-1)


@pytest.fixture
def make_arm(tiny_clip: CLIPModel) -> Callable[..., ARMModel]:
    """Builds a seeded ARM with the given config fields on the tiny CLIP."""

    def build(**options: Any) -> ARMModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ARMModel.from_clip(tiny_clip, **options).eval()

    return build


@pytest.fixture
def arm(make_arm: Callable[..., ARMModel]) -> ARMModel:
    """A seeded, untrained ARM with the default configuration."""
    return make_arm()


@pytest.fixture
def make_pipe(
    tiny_tokenizer: CLIPTokenizer, tiny_image_processor: CLIPImageProcessor
) -> Callable[..., OpenVocabSegmentationPipeline]:
    """Builds a pipeline around a model; prompts use one template unless the call says otherwise."""

    def build(model: Any, pipeline_class: type = OpenVocabSegmentationPipeline, **defaults: Any) -> Any:
        defaults = {"templates": "single", **defaults}
        return pipeline_class(model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor, **defaults)

    return build
