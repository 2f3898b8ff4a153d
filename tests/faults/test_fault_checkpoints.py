"""Model folders that are cut, flipped, malformed, incomplete or hostile: one clear line, and never random weights."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arm_hf.loading import load_pipeline

GROUP = "checkpoints"
FORMS = ("clip", "lean", "full", "packed")


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def cut(share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = weights(folder).read_bytes()
        weights(folder).write_bytes(content[: int(share * len(content))])

    return change


def flip(place: int, bit: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray(weights(folder).read_bytes())
        content[place] ^= 1 << bit
        weights(folder).write_bytes(content)

    return change


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def config(**fields) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**record, **fields}))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                path.unlink()

    return change


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled(mark: Path | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if mark is None:
            stored = weights(folder)
            torch.save(load_file(stored) if "int8" not in stored.name else {}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
        weights(folder).unlink()

    return change


@pytest.fixture
def broken(models, tmp_path) -> Callable[..., Path]:
    """A copy of a model folder with something done to it."""

    def make(form: str, change: Callable[[Path], None]) -> Path:
        folder = Path(shutil.copytree(models / form, tmp_path / "broken"))
        change(folder)
        return folder

    return make


def refused(faults, name: str, folder: Path, *words: str) -> None:
    """Loading says what is wrong in one line that names the folder."""
    with faults.case(GROUP, name) as case:
        try:
            load_pipeline(str(folder), device="cpu")
        except ValueError as error:
            assert str(folder) in str(error) and all(word in str(error) for word in words), error
            assert len(str(error)) < 700, error
            case.line(str(error))
        else:
            raise AssertionError("it loads")
    shutil.rmtree(folder)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_weights(faults, broken, models, tmp_path, form):
    for share in (0, 1e-5, 0.01, 0.5, 0.999):
        refused(faults, f"{form} cut to {share:g}", broken(form, cut(share)), "damaged or cut short")
    header = int.from_bytes(weights(models / form).read_bytes()[:8], "little")
    for place, bit in ((0, 0), (7, 7), (8, 7)):
        refused(faults, f"{form} flipped at {place}", broken(form, flip(place, bit)), "damaged or cut short")
    refused(faults, f"{form} without weights", broken(form, without("*.safetensors")), "safetensors")
    moment = random.Random(form)
    reference = load_pipeline(str(models / form), device="cpu").model.state_dict()
    for number in range(6):
        place, bit = moment.randrange(8, 8 + header), moment.randrange(8)
        folder = broken(form, flip(place, bit))
        with faults.case(GROUP, f"{form} header flipped at {place}, bit {bit} ({number})") as case:
            try:
                loaded = load_pipeline(str(folder), device="cpu").model.state_dict()
            except ValueError as error:
                case.line(str(error))
            else:  # in the metadata, for example
                assert loaded.keys() == reference.keys()
                assert all(torch.equal(loaded[name], reference[name]) for name in reference), "other weights"
                case.right()
        shutil.rmtree(folder)


def test_weights_that_are_missing_or_of_other_shapes(faults, broken):
    def drop(folder: Path) -> None:
        tensors = load_file(weights(folder))
        tensors.pop(sorted(tensors)[len(tensors) // 2])
        save_file(tensors, weights(folder), metadata={"format": "pt"})

    def widen(folder: Path) -> None:
        tensors = load_file(weights(folder))
        name = next(name for name in sorted(tensors) if name.endswith("weight") and tensors[name].ndim == 2)
        tensors[name] = torch.cat([tensors[name]] * 2)
        save_file(tensors, weights(folder), metadata={"format": "pt"})

    for form in ("clip", "lean", "full"):
        refused(faults, f"{form} lacks a weight", broken(form, drop), "lacks 1 weight")
        refused(faults, f"{form} has a wider weight", broken(form, widen))


def test_configs(faults, broken):
    contents = {
        "empty": "",
        "cut": '{"model_type": "arm", "clip_',
        "a list": "[]",
        "null": "null",
        "a number": "5",
        "no text": b"\xff\xfe\x00\x01",
        "an empty object": "{}",
        "NaN": '{"model_type": NaN}',
        "deep": "[" * 100_000,
    }
    for form in ("clip", "lean"):
        for name, content in contents.items():
            refused(faults, f"{form} config {name}", broken(form, text("config.json", content)), "config.json")
        refused(faults, f"{form} without config", broken(form, without("config.json")), "config.json")
        refused(faults, f"{form} empty folder", broken(form, without("*")), "config.json")
        refused(faults, f"{form} unknown type", broken(form, config(model_type="nope")), "nope")
        refused(faults, f"{form} other type", broken(form, config(model_type="bert")), "bert")
        refused(faults, f"{form} type no text", broken(form, config(model_type=5)), "model_type")
    fields = {
        "ffn_ratio": ["x", -1, [], True],
        "num_attention_heads": ["a", 7, 0, 2.5, None],
        "fusion_layers": ["ab", [99], None, [], [1, 1], 3],
        "clip_config": [5, "x"],
        "method_options": [[1], "x"],
        "coarse_scale": ["x"],
        "dropout": ["x", 2],
        "mlp_layers": [3, "x"],
        "num_scale_blocks": [-1, "x"],
        "coarse_form": ["x", None, 3],
        "weight_packing": ["zip"],
        "checkpoint_contents": ["x"],
        "clip_name_or_path": [7, "", "/nowhere"],
        "adapter": [5],
        "method": [None, 5],
        "ignore_index": ["x"],
    }
    for field, values in fields.items():
        for value in values:
            refused(faults, f"{field} = {value!r}", broken("lean", config(**{field: value})))
    for name, fields in {"projection": {"projection_dim": 32}, "vision": {"vision_config": 3}, "text": {
        "text_config": "x"}, "width": {"projection_dim": "x"}, "dtype": {"dtype": "int99"}}.items():  # fmt: skip
        refused(faults, f"clip {name}", broken("clip", config(**fields)))
    refused(faults, "ffn_ratio of another head", broken("full", config(ffn_ratio=4.0)))


def test_parts_beside_the_weights(faults, broken, models):
    for form in ("clip", "full"):
        files = ("tokenizer.json", "tokenizer_config.json")
        refused(faults, f"{form} without tokenizer", broken(form, without(*files)))
        refused(faults, f"{form} without image processor", broken(form, without("preprocessor_config.json")))
        for name in (*files, "preprocessor_config.json"):
            for content in ("{", b"\xff\xfe") if form == "full" else ("[]",):
                refused(faults, f"{form} {name} {content!r}", broken(form, text(name, content)))
    folder = broken("full", config(clip_name_or_path="/nowhere", no_such_key=3, another={"a": [1]}))
    with faults.case(GROUP, "unknown keys, and a reference that is not needed") as case:
        found = load_pipeline(str(folder), device="cpu").model.state_dict()
        expected = load_pipeline(str(models / "full"), device="cpu").model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        case.right()
    shutil.rmtree(folder)
    shutil.copytree(models / "clip", folder)
    for change in (
        cut(0.5),
        pickled(None),
        without("*.safetensors"),
        without("config.json"),
        config(projection_dim=32),
    ):
        tower = folder.parent / "tower"
        shutil.copytree(models / "clip", tower)
        change(tower)
        shutil.rmtree(folder)
        refused(faults, "a tower that is broken", broken("lean", config(clip_name_or_path=str(tower))))
        shutil.rmtree(tower)
        folder.mkdir()


@pytest.mark.parametrize("form", FORMS)
def test_pickles_are_refused(faults, broken, tmp_path, form):
    mark = tmp_path / "unpickled"
    refused(faults, f"{form} offers a pickle", broken(form, pickled(None)), "safetensors")
    refused(faults, f"{form} offers a hostile pickle", broken(form, pickled(mark)), "safetensors")
    assert not mark.exists()


def test_the_same_lines_through_the_command(faults, cli, broken, tmp_path, draw):
    draw(16, 16).save(tmp_path / "photo.png")
    cases = {
        "cut": ("clip", cut(0.5), "damaged or cut short"),
        "header": ("lean", flip(8, 7), "damaged or cut short"),
        "config": ("full", text("config.json", "{"), "is no JSON"),
        "empty": ("full", without("*"), "holds no config.json"),
        "pickle": ("clip", pickled(tmp_path / "unpickled"), "safetensors"),
        "method": ("full", config(method="naclop"), "unknown method 'naclop'"),
        "option": ("full", config(method_options={"gausian_std": 3}), "has no setting gausian_std"),
        "template": ("full", config(templates="nope"), "unknown template set 'nope'"),
        "background": ("full", config(background=7), "must lie between 0 and 1"),
        "tower": ("lean", config(clip_name_or_path="/nowhere"), "/nowhere"),
    }
    for name, (form, change, words) in cases.items():
        folder, out = broken(form, change), tmp_path / "out"
        done = cli("segment", tmp_path / "photo.png", "--labels", "cat", "--model", folder, "--out", out)
        with faults.case(GROUP, f"command: {name}") as case:
            case.command(done, 2)
            assert words in done.err, done.err
            assert not out.exists()
        shutil.rmtree(folder)
    assert not (tmp_path / "unpickled").exists()
