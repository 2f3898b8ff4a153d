"""What is read, what the results are called, and that files are written whole or not at all."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from arm_hf.folders import ImageFile, atomic_path, collect_images, plan_outputs, read_image
from arm_hf.modeling.images import UnreadableImage


@pytest.fixture
def album(tmp_path):
    """A folder with pictures in sub-folders, and things that are none."""
    folder = tmp_path / "album"
    for name in ("b.jpg", "a.PNG", "trip/c.webp", "trip/b.jpg", ".hidden.jpg", ".trash/d.jpg", "notes.txt", "x.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def names(files):
    return [file.name for file in files]


class TestCollect:
    def test_folder(self, album):
        assert names(collect_images([album])) == ["a.PNG", "b.jpg", "trip/b.jpg", "trip/c.webp"]

    def test_files_folders_and_addresses_each_once(self, album, monkeypatch):
        monkeypatch.chdir(album)
        address = "https://example.org/pictures/my%20cat.jpg?size=2"
        files = collect_images(["trip/b.jpg", "notes.txt", "trip", album / "b.jpg", address, address])
        assert names(files) == ["b.jpg", "notes.txt", "c.webp", "b.jpg", "my cat.jpg"]

    def test_a_link_to_a_file_given_already_is_the_same_picture(self, album):
        (album / "link.jpg").symlink_to(album / "b.jpg")
        assert len(collect_images([album])) == 4

    def test_results_inside_the_folder_are_left_out(self, album):
        (album / "out").mkdir()
        (album / "out" / "b.png").write_bytes(b"")
        assert names(collect_images([album], out=album / "out")) == ["a.PNG", "b.jpg", "trip/b.jpg", "trip/c.webp"]

    def test_errors(self, album, tmp_path):
        (tmp_path / "empty").mkdir()
        for inputs, out, message in (
            ([], None, "no images were given"),
            ([album / "missing.jpg"], None, "there is no file or folder"),
            ([tmp_path / "empty"], None, "there are no images in"),
            ([album], album, "cannot go into the image folder"),
        ):
            with pytest.raises(ValueError, match=message):
                collect_images(inputs, out)


class TestPlan:
    def plan(self, tmp_path, *sources):
        files = [ImageFile(str(tmp_path / source), source.rsplit("/", 1)[-1]) for source in sources]
        out = tmp_path / "out"
        return [str(outputs.labels.relative_to(out)) for outputs in plan_outputs(files, out)]

    def test_sub_folders_are_kept(self, album, tmp_path):
        plan = plan_outputs(collect_images([album]), tmp_path / "out")
        assert [str(outputs.legend.relative_to(tmp_path / "out")) for outputs in plan] == [
            "a.json",
            "b.json",
            "trip/b.json",
            "trip/c.json",
        ]

    def test_names_never_meet(self, tmp_path):
        assert self.plan(tmp_path, "cat.jpg", "cat.png", "x/cat.jpg", "x/CAT.jpg", "y/cat.jpg", "y/z/y/cat.jpg") == [
            "cat.png",
            "cat_png.png",
            "cat_jpg.png",
            "x_CAT.png",
            "y_cat.png",
            "cat_jpg_2.png",
        ]

    def test_a_picture_named_like_another_ones_overlay(self, tmp_path):
        assert self.plan(tmp_path, "cat.jpg", "cat_overlay.jpg") == ["cat.png", "cat_overlay_jpg.png"]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.text("aA._/bgjp", min_size=1, max_size=8).map(lambda s: s.strip("/") or "a"), max_size=12))
    def test_no_two_results_are_one_file(self, tmp_path_factory, sources):
        root = tmp_path_factory.getbasetemp()
        files = [ImageFile(str(root / source), source.rsplit("/", 1)[-1]) for source in sources]
        plan = plan_outputs(files, root / "nowhere")
        paths = [str(path).casefold() for outputs in plan for path in outputs.paths()]
        assert len(plan) == len(files)
        assert len(set(paths)) == len(paths) == 3 * len(files)

    def test_results_are_not_overwritten_unless_asked(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "cat.json").write_text("{}")
        files = [ImageFile(str(tmp_path / "cat.jpg"), "cat.jpg")]
        with pytest.raises(ValueError, match=r"cat\.json' exists already"):
            plan_outputs(files, out)
        assert plan_outputs(files, out, overwrite=True)[0].legend == out / "cat.json"

    def test_a_picture_is_never_overwritten(self, tmp_path):
        source = tmp_path / "cat.png"
        source.write_bytes(b"")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="would replace the image"):
                plan_outputs([ImageFile(str(source), "cat.png")], tmp_path, overwrite)

    def test_the_folder_cannot_be_a_file(self, tmp_path):
        (tmp_path / "out").write_text("")
        for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
            with pytest.raises(ValueError, match="is a file"):
                plan_outputs([ImageFile("cat.jpg", "cat.jpg")], out)


class TestAtomicPath:
    def test_all_or_nothing(self, tmp_path):
        target = tmp_path / "new" / "a.txt"
        with atomic_path(target) as path:
            path.write_text("first")
            assert not target.exists()
        assert target.read_text() == "first"
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error), atomic_path(target) as path:
                path.write_text("half")
                raise error
            assert target.read_text() == "first"
        assert os.listdir(target.parent) == ["a.txt"]


def test_read_image(tmp_path):
    Image.new("LA", (4, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").mode == "RGB"
    with pytest.raises(UnreadableImage, match=r"missing\.png"):
        read_image(tmp_path / "missing.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_a_named_pipe_in_a_folder_is_no_picture_and_waits_for_nobody(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.symlink(tmp_path / "gone.png", tmp_path / "c.png")  # its error comes when it is read
    assert names(collect_images([tmp_path])) == ["a.png", "c.png"]
