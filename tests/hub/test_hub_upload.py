"""Uploading a folder to a (small, local) Hub: one commit or none, and one line about what went wrong."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from arm_hf.hub_upload import Destination, UploadError, upload

WRITE, READ = "hf_writewritewritewritewritewrite", "hf_readreadreadreadreadreadread"
REPO = "org/arm"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process may speak HTTP (to the local server only), by LFS, with no token of the machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "pictures").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(5000))
    (folder / "pictures" / "a.jpg").write_bytes(b"picture")
    return folder


def put(folder: Path, hub, token: str | None = WRITE, **destination) -> str:
    return upload(folder, Destination(REPO, **destination), "Publish", token=token, endpoint=hub.url)


def test_one_commit_holds_everything(folder, hub, tmp_path):
    url = put(folder, hub)
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.repositories[REPO].messages == ["initial commit", "Publish"]
    assert hub.files(REPO) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "pictures/a.jpg",
    }
    for name in ("model.safetensors", "pictures/a.jpg"):
        got = hf_hub_download(REPO, name, endpoint=hub.url, cache_dir=tmp_path / "cache", token=READ)
        assert Path(got).read_bytes() == (folder / name).read_bytes()


def test_private_and_branch(folder, hub):
    put(folder, hub, private=True, revision="v1.0")
    assert hub.repositories[REPO].private
    assert hub.files(REPO) == {".gitattributes"}
    assert "config.json" in hub.files(REPO, "v1.0")


def test_what_is_there_is_not_touched_unasked(folder, hub):
    put(folder, hub)
    (folder / "config.json").write_text('{"new": 1}')
    with pytest.raises(UploadError, match=r"holds 4 files already on 'main'; pass --update"):
        put(folder, hub)
    with pytest.raises(UploadError, match="exists and is public"):
        put(folder, hub, private=True, update=True)
    assert hub.content(REPO, "config.json") == b"{}"
    put(folder, hub, revision="v2")
    assert hub.content(REPO, "config.json") == b"{}"
    assert hub.content(REPO, "config.json", "v2") == b'{"new": 1}'


def test_an_update_takes_away_what_a_loader_would_still_read(folder, hub):
    (folder / "old.py").write_text("")
    (folder / "notes.txt").write_text("mine")
    put(folder, hub)
    for name in ("old.py", "notes.txt", "model.safetensors"):
        (folder / name).unlink()
    (folder / "model.int8.safetensors").write_bytes(b"small")
    put(folder, hub, update=True)
    assert len(hub.repositories[REPO].commits) == 3
    assert hub.files(REPO) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.int8.safetensors",
        "notes.txt",
        "pictures/a.jpg",
    }


@pytest.mark.parametrize(
    ("token", "repo_id", "line"),
    [
        (None, REPO, "there is no access token"),
        ("hf_wrong", REPO, "does not accept the access token"),
        (READ, REPO, "may not write to org/arm"),
        (WRITE, "strangers/arm", "may not write to strangers/arm"),
    ],
)
def test_missing_rights(folder, hub, token, repo_id, line):
    with pytest.raises(UploadError, match=line) as caught:
        upload(folder, Destination(repo_id), "Publish", token=token, endpoint=hub.url)
    assert "\n" not in str(caught.value) and "hf_" not in str(caught.value)
    assert hub.repositories == {}


def test_no_network(folder, monkeypatch):
    with pytest.raises(UploadError, match=r"cannot reach http://127\.0\.0\.1:9 .*Nothing was published"):
        upload(folder, Destination(REPO), "Publish", token=WRITE, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE is set"):
        upload(folder, Destination(REPO), "Publish", token=WRITE, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("where", ["lfs-storage", "/commit/", "/preupload/", "validate-yaml"])
def test_an_upload_that_breaks_off_publishes_nothing_and_goes_on_later(folder, hub, where, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it tries again by itself

    def hang_up(handler):
        if where in handler.path:
            handler.close_connection = True

    hub.before = hang_up
    with pytest.raises(UploadError, match="Nothing was published; the same command goes on"):
        put(folder, hub)
    assert hub.files(REPO) == {".gitattributes"}

    hub.before, before = (lambda handler: None), hub.asked("lfs-storage")
    put(folder, hub)
    assert "model.safetensors" in hub.files(REPO)
    # What had arrived is not sent again.
    assert hub.asked("lfs-storage") - before == (0 if where == "/commit/" else 1)


def test_a_commit_of_somebody_else_in_between(folder, hub):
    put(folder, hub)

    def interfere(handler):
        if "/preupload/" in handler.path:
            repository = hub.repositories[REPO]
            repository.commit("main", repository.commits[repository.branches["main"]], "somebody")

    hub.before = interfere
    (folder / "config.json").write_text('{"new": 1}')
    with pytest.raises(UploadError, match="got another commit in the meantime"):
        put(folder, hub, update=True)
    assert hub.content(REPO, "config.json") == b"{}"


def test_bad_metadata_is_the_hubs_word(folder, hub):
    (folder / "README.md").write_text("no metadata")
    with pytest.raises(UploadError, match=r"Invalid metadata in README\.md"):
        put(folder, hub)


def test_nothing_dangerous_goes_up(folder, hub, tmp_path):
    (folder / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.bin may be a pickle"):
        put(folder, hub)
    (folder / "weights.bin").unlink()
    (tmp_path / "secret").write_text("x")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt is a link to a file outside"):
        put(folder, hub)
    assert hub.requests == []


@pytest.mark.parametrize("bad", ["a/b/c", "org/", "-x/y", "org/na me"])
def test_impossible_names(bad):
    with pytest.raises(ValueError):
        Destination(bad)
    with pytest.raises(ValueError, match="revision"):
        Destination(REPO, revision=" ")
