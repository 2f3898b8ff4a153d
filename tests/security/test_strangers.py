"""What a stranger's model folder or data set can do: nothing but be read. And the access token, which stays here."""

import builtins
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from arm_hf.app.work import Asked, Workshop
from arm_hf.cli import app
from arm_hf.hub_upload import Destination, UploadError, upload
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.publishing import build

TOKEN = "hf_" + "Tr0ub4dor" * 4

# Whatever is imported from it leaves a file behind.
HOSTILE = """
from pathlib import Path
Path({canary!r}).write_text("run")
from transformers import PretrainedConfig, PreTrainedModel, CLIPTokenizer, CLIPImageProcessor, Pipeline
class Config(PretrainedConfig):
    model_type = "hostile"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(CLIPTokenizer): ...
class Processor(CLIPImageProcessor): ...
class Hostile(Pipeline): ...
"""
AUTO_MAP = {
    "config.json": {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["hostile.Tokenizer", None]},
    "preprocessor_config.json": {"AutoImageProcessor": "hostile.Processor"},
}


@pytest.fixture(autouse=True)
def token(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """A file that the hostile code would write. Nobody may be asked whether it may run, either."""

    def asked(*words: object) -> str:
        pytest.fail(f"somebody was asked at the terminal: {words}")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "canary"


def make_hostile(folder: Path, canary: Path, **config: object) -> Path:
    """Add code to a model folder, and name it wherever transformers looks for code."""
    (folder / "hostile.py").write_text(HOSTILE.format(canary=str(canary)))
    for name, auto_map in AUTO_MAP.items():
        path = folder / name
        record = json.loads(path.read_text()) if path.exists() else {}
        record["auto_map"] = auto_map
        if name == "config.json":
            task = {"impl": "hostile.Hostile", "pt": ["AutoModel"], "type": "multimodal"}
            record |= {"custom_pipelines": {"open-vocab-segmentation": task}, **config}
        path.write_text(json.dumps(record))
    return folder


@pytest.fixture
def arm_folder(tmp_path, tiny_clip, tiny_tokenizer, tiny_image_processor) -> Path:
    folder = tmp_path / "arm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ARMModel.from_clip(tiny_clip, fusion_layers=(2, 5), templates="single").save_pretrained(
            folder, self_contained=True
        )
    for part in (tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def photo_file(tmp_path, photo) -> Path:
    photo.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def data_folder(tmp_path) -> Path:
    """Two labelled photos of classes whose names look like paths."""
    folder = tmp_path / "data"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(2):
        labels = np.indices((64, 96)).sum(0) // 40 % 2
        Image.fromarray((labels[..., None] * [90, 160, 220] + 20).astype(np.uint8)).save(
            folder / f"images/{number}.png"
        )
        Image.fromarray(labels.astype(np.uint8)).save(folder / f"labels/{number}.png")
    (folder / "val.txt").write_text("0\n1\n")
    record = {"classes": ["../../up", "/tmp/absolute"], "background_index": None, "ignore_index": 255}
    (folder / "classes.json").write_text(json.dumps(record))
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def no_token(folder: Path, *texts: str) -> None:
    """Make sure that neither the texts nor the files of a folder hold the access token."""
    assert not [text for text in texts if TOKEN in text]
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


ENTRIES = {
    "segment": ["segment", "{photo}", "--labels", "cat, sky", "--out", "{out}", "--model", "{model}"],
    "compare": ["compare", "{photo}", "--labels", "cat, sky", "--out", "{out}/sheet.png", "--model", "{model}"],
    "evaluate": ["evaluate", "--data", "{data}", "--out", "{out}", "--model", "{model}", "--device", "cpu"],
    "export": ["export", "--out", "{out}", "--model", "{model}"],
    "publish": ["publish", "{model}", "--repo-id", "org/name", "--dry-run"],
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_of_unknown_kind_is_refused_and_its_code_not_run(
    entry, arm_folder, canary, photo_file, data_folder, tmp_path
):
    model = make_hostile(arm_folder, canary, model_type="hostile")
    places = {"photo": photo_file, "out": tmp_path / "out", "model": model, "data": data_folder}
    done = run(*(word.format(**places) for word in ENTRIES[entry]))
    assert done.exit_code == 2, done.output
    assert "error" in done.output and len(done.output.strip().splitlines()) == 1
    assert not canary.exists()


def test_the_page_does_not_load_a_model_of_unknown_kind(arm_folder, canary):
    with pytest.raises(ValueError, match="cannot load"):
        Workshop([str(make_hostile(arm_folder, canary, model_type="hostile"))], device="cpu")
    assert not canary.exists()


def test_a_known_kind_is_read_without_its_code(arm_folder, canary, photo_file, tmp_path):
    model = make_hostile(arm_folder, canary)
    done = run("segment", photo_file, "--labels", "cat, ../up, /abs", "--out", tmp_path / "out", "--model", model)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} >= {"photo.png", "photo.json"}
    no_token(tmp_path / "out", done.output)
    Workshop([str(model)], device="cpu").segment(Asked(str(photo_file), "cat, sky", model="arm"))
    assert not canary.exists()


def test_what_is_published_holds_neither_strangers_code_nor_the_token(arm_folder, canary, tmp_path):
    built = build(make_hostile(arm_folder, canary), tmp_path / "built", "org/name")
    assert not canary.exists()
    assert not (built.folder / "hostile.py").exists()
    assert not [path for path in built.folder.rglob("*") if path.is_file() and b"hostile" in path.read_bytes()]
    no_token(built.folder, *built.notes)


def test_an_evaluation_writes_inside_its_folder_and_without_the_token(arm_folder, data_folder, tmp_path):
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "out"
    done = run(*("evaluate", "--data", data_folder, "--out", out, "--model", arm_folder, "--pictures", 1))
    assert done.exit_code == 0, done.output
    assert not [path for path in {*tmp_path.rglob("*")} - before if path != out.parent and not path.is_relative_to(out)]
    no_token(out, done.output)


def test_a_pickle_in_place_of_weights_is_not_opened(arm_folder, canary, photo_file, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.write_text, (canary, "run")

    (arm_folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin"):
        (arm_folder / name).write_bytes(pickle.dumps({"arm": Bomb()}))
    done = run("segment", photo_file, "--labels", "cat, sky", "--out", tmp_path / "out", "--model", arm_folder)
    assert done.exit_code == 2 and "cannot load" in done.output
    assert not canary.exists()


@pytest.fixture
def failing_hub() -> Iterator[Callable[[int], str]]:
    """Makes a Hub that answers each request with a status and with the headers that it was sent."""
    servers = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps({"error": f"denied: {self.headers}"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("X-Error-Message", f"denied {self.headers.get('authorization')}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_HEAD = answer

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_hub_that_echoes_the_token_does_not_bring_it_into_a_message(
    status, failing_hub, tmp_path, caplog, capfd, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    caplog.set_level("INFO")
    with pytest.raises(UploadError) as caught:
        upload(folder, Destination("org/name"), "title", endpoint=failing_hub(status))
    assert "Nothing was published" in str(caught.value)
    no_token(tmp_path, str(caught.value), caplog.text, *capfd.readouterr())


def test_commands_that_need_a_hub_do_not_name_the_token(data_folder, photo_file, tmp_path):
    columns = ["--image-column", "image", "--label-column", "labels"]
    for words in (
        ["segment", photo_file, "--labels", "cat", "--out", tmp_path / "out", "--model", "org/absent"],
        ["evaluate", "--data", data_folder, "--out", tmp_path / "out", "--model", "org/absent"],
        ["evaluate", "--data", "org/absent", *columns, "--labels-from", "voc21", "--out", tmp_path / "out"],
        ["publish", "org/absent", "--repo-id", "org/name"],
    ):
        done = run(*words)
        assert done.exit_code in (1, 2), done.output
        no_token(tmp_path, done.output)
