"""The literature's protocols as data, how a data set's labels become theirs, and how images are resized."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from arm_hf.cli import app
from arm_hf.data.standard_trees import class_names, get_layout
from arm_hf.label_sets import load_label_set
from arm_hf.modeling.dense_clip import BUILT_IN_METHODS
from arm_hf.modeling.method import get_method
from arm_hf.modeling.prompts import Label, resolve_templates
from arm_hf.protocols import BACKBONES, align_labels, list_protocols, load_protocol, plain_protocol
from arm_hf.resizing import opencv_bilinear, resize, target_size, to_pixel_values


def data(classes, background=None, ignore=255, name="somewhere"):
    return SimpleNamespace(classes=tuple(classes), background_index=background, ignore_index=ignore, name=name)


def names(label_set):
    return [label.name for label in load_label_set(label_set)]


def numbered(count):
    return [f"thing {number}" for number in range(count)]


@pytest.mark.parametrize("name", list_protocols())
def test_every_protocol_is_whole(name):
    protocol = load_protocol(name)
    protocol = protocol.for_data(data(numbered(protocol.num_classes)))
    assert len(protocol.classes) == protocol.num_classes
    for method in BUILT_IN_METHODS:
        for backbone in BACKBONES:
            setup = protocol.setup(method, backbone)
            record = setup.record()
            json.dumps(record, allow_nan=False)
            get_method(method).settings({**setup.options, **setup.arm_options})
            resolve_templates(setup.templates)
            assert setup.source and record["input"]["short_side"]
            assert len(setup.labels) == len(protocol.classes)
            vocabulary = setup.vocabulary()
            assert vocabulary.num_classes == len(protocol.classes) + setup.offset
            gate = setup.options.get("background_threshold")
            if setup.threshold is not None or gate is not None:
                assert vocabulary.background_index is not None
    assert all(entry["source"] and 0 < entry["miou"] < 100 for entry in protocol.published)


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("voc21", "sclip", {"scale": 65.0, "threshold": 0.1, "area": 0.1, "side": 336, "window": (224, 112)}),
        ("voc20", "sclip", {"scale": 40.0, "threshold": None, "area": None, "side": 336, "window": (224, 112)}),
        ("coco_stuff171", "sclip", {"scale": 40.0, "threshold": None, "area": None, "side": 448, "window": (224, 112)}),
        ("voc21", "clearclip", {"scale": 50.0, "threshold": 0.5, "area": None, "side": 448, "window": (448, 224)}),
        (
            "cityscapes19",
            "clearclip",
            {"scale": 50.0, "threshold": None, "area": None, "side": 448, "window": (224, 224)},
        ),
        ("context60", "naclip", {"scale": 40.0, "threshold": 0.1, "area": None, "side": 336, "window": (224, 112)}),
        ("voc21", "naclip", {"scale": 40.0, "threshold": 0.1, "area": None, "side": 336, "window": (None, None)}),
        ("cityscapes19", "naclip", {"scale": 40.0, "threshold": None, "area": None, "side": 560, "window": (224, 112)}),
        ("ade150", "resclip", {"scale": 40.0, "threshold": None, "area": None, "side": 336, "window": (224, 112)}),
    ],
)
def test_values_are_those_of_the_papers_code(name, method, expected):
    setup = load_protocol(name).setup(method)
    assert setup.options["logit_scale"] == expected["scale"]
    assert (setup.threshold, setup.area_threshold) == (expected["threshold"], expected["area"])
    assert (setup.input.short_side, (setup.input.window, setup.input.stride)) == (expected["side"], expected["window"])
    assert setup.input.interpolation == "opencv-bilinear"


def test_the_words_are_those_of_each_code():
    voc = load_protocol("voc21")
    assert sum(len(label.words) for label in voc.setup("sclip").labels) == 56
    assert voc.setup("clearclip").labels[0].words == ("background",)
    assert load_protocol("ade150").setup("resclip").options["preset"] == "ade20k"


def test_the_words_may_be_the_datas_own():
    protocol = load_protocol("context459")
    setup = protocol.setup("sclip")
    for ask in (lambda: protocol.classes, setup.vocabulary, lambda: load_protocol("context459").classes):
        with pytest.raises(ValueError, match=r"words of the data set .*for_data\(data\).*--data"):
            ask()
    assert "words of the data set" in setup.describe() and setup.input == protocol.default.input
    things = data(numbered(459), ignore=65535)
    filled = protocol.for_data(things)
    assert filled.classes == things.classes and filled.for_data(data(["cat"])) is filled
    assert filled.setup("sclip").vocabulary().queries == things.classes
    assert filled.record()["classes"] == list(things.classes)
    labels = np.array([[0, 255, 458, 65535]])
    for table in (align_labels(protocol, things), align_labels(filled, things)):
        np.testing.assert_array_equal(table(labels), labels)
        assert table.misnamed == ()
    with pytest.raises(ValueError, match=r"context459 has 459 classes .* somewhere has 2 \(cat, dog"):
        protocol.for_data(data(["cat", "dog"]))
    with pytest.raises(ValueError, match=r"context459 has 459 classes"):
        align_labels(protocol, data(["cat", "dog"]))
    with pytest.raises(ValueError, match="'thing 0' is given twice"):
        protocol.for_data(data([*numbered(458), "thing 0"]))
    voc = load_protocol("voc21")
    assert voc.for_data(data(["cat"])) is voc  # has its own


def test_a_line_of_ade20ks_list_has_a_word_for_each_name():
    protocol = load_protocol("ade847")
    labels = protocol.setup("naclip").labels
    assert len(labels) == 847 and (labels[1].name, labels[1].words) == ("building, edifice", ("building", "edifice"))
    assert labels[0].words == ("wall",) and protocol.classes == tuple(label.name for label in labels)
    assert all(word == word.strip() and "," not in word for label in labels for word in label.words)
    published = align_labels(protocol, data(class_names(get_layout("ade847")), ignore=65535))
    assert published.misnamed == () and published.ignore_index == 65535
    short = align_labels(protocol, data([label.words[-1] for label in labels], ignore=65535))
    assert short.misnamed == ()
    with pytest.raises(ValueError, match="other names"):
        align_labels(protocol, data(numbered(847)))


@pytest.mark.parametrize("name", ["context459", "ade847"])
def test_large_vocabularies_have_the_common_input_where_no_source_says_more(name):
    protocol = load_protocol(name)
    common = load_protocol("ade150").default.input
    for method in BUILT_IN_METHODS:
        setup = protocol.setup(method)
        assert (setup.background, setup.threshold, setup.arm_threshold, setup.area_threshold) == (None,) * 4
        if method != "proxyclip":
            assert setup.input == common and any("common input" in note for note in setup.notes), method
    assert protocol.setup("sclip").arm_options == load_protocol("ade150").setup("sclip").arm_options
    proxyclip = protocol.setup("proxyclip").input
    assert (proxyclip.short_side, proxyclip.window, proxyclip.stride) == (448, 336, 112)


def test_cliper_has_other_values_for_each_backbone():
    protocol = load_protocol("voc21")
    small, large = protocol.setup("cliper", "B/16"), protocol.setup("cliper", "L/14")
    assert (small.options["select_stream"], large.options["select_stream"]) == (-1, -2)
    assert (small.options["background_threshold"], large.options["background_threshold"]) == (0.6, 0.4)
    assert (small.input.interpolation, small.input.rounding, small.input.window) == ("pil-bicubic", "patch", None)
    stuff = load_protocol("coco_stuff171")
    assert (stuff.setup("cliper", "B/16").templates, stuff.setup("cliper", "L/14").templates) == (
        "cliper15",
        "imagenet80",
    )
    # Without a background class the code still has a background word, and what it takes counts as wrong.
    assert stuff.setup("cliper").background_words == ("background",) and stuff.setup("cliper").offset == 1
    with pytest.raises(ValueError, match="B/16, L/14"):
        protocol.setup("cliper", "H/14")


def mean(method, sets, source, backbone="B/16", arm=False, pamr=False):
    values = [
        entry["miou"]
        for name in sets
        for entry in load_protocol(name).published_for(method, arm, backbone, pamr)
        if entry["source"] == source
    ]
    assert len(values) == len(sets)
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("method", "arm", "backbone", "source", "sets", "printed"),
    [
        ("sclip", True, "B/16", "ARM paper, Table 2", "context60 context59 voc20 ade150 voc21", 53.7),
        ("cliper", True, "B/16", "ARM paper, Table 2", "context60 context59 voc20 ade150 voc21", 55.0),
        ("sclip", True, "L/14", "ARM paper, Table 2", "context60 context59 voc20 ade150 voc21", 52.6),
        ("cliper", True, "L/14", "ARM paper, Table 2", "context60 context59 voc20 ade150 voc21", 55.9),
        ("sclip", False, "B/16", "ResCLIP paper, Table 1", "voc20 context59 coco_stuff171 cityscapes19 ade150", 37.1),
        (
            "clearclip",
            False,
            "B/16",
            "ResCLIP paper, Table 1",
            "voc20 context59 coco_stuff171 cityscapes19 ade150",
            37.5,
        ),
        ("naclip", False, "B/16", "ResCLIP paper, Table 1", "voc20 context59 coco_stuff171 cityscapes19 ade150", 38.2),
        ("resclip", False, "B/16", "ResCLIP paper, Table 1", "voc20 context59 coco_stuff171 cityscapes19 ade150", 40.3),
        ("resclip", False, "L/14", "ResCLIP paper, Table 1", "voc20 context59 coco_stuff171 cityscapes19 ade150", 39.1),
        ("maskclip", False, "B/16", "ResCLIP paper, Table 2", "voc21 context60 coco_object", 27.7),
        ("resclip", False, "B/16", "ResCLIP paper, Table 2", "voc21 context60 coco_object", 43.2),
        (
            "cra_dsi",
            False,
            "B/16",
            "CLIPSeg (CRA+DSI) paper, Table 2",
            "voc20 ade150 cityscapes19 context59 coco_stuff171",
            40.7,
        ),
        (
            "cliptrase",
            False,
            "B/16",
            "CLIPSeg (CRA+DSI) paper, Table 2",
            "voc20 ade150 cityscapes19 context59 coco_stuff171",
            35.1,
        ),
    ],
)
def test_published_numbers_have_the_average_that_their_table_prints(method, arm, backbone, source, sets, printed):
    assert mean(method, sets.split(), source, backbone, arm) == pytest.approx(printed, abs=0.0501)


@pytest.mark.parametrize(("method", "printed"), [("gem", 29.2), ("cliptrase", 28.5), ("cra_dsi", 33.1)])
def test_numbers_with_pamr_have_the_average_that_their_table_prints(method, printed):
    sets = set(list_protocols()) - {"coco_stuff10k", "voc21"}
    assert len(sets) == 9 and mean(method, sets, "CLIPSeg (CRA+DSI) paper, Table 1", pamr=True) == pytest.approx(
        printed, abs=0.0501
    )


def test_unknown_protocols_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'voc21'"):
        load_protocol("voc12")


def test_the_common_input_is_the_same_for_all():
    protocol = load_protocol("voc21")
    rules = {protocol.setup(method, common_input=True).input for method in BUILT_IN_METHODS}
    assert len(rules) == 1
    setups = [protocol.setup(method, common_input=True).record() for method in BUILT_IN_METHODS]
    assert {setup["options"]["position_rule"] for setup in setups} == {"reference"}
    own, common = (protocol.setup("cliper", common_input=common) for common in (False, True))
    assert dict(common.options) == {**own.options, "position_rule": "reference"}
    assert [note.partition(":")[0] for note in common.notes[-2:]] == ["input", "position table"]


def test_labels_are_kept_where_the_classes_are_the_protocols():
    table = align_labels(load_protocol("voc21"), data(names("voc21"), background=0))
    labels = np.array([[0, 20, 255]])
    np.testing.assert_array_equal(table(labels), labels)


def test_the_background_is_ignored_in_protocols_without_one():
    table = align_labels(load_protocol("voc20"), data(names("voc21"), background=0, ignore=254))
    np.testing.assert_array_equal(table(np.array([[0, 1, 20, 254]])), [[255, 0, 19, 255]])


def test_coco_object_is_made_of_coco_stuff():
    table = align_labels(load_protocol("coco_object"), data(names("coco_stuff171")))
    np.testing.assert_array_equal(table(np.array([[0, 79, 80, 170, 255]])), [[1, 80, 0, 0, 0]])


def test_other_classes_or_another_order_are_an_error():
    protocol = load_protocol("voc21")
    with pytest.raises(ValueError, match=r"has 21 classes .* has 3 .*plain"):
        align_labels(protocol, data(["cat", "dog", "sky"]))
    turned = [names("voc21")[0], *reversed(names("voc21")[1:])]
    with pytest.raises(ValueError, match=r"20 of 21 classes .*--trust-order"):
        align_labels(protocol, data(turned, background=0))
    table = align_labels(protocol, data(turned, background=0), trust_order=True)
    assert len(table.misnamed) == 20 and "tvmonitor / aeroplane" in table.misnamed
    with pytest.raises(ValueError, match="classes"):  # VOC20 from 21 classes whose background is elsewhere
        align_labels(load_protocol("voc20"), data(names("voc21"), background=3))


def test_a_plain_protocol_takes_the_data_sets_classes():
    protocol = plain_protocol(
        "farm", ["cow", "grass"], labels=[Label("cow", ("cow", "calf")), Label("grass", ("grass",))]
    )
    setup = protocol.setup("sclip")
    assert setup.vocabulary().queries == ("cow", "calf", "grass")
    assert setup.input.interpolation == "processor" and setup.threshold is None
    assert plain_protocol("farm", ["void", "cow"], background=0).setup("sclip").vocabulary().background_index == 0
    with pytest.raises(ValueError, match="1 labels were given for the 2 classes"):
        plain_protocol("farm", ["cow", "grass"], labels=[Label("cow", ("cow",))])


def test_the_listing_prints_names_and_whole_protocols():
    run = CliRunner().invoke(app, ["protocols"])
    assert run.exit_code == 0 and [line.split()[0] for line in run.output.splitlines()] == list_protocols()
    record = json.loads(CliRunner().invoke(app, ["protocols", "voc21", "--backbone", "L/14"]).output)
    assert record["methods"]["cliper"]["options"]["score_threshold"] == 0.5
    assert record["methods"]["sclip"]["label_words"]["boat"] == ["ship"]
    assert CliRunner().invoke(app, ["protocols", "voc"]).exit_code == 2
    large = json.loads(CliRunner().invoke(app, ["protocols", "context459"]).output)
    assert (large["num_classes"], large["classes"]) == (459, "those of the data set")
    assert large["methods"]["clearclip"]["label_words"] == "those of the data set"
    assert {(entry["backbone"], entry["miou"]) for entry in large["published"] if entry["arm"]} == {
        ("B/16", 9.6),
        ("L/14", 10.6),
    }


@pytest.mark.parametrize(
    ("size", "short", "long", "rounding", "patch", "expected"),
    [
        ((375, 500), 336, 2048, "pixel", 16, (336, 448)),
        ((500, 333), 336, 2048, "pixel", 16, (505, 336)),  # 504.5045 rounds half up
        ((100, 1000), 336, 2048, "pixel", 16, (205, 2048)),  # the longer side is the limit
        ((500, 333), 336, None, "patch", 16, (512, 336)),
        ((333, 500), 336, None, "patch", 14, (336, 504)),
    ],
)
def test_sizes_are_rounded_as_in_the_code(size, short, long, rounding, patch, expected):
    assert target_size(size, short, long, rounding, patch) == expected


def test_impossible_sizes_are_an_error():
    with pytest.raises(ValueError, match="rounding"):
        target_size((10, 10), 5, None, "floor", 16)
    with pytest.raises(ValueError, match="in order"):
        target_size((10, 10), 50, 20, "pixel", 16)
    with pytest.raises(ValueError, match="interpolation"):
        resize(Image.new("RGB", (4, 4)), (2, 2), "nearest")


@pytest.mark.parametrize("target", [(336, 448), (37, 200), (151, 60), (75, 50), (300, 200), (1, 7)])
@pytest.mark.parametrize("source", [(150, 100), (33, 57), (1, 5)])
def test_bilinear_resizing_is_opencvs_bit_by_bit(source, target):
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    expected = cv2.resize(pixels, target[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(opencv_bilinear(pixels, target), expected)


def test_pixels_are_resized_then_normalised(photo, tiny_image_processor):
    given = {"long_side": None, "rounding": "pixel", "patch_size": 16}
    values = to_pixel_values(photo, tiny_image_processor, interpolation="pil-bicubic", short_side=60, **given)
    resized = np.asarray(photo.resize((80, 60), Image.Resampling.BICUBIC)) / 255
    mean, std = np.array(tiny_image_processor.image_mean), np.array(tiny_image_processor.image_std)
    np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), (resized - mean) / std, atol=1e-6)
    own = to_pixel_values(
        photo,
        tiny_image_processor,
        interpolation="processor",
        short_side=None,
        processor_size={"shortest_edge": 60},
        **given,
    )
    assert own.shape == values.shape and not np.array_equal(own.numpy(), values.numpy())
