"""What the libraries announce in their logs as going away is not used here; their warnings are errors in all tests."""

import logging
import re
from collections.abc import Iterator

import pytest
import torch

from arm_hf.data.segmentation_data import make_dataset
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline
from arm_hf.segmenting import load_pipeline

LIBRARIES = ("transformers", "datasets", "accelerate", "diffusers", "huggingface_hub", "peft", "evaluate")
GOES_AWAY = re.compile(r"deprecat|will be removed|no longer supported|future version", re.IGNORECASE)


@pytest.fixture
def announced() -> Iterator[list[str]]:
    """What the libraries' loggers say is going away; they hand nothing on to the root logger."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if GOES_AWAY.search(record.getMessage()):
                found.append(f"{record.name}: {record.getMessage()}")

    listener, levels = Listener(), {}
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        levels[logger] = logger.level
        logger.addHandler(listener)
        logger.setLevel(logging.INFO)
    yield found
    for logger, level in levels.items():
        logger.removeHandler(listener)
        logger.setLevel(level)


def test_the_listener_hears_the_libraries(announced):
    logging.getLogger("transformers.models.clip").warning("`this` is deprecated")
    assert announced == ["transformers.models.clip: `this` is deprecated"]


def test_saving_loading_and_segmenting_use_nothing_that_goes_away(
    announced, tiny_clip, tiny_tokenizer, tiny_image_processor, photo, tmp_path
):
    model = ARMModel.from_clip(tiny_clip, fusion_layers=(2, 5), templates="single").eval()
    pipe = OpenVocabSegmentationPipeline(model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor)
    pipe.save_pretrained(tmp_path / "arm", self_contained=True)
    again = load_pipeline(str(tmp_path / "arm"), device="cpu", dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16
    result = again([photo, photo], candidate_labels="cat, sky", batch_size=2, method="sclip", semantic=True)
    assert len(result) == 2
    photo.save(tmp_path / "photo.png")
    rows = make_dataset(["photo"], [tmp_path / "photo.png"], [tmp_path / "photo.png"])
    assert rows.select([0])[0]["name"] == "photo"
    assert not announced
