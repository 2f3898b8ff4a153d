"""Folders of one's own, data of the hub's kinds, shards and streams, what is wrong with them, and the checker."""

import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from arm_hf.data import LAYOUTS, open_data
from arm_hf.data.checking import check_folder, check_hub
from arm_hf.label_sets import load_label_set

CLASSES = ["background", "cat", "grass"]


def labels_of(number):
    values = np.full((6, 8), number % 3, dtype=np.uint8)
    values[0, :3] = (0, 1, 255)
    return values


@pytest.fixture
def folder(tmp_path):
    """Five images of 8 x 6 in a folder of its own; val names them all, train two."""
    root = tmp_path / "mine"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"p{number}.{'jpg' if number else 'png'}")
        Image.fromarray(labels_of(number)).save(root / "labels" / f"p{number}.png")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES, "background_index": 0, "ignore_index": 255}))
    (root / "val.txt").write_text("".join(f"p{number}\n" for number in range(5)))
    (root / "train.txt").write_text("p3\np1\n")
    return root


def names(data):
    return [row["name"] for row in data.dataset]


class TestPlainFolder:
    def test_reads(self, folder):
        data = open_data(folder, "train")
        assert (data.name, data.split, data.classes, data.ignore_index, data.background_index) == (
            "mine", "train", tuple(CLASSES), 255, 0,
        )  # fmt: skip
        assert names(data) == ["p3", "p1"] and len(data) == 2
        image, labels = data.read(data.dataset[1])
        assert image.size == (8, 6) and labels.dtype == np.int32
        assert labels.tolist() == labels_of(1).tolist()
        assert data.dataset[0]["image"] == {"path": str(folder / "images" / "p3.jpg"), "bytes": None}

    def test_other_labels(self, folder):
        (folder / "labels").rename(folder / "labels_other")
        data = open_data(folder, label_column="labels_other", label_names=["a", "background", "c", "d"])
        assert data.classes == ("a", "background", "c", "d") and data.background_index == 1
        assert data.read(data.dataset[2])[1].max() == 255

    def test_shards_and_choice(self, folder):
        data = open_data(folder)
        assert [names(data.shard(2, index)) for index in (0, 1)] == [["p0", "p2", "p4"], ["p1", "p3"]]
        assert names(data.select([4, 0])) == ["p4", "p0"]
        assert len(data.shard(7, 6)) == 0
        with pytest.raises(ValueError, match="index from 0 to 1, got 2"):
            data.shard(2, 2)

    def test_streamed(self, folder):
        data = open_data(folder, streaming=True)
        assert isinstance(data.dataset, datasets.IterableDataset)
        assert names(data) == names(open_data(folder))
        assert data.read(next(iter(data.dataset)))[1].tolist() == labels_of(0).tolist()
        shards = [names(data.shard(2, index)) for index in (0, 1)]
        assert sorted(shards[0] + shards[1]) == names(data) and min(map(len, shards)) == 2
        with pytest.raises(ValueError, match="streamed and cannot be indexed"):
            data.select([0])

    def test_in_workers(self, folder):
        data = open_data(folder)
        loader = DataLoader(data.dataset, batch_size=None, num_workers=2, collate_fn=data.read)
        assert [labels.tolist() for _, labels in loader] == [labels_of(number).tolist() for number in range(5)]

    def test_turned_photo(self, folder):
        """A label map lies either as the photo is shown or as its pixels are stored."""
        stored, exif = Image.new("RGB", (8, 6)), Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        stored.save(folder / "images" / "p1.jpg", exif=exif)
        data = open_data(folder)
        image, labels = data.read(data.dataset[1])
        assert image.size == (6, 8)
        assert labels.tolist() == np.rot90(labels_of(1), -1).tolist()
        Image.fromarray(np.rot90(labels_of(1), -1)).save(folder / "labels" / "p1.png")
        assert data.read(data.dataset[1])[1].tolist() == labels.tolist()

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("classes.json", "{", "classes.json' is not JSON"),
            ("classes.json", "[]", r"must hold \{\"classes\""),
            ("classes.json", '{"classes": []}', "must hold"),
            ("classes.json", '{"classes": ["a"], "background_index": 1}', "background_index in .* 0 to 0, got 1"),
            ("classes.json", '{"classes": ["a", "b"], "ignore_index": 1}', "ignore_index in .* that no class has"),
            ("val.txt", None, "cannot read .*val.txt': No such file"),
            ("val.txt", "\n", "val.txt' names no images"),
            ("val.txt", "p1\np1", "names 'p1' twice"),
            ("val.txt", "p7\np8\np1", "no image .*images/p7' that the list 'val' names; 2 of 3 are missing"),
            ("labels/p2.png", None, "no label map .*labels/p2' that the list 'val' names"),
            ("images/p1.png", "", "images/p1.* and .*images/p1.* have the same name"),
        ],
    )
    def test_missing_or_broken(self, folder, file, content, message):
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            open_data(folder)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (np.full((6, 8), 3, dtype=np.uint8), r"p1.png' holds 3; allowed in mine are 0 to 2 and 255 \(ignored\)"),
            (np.zeros((6, 7), dtype=np.uint8), r"p1.png' is 7 x 6, its image 8 x 6"),
            (np.zeros((6, 8, 3), dtype=np.uint8), "p1.png' must have one channel with class indices, got 3"),
            (None, "cannot read the label map .*p1.png'"),
        ],
    )
    def test_unusable_labels(self, folder, labels, message):
        path = folder / "labels" / "p1.png"
        if labels is None:
            path.write_text("no image")
        else:
            Image.fromarray(labels).save(path)
        data = open_data(folder)
        with pytest.raises(ValueError, match=message):
            data.read(data.dataset[1])

    def test_no_data(self, folder, tmp_path):
        with pytest.raises(ValueError, match="there is no folder '/no/where/x'"):
            open_data("/no/where/x")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"neither classes\.json nor the folders of one of coco_stuff171"):
            open_data(tmp_path / "empty")
        with pytest.raises(ValueError, match="is not a folder"):
            open_data(folder / "val.txt")


class TestTrees:
    @pytest.fixture
    def voc(self, tmp_path):
        root = tmp_path / "VOCdevkit" / "VOC2012"
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 3)).save(root / "JPEGImages" / f"2007_{number}.jpg")
            Image.new("L", (4, 3), number).save(root / "SegmentationClass" / f"2007_{number}.png")
        (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_0\n2007_1\n")
        return root

    def test_recognised(self, voc, tmp_path):
        for place in (voc, voc.parent, tmp_path):
            data = open_data(place)
            assert data.name == "voc21" and names(data) == ["2007_0", "2007_1"]
        assert data.classes == tuple(label.name for label in load_label_set("voc21"))

    def test_several_at_one_place(self, voc, tmp_path):
        for kind, ending in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / kind / "validation").mkdir(parents=True)
            Image.new("L", (4, 3), 1).save(tmp_path / kind / "validation" / f"ADE_1.{ending}")
        with pytest.raises(ValueError, match="several data sets; name one of the layouts voc21, voc20, ade150"):
            open_data(tmp_path)
        assert open_data(tmp_path, layout="ade150").name == "ade150"
        assert open_data(tmp_path, layout="voc20").name == "voc20"

    def test_lists_of_paths_and_two_lists(self, voc):
        (voc / "SegmentationClass").rename(voc / "SegmentationClassAug")
        lists = voc / "ImageSets" / "Segmentation"
        (lists / "train.txt").write_text("2007_1\n")
        (lists / "aug.txt").write_text("2007_0\n")
        assert names(open_data(voc, "trainaug", layout="voc21")) == ["2007_1", "2007_0"]
        (lists / "trainaug.txt").write_text("/JPEGImages/2007_0.jpg /SegmentationClassAug/2007_0.png\n")
        assert names(open_data(voc, "trainaug", layout="voc21")) == ["2007_0"]

    @pytest.mark.parametrize(
        ("change", "arguments", "message"),
        [
            (None, {"layout": "voc22"}, "unknown layout 'voc22'; did you mean 'voc21'?"),
            (
                None,
                {"layout": "voc21", "split": "test"},
                "voc21 has no split 'test'; it has train, val, trainval, traina",
            ),
            (None, {"layout": "ade150"}, "ade150 is not in .*: there are no images .*/images/validation'"),
            (None, {"layout": "voc21", "label_names": ["a", "b"]}, "voc21 has 21 classes, got 2 names"),
            ("JPEGImages/2007_1.jpg", {}, "there is no image .*2007_1' that the list 'val' names"),
            ("SegmentationClass/2007_0.png", {}, "there is no label map .*2007_0' that"),
            ("ImageSets/Segmentation/val.txt", {}, "there is no list 'ImageSets/Segmentation/val.txt' in"),
        ],
    )
    def test_errors(self, voc, change, arguments, message):
        if change is not None:
            (voc / change).unlink()
        with pytest.raises(ValueError, match=message):
            open_data(voc, **{"layout": "voc21", **arguments})

    def test_out_of_range_names_the_file(self, voc):
        Image.new("L", (4, 3), 21).save(voc / "SegmentationClass" / "2007_1.png")
        data = open_data(voc)
        with pytest.raises(ValueError, match=r"2007_1.png' holds 21; allowed in voc21 are 0 to 20, 255"):
            data.read(data.dataset[1])

    def test_classes_named_by_the_tree(self, voc):
        """PASCAL Context brings the names of its 459 classes along."""
        savemat = pytest.importorskip("scipy.io").savemat
        (voc / "trainval").mkdir()
        for number in range(2):
            savemat(voc / "trainval" / f"2007_{number}.mat", {"LabelMap": np.full((3, 4), 459 + number)})
        (voc / "val.txt").write_text("2007_0\n2007_1\n")
        with pytest.raises(ValueError, match=r"cannot read .*labels.txt': No such file or directory$"):
            open_data(voc, layout="context459")
        (voc / "labels.txt").write_text("1: accordion\n2: aeroplane\n")
        with pytest.raises(ValueError, match=r"context459 has 459 classes, labels.txt names 2"):
            open_data(voc, layout="context459")
        data = open_data(voc, layout="context459", label_names=[str(number) for number in range(459)])
        assert set(data.read(data.dataset[0])[1].flat) == {458}
        with pytest.raises(ValueError, match=r"2007_1.mat' holds 460; allowed in context459 are 0 to 459$"):
            data.read(data.dataset[1])
        (voc / "trainval" / "2007_0.mat").write_bytes(b"broken")
        with pytest.raises(ValueError, match=r"cannot read the label map .*2007_0.mat'"):
            data.read(data.dataset[0])

    def test_tables_are_whole(self):
        """Every class of every layout is named by some value, and no value names a class that is not there."""
        for layout in LAYOUTS.values():
            for tree in layout.trees:
                classes = {label for label in tree.values.values() if label >= 0}
                assert classes == set(range(layout.num_classes)), layout.name


class TestHubData:
    """Parquet files and streams, as the hub serves them; the hub itself is not asked."""

    @pytest.fixture
    def parquet(self, tmp_path):
        def encode(image):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return {"bytes": buffer.getvalue(), "path": None}

        rows = {
            "photo": [encode(Image.new("RGB", (8, 6), (number, 0, 0))) for number in range(4)],
            "mask": [encode(Image.fromarray(labels_of(number))) for number in range(4)],
            "caption": ["x"] * 4,
        }
        features = datasets.Features(
            {"photo": datasets.Image(), "mask": datasets.Image(), "caption": datasets.Value("string")}
        )
        (tmp_path / "set" / "data").mkdir(parents=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / "set" / "data" / "validation-0.parquet"
        )
        return tmp_path / "set"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_reads(self, parquet, streaming):
        data = open_data(
            parquet, "validation", image_column="photo", label_column="mask", label_names=CLASSES, streaming=streaming
        )
        assert data.classes == tuple(CLASSES) and data.background_index == 0
        rows = list(data.dataset)
        assert [row["name"] for row in rows] == [f"{number:08d}" for number in range(4)]
        image, labels = data.read(rows[2])
        assert image.getpixel((0, 0)) == (2, 0, 0) and labels.tolist() == labels_of(2).tolist()
        assert len(list(data.shard(2, 1).dataset)) == 2

    def test_label_values_of_a_layout(self, parquet):
        data = open_data(parquet, "validation", image_column="photo", label_column="mask", layout="voc20")
        assert data.read(data.dataset[2])[1][0].tolist() == [255, 0, 255, 1, 1, 1, 1, 1]

    def test_errors(self, parquet):
        columns = {"image_column": "photo", "label_column": "mask"}
        for changed, message in (
            ({"label_column": None}, "name the columns"),
            ({"label_names": None}, "say what the labels of .* are"),
            ({"label_column": "masks"}, "no column 'masks'; it has photo, mask, caption"),
            ({"label_column": "caption"}, "the column 'caption' of .* must hold images"),
        ):
            with pytest.raises(ValueError, match=message):
                open_data(parquet, "validation", **{**columns, "label_names": CLASSES, **changed})
        data = open_data(parquet, "validation", **columns, label_names=CLASSES[:2])
        with pytest.raises(ValueError, match=r"label map of '00000002' holds 2; allowed in .* are 0 to 1 and 255"):
            data.read(data.dataset[2])

    def test_checked(self, parquet):
        report = check_hub(
            str(parquet), "validation", None, image_column="photo", label_column="mask", label_names=CLASSES[:2]
        )
        assert report.splits[0].listed == 4 and report.splits[0].read == 3 and not report.sound
        assert "label map of '00000002' holds 2" in report.lines()[2]


class TestChecker:
    def test_sound(self, folder):
        report = check_folder(folder)
        assert report.sound and [split.split for split in report.splits] == ["train", "val"]
        assert report.splits[1].read == 5 and report.splits[1].pixels.sum() == 5 * 47

    def test_everything_at_once(self, folder):
        (folder / "images" / "p1.jpg").unlink()
        (folder / "labels" / "p2.png").write_bytes(b"broken")
        Image.new("L", (8, 6), 9).save(folder / "labels" / "p3.png")
        (folder / "images" / "p4.jpg").write_bytes((folder / "images" / "p4.jpg").read_bytes()[:200])
        (report,) = check_folder(folder, ["val"]).splits
        assert report.listed == 5 and report.read == 1
        found = " ".join(report.problems)
        for text in ("no image for 'p1'", "cannot read the label map", "p3.png' holds 9", "p4.jpg"):
            assert text in found
        assert len(report.problems) == 4

    def test_incomplete_tree(self, tmp_path):
        for kind, ending in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / kind / "validation").mkdir(parents=True)
            for name in ("ADE_1", "ADE_2"):
                Image.new("L", (4, 3), 1).save(tmp_path / kind / "validation" / f"{name}.{ending}")
        (tmp_path / "annotations" / "validation" / "ADE_2.png").unlink()
        report = check_folder(tmp_path)
        assert report.layout is LAYOUTS["ade150"]
        train, val = report.splits
        assert train.problems[0].count("there is no folder") == 2
        assert val.problems == ["there is no label map for 'ADE_2'", "there are 1 images, published are 2000"]
        assert "ADEChallengeData2016.zip" in "\n".join(report.lines())

    @pytest.fixture
    def arm(self, tmp_path, root):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

        def run(*arguments):
            return subprocess.run(
                [sys.executable, "-m", "arm_hf.cli", "data", *map(str, arguments)],
                cwd=tmp_path,
                env={**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )

        return run

    def test_command(self, arm, folder):
        Image.new("L", (8, 6), 9).save(folder / "labels" / "p4.png")
        done = arm(folder)
        assert done.returncode == 1, done.stderr
        assert "train: 2 images, 2 read, 2 of 3 classes seen; no problems" in done.stdout
        assert "p4.png' holds 9; allowed in mine are 0 to 2 and 255 (ignored)" in done.stdout

    def test_command_lists_and_refuses(self, arm):
        done = arm("--layout", "cityscapes19")
        assert done.returncode == 0 and "gtFine_trainvaltest.zip" in done.stdout
        done = arm("nothing", "--layout", "voc12")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "unknown layout 'voc12'" in done.stderr


@pytest.mark.parametrize(
    ("name", "count", "background"),
    [
        ("coco_stuff171", 171, None),
        ("coco_object", 81, 0),
        ("voc2012", 21, 0),
        ("camvid", 11, None),
        ("msrc", 23, None),
    ],
)
def test_real_data(shared, name, count, background):
    data = open_data(shared / "data" / name)
    assert (len(data.classes), data.background_index) == (count, background)
    for index in (0, len(data) - 1):
        image, labels = data.read(data.dataset[index])
        assert labels.shape == (image.height, image.width)
