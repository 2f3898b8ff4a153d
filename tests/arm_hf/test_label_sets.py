"""The label sets of the literature and label files."""

import json

import pytest

from arm_hf.label_sets import describe_label_set, labels_from, list_label_sets, load_label_set
from arm_hf.modeling.prompts import Vocabulary, format_labels, parse_labels

# Number of classes and queries of each set, from the description of the papers' code.
SIZES = {
    "voc20": (20, 30),
    "voc21": (21, 56),
    "context59": (59, 59),
    "context60": (60, 60),
    "coco_object": (81, 113),
    "coco_stuff171": (171, 171),
    "ade150": (150, 150),
    "cityscapes19": (19, 19),
    "voc20_clearclip": (20, 20),
    "voc21_clearclip": (21, 21),
    "coco_object_clearclip": (81, 81),
}


def test_all_sets_ship_with_the_package():
    assert list_label_sets() == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_numbers_of_classes_and_queries(name):
    vocabulary = Vocabulary.build(load_label_set(name))
    assert (vocabulary.num_classes, len(vocabulary.queries)) == SIZES[name]
    has_background = name.startswith(("voc21", "context60", "coco_object"))
    assert vocabulary.background_index == (0 if has_background else None)


@pytest.mark.parametrize("name", SIZES)
def test_words_are_those_of_the_papers_code(name, shared):
    names = json.loads((shared / "class_names" / f"{name}.json").read_text())["names"]
    assert [list(label.words) for label in load_label_set(name)] == [[word.strip() for word in row] for row in names]


@pytest.mark.parametrize("name", SIZES)
def test_each_set_names_its_sources(name):
    record = describe_label_set(name)
    assert all(len(record[key]) > 20 for key in ("title", "dataset", "words_from"))


@pytest.mark.parametrize("name", SIZES)
def test_the_string_form_gives_the_set_back(name):
    assert parse_labels(format_labels(load_label_set(name))) == load_label_set(name)


def test_names_of_the_data_set_words_of_the_papers():
    voc = {label.name: label.words for label in load_label_set("voc20")}
    assert (voc["boat"], voc["diningtable"], voc["tvmonitor"][0]) == (("ship",), ("table",), "television monitor")


def test_coco_object_keeps_bed_in_both_places():
    labels = load_label_set("coco_object")
    assert "bed" in labels[0].words and labels[60].words == ("bed",)


def test_unknown_set():
    with pytest.raises(ValueError, match="did you mean 'voc21'"):
        load_label_set("voc-21")
    with pytest.raises(ValueError, match="known are ade150"):
        load_label_set("../voc21")


def test_labels_from_a_file(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\ufeff# my garden\n\ncat\ndog=puppy|hound\nbed, unmade\n", encoding="utf-8")
    assert [(label.name, label.words) for label in labels_from(path)] == [
        ("cat", ("cat",)),
        ("dog", ("dog", "puppy", "hound")),
        ("bed, unmade", ("bed, unmade",)),
    ]
    assert labels_from("voc21") == load_label_set("voc21")


def test_label_files_that_cannot_be_used(tmp_path):
    empty, twice, binary = (tmp_path / name for name in ("empty.txt", "twice.txt", "binary.txt"))
    empty.write_text("# nothing\n")
    twice.write_text("cat\nCat\n")
    binary.write_bytes(b"\xff\xfe\x00cat")
    for path, message in ((empty, "is empty"), (twice, "given twice"), (binary, "codec")):
        with pytest.raises(ValueError, match=message) as caught:
            labels_from(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="neither a text file nor a label set"):
        labels_from(tmp_path / "missing.txt")
