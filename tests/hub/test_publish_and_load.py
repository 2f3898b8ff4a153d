"""From a trained folder to a stranger's machine: `arm-hf publish` to a (small, local) Hub, then loading from it."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from arm_hf.hub_upload import Destination, upload
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline

TOKEN = "hf_writewritewritewritewritewrite"
LABELS = "cat, grass, sky=blue sky|clouds"

WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "arm_hf":
            raise ModuleNotFoundError("No module named 'arm_hf'", name="arm_hf")
sys.meta_path.insert(0, Absent())
"""
# Nothing runs before it is trusted: the folder of copied code is still empty when the refusal comes.
REFUSED = """
import os, pathlib
from transformers import pipeline
try:
    pipeline("open-vocab-segmentation", model="org/arm", revision={revision!r}, trust_remote_code=False)
except ValueError as error:
    copied = list(pathlib.Path(os.environ["HF_MODULES_CACHE"]).rglob("modeling_arm.py"))
    print("refused", "trust_remote_code" in str(error), copied)
"""
SHOW = """
import json, sys
from PIL import Image
from transformers import pipeline
pipe = pipeline("open-vocab-segmentation", model="org/arm", revision={revision!r}{trust})
result = pipe(Image.open({image!r}), candidate_labels={labels!r}, semantic=True, templates="single")
print(json.dumps([type(pipe.model).__module__.partition(".")[0], pipe.model.config.method,
                  pipe.model.config.clip_revision, result["semantic_map"].tolist()]))
"""


@pytest.fixture
def trained(tmp_path: Path, tiny_clip_config: CLIPConfig, tiny_tokenizer, tiny_image_processor):
    """A lean ARM on `org/tiny-clip` as training leaves it, its CLIP, and the pipeline it came from."""
    config = tiny_clip_config.to_dict()
    config["vision_config"].update(num_hidden_layers=8, hidden_size=64, intermediate_size=96)
    clip = CLIPModel(CLIPConfig.from_dict(config)).eval()
    for part in (clip, tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(tmp_path / "clip")
    model = ARMModel.from_clip(clip, clip_name_or_path="org/tiny-clip").eval()
    run = tmp_path / "runs" / "arm-tiny"
    for part in (model, tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(run / "best")
    (run / "options.yaml").write_text("data: [/somewhere/private/coco_stuff171]\nepochs: 3\nlora: false\n")
    (run / "log.jsonl").write_text('{"step": 10}\n{"step": 250}\n')
    (run / "best" / "training_state.pt").write_bytes(b"a pickle")
    (run / "best" / "pictures").mkdir()
    Image.new("RGB", (8, 8), "green").save(run / "best" / "pictures" / "green_field.png")
    pipe = OpenVocabSegmentationPipeline(model=model, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor)
    return run, tmp_path / "clip", pipe


def put_clip(hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        upload(folder, Destination("org/tiny-clip"), "A CLIP", token=TOKEN, endpoint=hub.url)


def environment(hub, home: Path, **more: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }


def arm_hf(run_python, *arguments: str, env: dict[str, str]) -> str:
    return run_python(
        f"import sys; sys.argv = ['arm-hf', *{list(arguments)!r}]\nfrom arm_hf.cli import main\nmain()", env=env
    )


def test_publish_then_load_both_ways(trained, hub, tmp_path, run_python, monkeypatch):
    run, clip, pipe = trained
    put_clip(hub, clip, monkeypatch)
    clip_commit = hub.repositories["org/tiny-clip"].branches["main"]
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(image)
    expected = pipe(Image.open(image), candidate_labels=LABELS, semantic=True, templates="single")

    # 1. Publish.
    publisher = environment(hub, tmp_path / "publisher", HF_TOKEN=TOKEN)
    output = arm_hf(run_python, "publish", str(run), "--repo-id", "org/arm", env=publisher)
    assert f"lean: loads CLIP from org/tiny-clip at revision {clip_commit}" in output
    assert "both give the labels of the original" in output and TOKEN not in output
    repository = hub.repositories["org/arm"]
    assert repository.messages == ["initial commit", "Publish arm with arm_hf"]
    names = hub.files("org/arm")
    assert {"README.md", "config.json", "model.safetensors", "modeling_arm.py", "pipeline_arm.py"} <= names
    assert "pictures/green_field.png" in names and "tokenizer.json" in names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".yaml"))]
    card = hub.content("org/arm", "README.md").decode()
    assert "base_model: org/tiny-clip" in card and 'model="org/arm"' in card
    assert "| `data` | coco_stuff171 |" in card and "| `steps taken` | 250 |" in card and "/somewhere" not in card

    # 2. Somebody changes main afterwards; who asked for the commit gets the commit.
    commit = repository.branches["main"]
    changed = {**json.loads(hub.content("org/arm", "config.json")), "method": "maskclip"}
    files = {**repository.commits[commit], "config.json": hub.keep(json.dumps(changed).encode())}
    repository.commit("main", files, "another method")

    # 3. Load it as strangers do, each with a home of their own: with the package, and with the code beside the weights.
    def both(revision: str, **more: str) -> list[list]:
        show = {"revision": revision, "image": str(image), "labels": LABELS}
        package = "import arm_hf\n" + SHOW.format(**show, trust="")
        alone = WITHOUT_PACKAGE + REFUSED.format(revision=revision) * (not more)
        alone += SHOW.format(**show, trust=", trust_remote_code=True")
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(run_python, package, env=environment(hub, tmp_path / "one", **more))
            other = pool.submit(run_python, alone, path=None, env=environment(hub, tmp_path / "other", **more))
            lines = [future.result().strip().splitlines() for future in (one, other)]
        if not more:
            assert lines[1][0] == "refused True []"
        return [json.loads(found[-1]) for found in lines]

    def check(results: list[list]) -> None:
        assert [result[0] for result in results] == ["arm_hf", "transformers_modules"]
        for _, method, clip_revision, labels in results:
            assert (method, clip_revision) == ("clearclip", clip_commit)
            assert np.array_equal(np.array(labels), expected["semantic_map"])

    check(both(commit))
    assert hub.asked(".bin") == 0

    # 4. The Hub is gone; what was loaded once loads again.
    hub.close()
    check(both(commit, HF_HUB_OFFLINE="1"))


@pytest.mark.slow
def test_publish_by_xet_and_load_main(trained, xet_hub, tmp_path, run_python, monkeypatch):
    """Where hf_xet is installed, huggingface_hub sends and fetches weights by it."""
    pytest.importorskip("hf_xet")
    run, clip, pipe = trained
    put_clip(xet_hub, clip, monkeypatch)
    home = environment(xet_hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0")
    arm_hf(run_python, "publish", str(run), "--repo-id", "org/arm", "--form", "full", "--revision", "v1", env=home)
    assert xet_hub.files("org/arm") == {".gitattributes"}
    stored = xet_hub.repositories["org/arm"].commits[xet_hub.repositories["org/arm"].branches["v1"]]
    assert xet_hub.xet_hash(stored["model.safetensors"].oid)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 48), "blue").save(image)
    code = "import arm_hf\n" + SHOW.format(revision="v1", image=str(image), labels=LABELS, trust="")
    fresh = environment(xet_hub, tmp_path / "fresh", HF_HUB_DISABLE_XET="0")
    labels = json.loads(run_python(code, env=fresh).strip().splitlines()[-1])[3]
    expected = pipe(Image.open(image), candidate_labels=LABELS, semantic=True, templates="single")["semantic_map"]
    assert np.array_equal(np.array(labels), expected)
    assert xet_hub.asked("xet-read-token") and not xet_hub.asked("lfs-storage/" + stored["model.safetensors"].oid)


@pytest.mark.slow
def test_dry_run_of_the_embedded_model_needs_nothing(tmp_path, run_python):
    """No token, no network; the plan is complete and nothing is sent."""
    env = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    arguments = ("publish", "arm-clip-mini", "--repo-id", "org/arm-clip-mini", "--dry-run", "--keep")
    output = arm_hf(run_python, *arguments, str(tmp_path / "kept"), env=env)
    lines = output.splitlines()
    assert lines[0] == "org/arm-clip-mini, branch main, public, int8 weights"
    assert lines[-1] == "dry run: nothing was sent"
    kept = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in kept)
    assert f"{total / 1e6:.2f} MB  in {len(kept)} files, one commit" in output
    assert "both give the labels of the original" in output
    card = (tmp_path / "kept" / "README.md").read_text()
    assert 'model="org/arm-clip-mini"' in card and "pictures/temple_overlay.jpg" in card


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_not_published(trained, hub, tmp_path, run_python, monkeypatch):
    """The check runs what was built: a file of the code is missing, so nothing leaves this machine."""
    run, clip, _ = trained
    put_clip(hub, clip, monkeypatch)
    code = f"""
import sys
from arm_hf import publishing
from arm_hf.cli import main
build = publishing.build
def broken(*args):
    built = build(*args)
    (built.folder / "decision.py").unlink()
    return built
publishing.build = broken
sys.argv = ["arm-hf", "publish", {str(run)!r}, "--repo-id", "org/arm"]
sys.stderr = sys.stdout
try:
    main()
except SystemExit as end:
    print("exit code", end.code)
"""
    output = run_python(code, env=environment(hub, tmp_path / "home", HF_TOKEN=TOKEN))
    assert "does not load with trust_remote_code and no arm_hf" in output
    assert output.strip().endswith("exit code 2") and "org/arm" not in hub.repositories


def test_a_killed_upload_leaves_no_half_published_repository(tmp_path, hub):
    """The process is killed while the weights travel."""
    import os
    import signal
    import subprocess
    import threading

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    arrived, go_on = threading.Event(), threading.Event()

    def hold(handler):
        if handler.command == "PUT":
            arrived.set()
            go_on.wait(60)
            handler.close_connection = True

    hub.before = hold
    code = (
        "from pathlib import Path\nfrom arm_hf.hub_upload import Destination, upload\n"
        f"upload(Path({str(folder)!r}), Destination('org/arm'), 'Publish')"
    )
    env = {**os.environ, **environment(hub, tmp_path / "home", HF_TOKEN=TOKEN), "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    try:
        assert arrived.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        go_on.set()
    assert hub.files("org/arm") == {".gitattributes"}
    assert hub.repositories["org/arm"].messages == ["initial commit"]
