"""The standard trees as a table: where images, label maps and lists lie, and what the values in the maps stand for.

Folders are those of the data sets themselves, of mmsegmentation and of detectron2. In a pattern `{folder}` is that of
the split, and `{name}` what the list names (or whatever is there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import label_values as values
from .label_values import Values


@dataclass(frozen=True)
class Tree:
    """One way in which the files of a data set may lie.

    Attributes:
        images: Pattern of the images.
        labels: Pattern of the label maps.
        values: Class of each value in a label map.
        splits: Folder of each split.
        names: Lists of a split's names, the first that exists; `A + B` is both. None: the label maps that are there.
        roots: Where below the given folder the tree may begin.
        matlab_key: The variable with the labels, where these are `.mat` files.
    """

    images: str
    labels: str
    values: Values
    splits: Mapping[str, str]
    names: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("",)
    matlab_key: str | None = None


@dataclass(frozen=True)
class Layout:
    """A standard data set.

    Attributes:
        name: What `open_data(layout=...)` takes.
        title: For people.
        num_classes: K.
        trees: How its files may lie; the first that is there counts. The first has the values as published.
        downloads: What to get and where to put it.
        label_set: The label set (`arm_hf.label_sets`) whose names the classes have; if there is none:
        name_list: A list in `assets/class_names`, or
        class_file: the file in the tree that names the classes, a line `number: name` each.
        sizes: Images of each split as published.
    """

    name: str
    title: str
    num_classes: int
    trees: tuple[Tree, ...]
    downloads: tuple[str, ...]
    label_set: str | None = None
    name_list: str | None = None
    class_file: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


_COCO_ROOTS = ("", "coco", "coco_stuff164k")
_COCO_SPLITS = {"train": "train2017", "val": "val2017"}
_COCO_SIZES = {"train": 118287, "val": 5000}
_COCO_DOWNLOADS = (
    "http://images.cocodataset.org/zips/train2017.zip into images/train2017",
    "http://images.cocodataset.org/zips/val2017.zip into images/val2017",
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip into "
    "stuffthingmaps/train2017 and stuffthingmaps/val2017",
)


def _coco_trees(raw: Values, train_ids: Values) -> tuple[Tree, ...]:
    """The raw maps, beside the images or as mmsegmentation and detectron2 place them, or those with train ids."""
    places = (
        ("images/{folder}/{name}.jpg", "stuffthingmaps/{folder}/{name}.png", raw),
        ("{folder}/{name}.jpg", "stuffthingmaps/{folder}/{name}.png", raw),
        ("images/{folder}/{name}.jpg", "annotations/{folder}/{name}_labelTrainIds.png", train_ids),
        ("images/{folder}/{name}.jpg", "annotations/{folder}/{name}.png", raw),
        ("{folder}/{name}.jpg", "stuffthingmaps_detectron2/{folder}/{name}.png", train_ids),
    )
    return tuple(Tree(images, labels, table, _COCO_SPLITS, roots=_COCO_ROOTS) for images, labels, table in places)


_COCO_STUFF = Layout(
    name="coco_stuff171",
    title="COCO-Stuff 164k: 80 object and 91 stuff classes",
    num_classes=171,
    label_set="coco_stuff171",
    trees=_coco_trees(values.COCO_STUFF_RAW, values.in_order(171)),
    downloads=_COCO_DOWNLOADS,
    sizes=_COCO_SIZES,
)

_COCO_OBJECT = Layout(
    name="coco_object",
    title="COCO-Object: background and 80 object classes, on the images of COCO-Stuff 164k",
    num_classes=81,
    label_set="coco_object",
    trees=(
        *_coco_trees(values.COCO_OBJECT_RAW, values.COCO_OBJECT_FROM_STUFF),
        Tree(
            "images/{folder}/{name}.jpg",
            "annotations/{folder}/{name}_instanceTrainIds.png",
            values.in_order(81),
            _COCO_SPLITS,
            roots=(*_COCO_ROOTS, "coco_object"),
        ),
    ),
    downloads=_COCO_DOWNLOADS,
    sizes=_COCO_SIZES,
)

_COCO_STUFF_10K = Layout(
    name="coco_stuff10k",
    title="COCO-Stuff 10k: the same 171 classes",
    num_classes=171,
    label_set="coco_stuff171",
    trees=(
        Tree(
            "images/{name}.jpg",
            "annotations/{name}.mat",
            values.COCO_STUFF_10K_RAW,
            {"train": "train", "test": "test", "val": "test"},
            names=("imageLists/{folder}.txt",),
            roots=("", "coco_stuff10k", "coco_stuff_10k", "cocostuff-10k-v1.1"),
            matlab_key="S",
        ),
        Tree(
            "images/{folder}/{name}.jpg",
            "annotations/{folder}/{name}_labelTrainIds.png",
            values.from_one(171),
            {"train": "train2014", "test": "test2014", "val": "test2014"},
            roots=("", "coco_stuff10k"),
        ),
    ),
    downloads=(
        "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/cocostuff-10k-v1.1.zip into images, "
        "annotations and imageLists",
    ),
    sizes={"train": 9000, "test": 1000, "val": 1000},
)

_VOC_ROOTS = ("", "VOC2012", "VOCdevkit/VOC2012")


def _voc(name: str, title: str, num_classes: int, table: Values) -> Layout:
    lists = "ImageSets/Segmentation"
    return Layout(
        name=name,
        title=title,
        num_classes=num_classes,
        label_set=name,
        trees=(
            Tree(
                "JPEGImages/{name}.jpg",
                "SegmentationClass/{name}.png",
                table,
                {split: split for split in ("train", "val", "trainval")},
                names=(f"{lists}/{{folder}}.txt",),
                roots=_VOC_ROOTS,
            ),
            Tree(
                "JPEGImages/{name}.jpg",
                "SegmentationClassAug/{name}.png",
                table,
                {"trainaug": "trainaug"},
                names=(
                    f"{lists}/trainaug.txt",
                    f"{lists}/train_aug.txt",
                    f"{lists}/train.txt + {lists}/aug.txt",
                    "ImageSets/SegmentationAug/train_aug.txt",
                ),
                roots=_VOC_ROOTS,
            ),
        ),
        downloads=(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar into VOCdevkit/VOC2012",
            "for the split trainaug: https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip into "
            "VOCdevkit/VOC2012/SegmentationClassAug, and the list of its 10582 names as "
            "ImageSets/Segmentation/trainaug.txt (labels of Hariharan et al., Semantic Contours, ICCV 2011)",
        ),
        sizes={"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582},
    )


_CONTEXT_ROOTS = ("", "VOC2010", "VOCdevkit/VOC2010")
_CONTEXT_SPLITS = {"train": "train", "val": "val"}
_CONTEXT_LISTS = (
    "ImageSets/SegmentationContext/{folder}.txt",
    "pascalcontext_{folder}.txt",
    "{folder}.txt",
)
_CONTEXT_DOWNLOADS = (
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar into VOCdevkit/VOC2010",
    "https://www.cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz into VOCdevkit/VOC2010/trainval, and "
    "labels.txt, train.txt and val.txt of https://www.cs.stanford.edu/~roozbeh/pascal-context into VOCdevkit/VOC2010",
    "or, for the 59 and 60 classes, VOCdevkit/VOC2010/SegmentationClassContext and "
    "ImageSets/SegmentationContext, made with mmsegmentation's tools/dataset_converters/pascal_context.py",
)


def _context_raw(table: Values) -> Tree:
    return Tree(
        "JPEGImages/{name}.jpg",
        "trainval/{name}.mat",
        table,
        _CONTEXT_SPLITS,
        names=_CONTEXT_LISTS,
        roots=_CONTEXT_ROOTS,
        matlab_key="LabelMap",
    )


def _context(name: str, title: str, num_classes: int, maps: Values, raw: Values) -> Layout:
    return Layout(
        name=name,
        title=title,
        num_classes=num_classes,
        label_set=name,
        trees=(
            Tree(
                "JPEGImages/{name}.jpg",
                "SegmentationClassContext/{name}.png",
                maps,
                _CONTEXT_SPLITS,
                names=_CONTEXT_LISTS,
                roots=_CONTEXT_ROOTS,
            ),
            _context_raw(raw),
        ),
        downloads=_CONTEXT_DOWNLOADS,
        sizes={"train": 4998, "val": 5105},
    )


_CONTEXT_459 = Layout(
    name="context459",
    title="PASCAL Context: all 459 classes",
    num_classes=459,
    class_file="labels.txt",
    trees=(_context_raw(values.from_one(459, unlabelled=(0,))),),
    downloads=_CONTEXT_DOWNLOADS,
    sizes={"train": 4998, "val": 5105},
)

_ADE_SPLITS = {"train": "training", "val": "validation"}

_ADE_150 = Layout(
    name="ade150",
    title="ADE20K: the 150 classes of the scene parsing challenge",
    num_classes=150,
    label_set="ade150",
    trees=(
        Tree(
            "images/{folder}/{name}.jpg",
            "annotations/{folder}/{name}.png",
            values.from_one(150),
            _ADE_SPLITS,
            roots=("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        ),
    ),
    downloads=("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip into ADEChallengeData2016",),
    sizes={"train": 20210, "val": 2000},
)

# Names of the classes: ADE20K's own index of objects, in the order of Cheng et al., "Per-Pixel Classification is Not
# All You Need for Semantic Segmentation", NeurIPS 2021 (MaskFormer), whose script makes the label maps.
_ADE_847 = Layout(
    name="ade847",
    title="ADE20K: 847 classes of the full data set",
    num_classes=847,
    name_list="ade847",
    trees=(
        Tree(
            "images_detectron2/{folder}/{name}.jpg",
            "annotations_detectron2/{folder}/{name}.tif",
            values.in_order(847, unlabelled=(65535,)),
            _ADE_SPLITS,
            roots=("", "ADE20K_2021_17_01"),
        ),
    ),
    downloads=(
        "ADE20K_2021_17_01 from https://groups.csail.mit.edu/vision/datasets/ADE20K (after registration), then "
        "images_detectron2 and annotations_detectron2 made with MaskFormer's datasets/prepare_ade20k_full_sem_seg.py",
    ),
    sizes={"val": 2000},
)


def _cityscapes_tree(ending: str, table: Values) -> Tree:
    return Tree(
        "leftImg8bit/{folder}/{name}_leftImg8bit.png",
        f"gtFine/{{folder}}/{{name}}_gtFine_{ending}.png",
        table,
        {"train": "train", "val": "val"},
        roots=("", "cityscapes"),
    )


_CITYSCAPES = Layout(
    name="cityscapes19",
    title="Cityscapes: the 19 classes of the evaluation, fine labels",
    num_classes=19,
    label_set="cityscapes19",
    trees=(
        _cityscapes_tree("labelIds", values.CITYSCAPES_RAW),
        _cityscapes_tree("labelTrainIds", values.in_order(19)),
    ),
    downloads=(
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads "
        "(after registration) into leftImg8bit and gtFine",
    ),
    sizes={"train": 2975, "val": 500},
)

# Where one tree serves several layouts, the first of them is meant unless another is named.
_TABLE = (
    _COCO_STUFF,
    _COCO_OBJECT,
    _COCO_STUFF_10K,
    _context("context60", "PASCAL Context: background and 59 classes", 60, values.in_order(60), values.CONTEXT_60_RAW),
    _context("context59", "PASCAL Context: 59 classes", 59, values.from_one(59), values.CONTEXT_59_RAW),
    _CONTEXT_459,
    _voc("voc21", "PASCAL VOC 2012: background and 20 object classes", 21, values.in_order(21)),
    _voc("voc20", "PASCAL VOC 2012: 20 object classes", 20, values.from_one(20)),
    _ADE_150,
    _ADE_847,
    _CITYSCAPES,
)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in _TABLE}
