"""Every standard tree, made by hand with two tiny images: paths, splits, and the classes of the raw values."""

import numpy as np
import pytest
from PIL import Image

from arm_hf.data import LAYOUTS, open_data

SIZE = (6, 4)  # width, height


def save_image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def save_labels(path, values, key=None):
    """A map with the given values in its first pixels and the last of them in all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = np.full(SIZE[0] * SIZE[1], values[-1], dtype=np.uint16 if max(values) > 255 or key else np.uint8)
    flat[: len(values)] = values
    table = flat.reshape(SIZE[1], SIZE[0])
    if key is not None:
        pytest.importorskip("scipy.io").savemat(path, {key: table})
    else:
        Image.fromarray(table).save(path)


def save_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


VOC_LISTS = "ImageSets/Segmentation"
RAW_STUFF = [0, 89, 91, 181, 12, 255]
STUFF = [0, 79, 80, 170, 11, 255]
# layout, split, image, label map, list, variable in a .mat, values in the file, labels
CASES = {
    "stuff as published": (
        "coco_stuff171", "val", "images/val2017/1.jpg", "stuffthingmaps/val2017/1.png", None, None, RAW_STUFF, STUFF,
    ),
    "stuff, plain COCO": (
        "coco_stuff171", "train", "train2017/1.jpg", "stuffthingmaps/train2017/1.png", None, None, RAW_STUFF, STUFF,
    ),
    "stuff, mmsegmentation": (
        "coco_stuff171", "val", "images/val2017/1.jpg", "annotations/val2017/1_labelTrainIds.png", None, None,
        [0, 170, 255], [0, 170, 255],
    ),
    "stuff, raw in annotations": (
        "coco_stuff171", "val", "images/val2017/1.jpg", "annotations/val2017/1.png", None, None, RAW_STUFF, STUFF,
    ),
    "stuff, detectron2": (
        "coco_stuff171", "val", "coco/val2017/1.jpg", "coco/stuffthingmaps_detectron2/val2017/1.png", None, None,
        [0, 170, 255], [0, 170, 255],
    ),
    "object from raw": (
        "coco_object", "val", "images/val2017/1.jpg", "stuffthingmaps/val2017/1.png", None, None,
        [0, 89, 91, 181, 12, 255], [1, 80, 0, 0, 12, 0],
    ),
    "object from train ids": (
        "coco_object", "val", "images/val2017/1.jpg", "annotations/val2017/1_labelTrainIds.png", None, None,
        [0, 79, 80, 170, 255], [1, 80, 0, 0, 0],
    ),
    "object, own maps": (
        "coco_object", "val", "images/val2017/1.jpg", "annotations/val2017/1_instanceTrainIds.png", None, None,
        [0, 1, 80], [0, 1, 80],
    ),
    "stuff 10k as published": (
        "coco_stuff10k", "test", "images/1.jpg", "annotations/1.mat", "imageLists/test.txt", "S",
        [0, 1, 90, 92, 182], [255, 0, 79, 80, 170],
    ),
    "stuff 10k, val is test": (
        "coco_stuff10k", "val", "images/1.jpg", "annotations/1.mat", "imageLists/test.txt", "S", [0, 1], [255, 0],
    ),
    "stuff 10k, mmsegmentation": (
        "coco_stuff10k", "test", "images/test2014/1.jpg", "annotations/test2014/1_labelTrainIds.png", None, None,
        [0, 1, 171], [255, 0, 170],
    ),
    "voc21": (
        "voc21", "val", "VOCdevkit/VOC2012/JPEGImages/1.jpg", "VOCdevkit/VOC2012/SegmentationClass/1.png",
        f"VOCdevkit/VOC2012/{VOC_LISTS}/val.txt", None, [0, 1, 20, 255], [0, 1, 20, 255],
    ),
    "voc20": (
        "voc20", "trainval", "JPEGImages/1.jpg", "SegmentationClass/1.png", f"{VOC_LISTS}/trainval.txt", None,
        [0, 1, 20, 255], [255, 0, 19, 255],
    ),
    "voc augmented": (
        "voc21", "trainaug", "VOC2012/JPEGImages/1.jpg", "VOC2012/SegmentationClassAug/1.png",
        f"VOC2012/{VOC_LISTS}/trainaug.txt", None, [0, 20, 255], [0, 20, 255],
    ),
    "context60": (
        "context60", "val", "VOC2010/JPEGImages/1.jpg", "VOC2010/SegmentationClassContext/1.png",
        "VOC2010/ImageSets/SegmentationContext/val.txt", None, [0, 1, 59], [0, 1, 59],
    ),
    "context59": (
        "context59", "train", "JPEGImages/1.jpg", "SegmentationClassContext/1.png",
        "ImageSets/SegmentationContext/train.txt", None, [0, 1, 59], [255, 0, 58],
    ),
    "context60 as published": (
        "context60", "val", "JPEGImages/1.jpg", "trainval/1.mat", "val.txt", "LabelMap",
        [1, 2, 9, 458, 459], [0, 1, 2, 59, 0],
    ),
    "context59 as published": (
        "context59", "val", "JPEGImages/1.jpg", "trainval/1.mat", "pascalcontext_val.txt", "LabelMap",
        [1, 2, 9, 458, 459], [255, 0, 1, 58, 255],
    ),
    "context459": (
        "context459", "val", "JPEGImages/1.jpg", "trainval/1.mat", "val.txt", "LabelMap",
        [0, 1, 256, 459], [65535, 0, 255, 458],
    ),
    "ade150": (
        "ade150", "val", "ADEChallengeData2016/images/validation/1.jpg",
        "ADEChallengeData2016/annotations/validation/1.png", None, None, [0, 1, 150], [255, 0, 149],
    ),
    "ade847": (
        "ade847", "train", "images_detectron2/training/1.jpg", "annotations_detectron2/training/1.tif", None, None,
        [0, 255, 846, 65535], [0, 255, 846, 65535],
    ),
    "cityscapes, label ids": (
        "cityscapes19", "val", "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png", "gtFine/val/ulm/ulm_1_gtFine_labelIds.png",
        None, None, [0, 7, 33, 29, 255], [255, 0, 18, 255, 255],
    ),
    "cityscapes, train ids": (
        "cityscapes19", "train", "cityscapes/leftImg8bit/train/ulm/ulm_1_leftImg8bit.png",
        "cityscapes/gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png", None, None, [0, 18, 255], [0, 18, 255],
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    layout, split, image, labels, names, key, values, expected = CASES[request.param]
    save_image(tmp_path / image)
    save_labels(tmp_path / labels, values, key)
    if names is not None:
        save_list(tmp_path / names, ["1"])
    if layout == "context459":
        save_list(tmp_path / "labels.txt", [f"{number}: thing {number}" for number in range(1, 460)])
    return tmp_path, layout, split, expected


def test_reads_the_tree(case):
    root, layout, split, expected = case
    data = open_data(root, split, layout=layout)
    assert (data.name, data.split, len(data)) == (layout, split, 1)
    assert len(data.classes) == LAYOUTS[layout].num_classes == len(set(data.classes))
    assert data.ignore_index == (255 if len(data.classes) <= 255 else 65535)
    has_background = layout in ("voc21", "context60", "coco_object")
    assert data.background_index == (0 if has_background else None)
    image, labels = data.read(data.dataset[0])
    assert image.size == SIZE and image.mode == "RGB"
    assert labels.shape == (SIZE[1], SIZE[0]) and labels.dtype == np.int32
    assert labels.flatten()[: len(expected)].tolist() == expected
