"""A desk for the snippets of the documentation: a folder with the files they name, and the models they ask for.

Hub ids are served from a cache made by hand, with a tiny random CLIP behind each. The name of the embedded model leads
to a tiny model as well; slow tests put it right again.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from arm_hf import DEFAULT_MODEL, ARMModel, OpenVocabSegmentationPipeline, default_model, resolve_model
from arm_hf.modeling import method as method_module

HUB_CLIPS = (
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "facebook/metaclip-b16-fullcc2.5b",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
)
HUB_ARMS = ("org/arm-clip-b16",)
COMMIT = "1" * 40
COLORS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "sky": (40, 40, 200)}


def labelled_folder(folder: Path, images: int = 6) -> Path:
    """A labelled folder of coloured discs: `images/`, `labels/`, `classes.json`, `train.txt`, `val.txt`."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    y, x = np.mgrid[:72, :96]
    for index in range(images):
        disc = (y - 36) ** 2 + (x - 40 - index) ** 2 < 500
        labels = np.where(disc, index % 2, 2).astype(np.uint8)
        pixels = np.asarray(list(COLORS.values()), dtype=np.uint8)[labels]
        Image.fromarray(pixels).save(folder / "images" / f"photo{index}.jpg")
        Image.fromarray(labels).save(folder / "labels" / f"photo{index}.png")
    (folder / "classes.json").write_text(json.dumps({"classes": list(COLORS)}))
    (folder / "train.txt").write_text("".join(f"photo{index}\n" for index in range(images)))
    (folder / "val.txt").write_text("photo0\nphoto1\n")
    return folder


def voc_tree(root: Path) -> Path:
    """A VOCdevkit with two photos and their labels."""
    folder = root / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("2007_000001", "2007_000002"):
        pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        labels = random.choice([0, 8, 12, 255], (48, 64)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(labels).save(folder / "SegmentationClass" / f"{name}.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n2007_000002\n")
    return root


def write_shards(folder: Path, photo: Image.Image) -> None:
    """Two parquet files with two photos each."""
    folder.mkdir()
    encoded = io.BytesIO()
    photo.save(encoded, format="JPEG")
    for number in range(2):
        rows = [{"bytes": encoded.getvalue(), "path": f"{number}-{row}.jpg"} for row in range(2)]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(folder / f"{number}.parquet")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor) -> Path:
    """`hub/`, a cache of the Hub, and `assets/arm-clip-mini`; a narrow CLIP of 12 blocks is behind all of them."""
    home = tmp_path_factory.mktemp("docs-models")
    record = tiny_clip_config.to_dict()
    record["vision_config"].update(hidden_size=32, intermediate_size=32)
    record["text_config"].update(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig.from_dict(record)).eval()
        arm = ARMModel.from_clip(clip, templates="single").eval()  # 80 sentences per word take long
    pipe = OpenVocabSegmentationPipeline(model=arm, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor)
    pipe.save_pretrained(home / "assets" / "arm-clip-mini", self_contained=True)
    for name in (*HUB_CLIPS, *HUB_ARMS):
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        if name in HUB_ARMS:
            pipe.save_pretrained(snapshot, self_contained=True)
        else:
            for part in (clip, tiny_tokenizer, tiny_image_processor):
                part.save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return home


@pytest.fixture
def desk(tmp_path: Path, tiny_models: Path, photo: Image.Image, root: Path, monkeypatch) -> Iterator[Path]:
    """A folder to run a document in, which is the working directory: photos, labelled data, the checkout's scripts."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    folder = tmp_path / "desk"
    folder.mkdir()
    photo.save(folder / "photo.jpg")
    for number in (1, 2):
        (folder / "photos").mkdir(exist_ok=True)
        photo.crop((0, 0, 120 + number, 100)).save(folder / "photos" / f"{number}.jpg")
    labelled_folder(folder / "my" / "photos")
    voc_tree(folder / "VOCdevkit")
    write_shards(folder / "shards", photo)
    (folder / "training").symlink_to(root / "training")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tiny_models / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tiny_models / "hub"))  # for processes that a snippet starts
    monkeypatch.setattr(default_model, "_ASSETS", tiny_models / "assets")
    assert Path(resolve_model(DEFAULT_MODEL)).is_relative_to(tiny_models)
    monkeypatch.setattr(method_module, "_METHODS", dict(method_module._METHODS))  # methods that a snippet adds
    yield folder
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
