"""Colours, indexed PNGs and overlays."""

import io
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from arm_hf.colors import BACKGROUND_COLOR, _as_seen, label_color, palette
from arm_hf.drawing import DrawingStyle, indexed_png, overlay, segments
from arm_hf.label_sets import list_label_sets, load_label_set


def blobs(width: int, height: int, classes: int) -> np.ndarray:
    """Vertical bands of all classes, as far as there are columns."""
    return np.broadcast_to(np.arange(width) * classes // width, (height, width)).astype(np.int32)


def names(count: int) -> dict[int, str]:
    return {index: f"label {index}" for index in range(count)}


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


class TestColors:
    def test_the_same_in_every_process(self, run_python):
        code = "from arm_hf.colors import label_color; print([label_color(n) for n in ('cat', 'Hund', 'sky', '猫')])"
        expected = str([label_color(name) for name in ("cat", "Hund", "sky", "猫")])
        for seed in ("1", "2"):
            assert run_python(code, env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}).strip() == expected

    def test_a_word_keeps_its_colour_between_vocabularies(self):
        assert palette({0: "cat", 1: "dog"})[1] == palette({5: "sky", 7: "dog"})[7] == label_color("dog")
        assert label_color("Dog") == label_color("dog")

    def test_background_is_dark_grey_and_nothing_else_is(self):
        colors = palette({0: "cat", 1: "background", 2: "dog"})
        assert colors[1] == BACKGROUND_COLOR == label_color("Background")
        assert all(max(color) - min(color) > 40 for index, color in colors.items() if index != 1)

    @pytest.mark.parametrize("name", list_label_sets())
    def test_distinct_within_a_label_set(self, name):
        colors = np.array(list(palette(dict(enumerate(label.name for label in load_label_set(name)))).values()))
        apart = np.abs(colors[:, None] - colors[None]).max(axis=-1) + 999 * np.eye(len(colors), dtype=int)
        assert apart.min() >= (30 if len(colors) < 25 else 8)

    def test_two_thousand_labels(self):
        assert len(set(palette(names(2000)).values())) > 1900


class TestSegments:
    def test_sorted_by_area_with_shares_that_add_up(self):
        semantic_map = np.array([[2, 2, 2, 0], [2, 2, 1, 0]])
        found = segments(semantic_map, {0: "cat", 1: "dog", 2: "sky", 3: "sea"})
        assert [(segment.label, segment.pixels) for segment in found] == [("sky", 5), ("cat", 2), ("dog", 1)]
        assert sum(segment.share for segment in found) == pytest.approx(1)
        assert found[0].color == label_color("sky")

    @pytest.mark.parametrize(
        ("semantic_map", "message"),
        [
            (np.zeros((2, 2)), "integers"),
            (np.zeros((0, 2), dtype=int), "non-empty"),
            (np.zeros((1, 2, 2), dtype=int), r"got shape \(1, 2, 2\)"),
            (np.array([[0, 7]]), "holds the index 7"),
            (np.array([[0, -1]]), "holds the index -1"),
        ],
    )
    def test_impossible_maps(self, semantic_map, message):
        for function in (segments, indexed_png):
            with pytest.raises(ValueError, match=message):
                function(semantic_map, {0: "cat", 1: "dog"})


class TestIndexedPng:
    @pytest.mark.parametrize(("classes", "mode"), [(1, "P"), (3, "P"), (256, "P"), (257, "I;16"), (2000, "I;16")])
    def test_the_file_gives_the_indices_back(self, classes, mode):
        semantic_map = blobs(classes * 2, 3, classes)
        buffer = io.BytesIO()
        indexed_png(semantic_map, names(classes)).save(buffer, "PNG")
        image = Image.open(buffer)
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image), semantic_map)

    def test_it_shows_in_the_palettes_colours(self):
        semantic_map = np.array([[0, 1, 2]])
        id2label = {0: "background", 1: "cat", 2: "sky"}
        shown = np.asarray(indexed_png(semantic_map, id2label).convert("RGB"))[0]
        assert [tuple(map(int, color)) for color in shown] == list(palette(id2label).values())


class TestOverlay:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 60))
    def test_any_size_and_number_of_classes(self, width, height, classes):
        picture = overlay(grey(width, height), blobs(width, height, classes), names(classes))
        bare = overlay(grey(width, height), blobs(width, height, classes), names(classes), legend=False)
        assert bare.width / width == bare.height / height >= 1  # enlarged by a whole factor, if at all
        assert max(bare.size) >= 640
        # The legend is added beside or below and covers nothing.
        assert picture.width >= bare.width and picture.height >= bare.height
        assert picture.crop((0, 0, *bare.size)).tobytes() == bare.tobytes()
        assert picture.width * picture.height > bare.width * bare.height

    @pytest.mark.parametrize("size", [(1, 1), (20, 4000), (4000, 20), (3000, 2000)])
    def test_extreme_sizes(self, size):
        picture = overlay(grey(*size), blobs(*size, 3), names(3))
        assert min(picture.size) >= 300

    def test_colours_lie_where_the_classes_are(self):
        id2label = {0: "cat", 1: "dog"}
        bare = overlay(grey(800, 600), blobs(800, 600, 2), id2label, alpha=1.0, names=False, legend=False)
        colors = palette(id2label)
        assert (bare.getpixel((100, 300)), bare.getpixel((700, 300))) == (colors[0], colors[1])
        assert bare.getpixel((400, 300)) == (255, 255, 255)  # the line between them
        untouched = overlay(grey(800, 600), blobs(800, 600, 2), id2label, alpha=0.0, names=False, legend=False)
        assert untouched.getpixel((100, 300)) == (128, 128, 128)

    def test_the_legend_shows_the_colour_of_every_class_up_to_its_limit(self):
        few = overlay(grey(900, 600), blobs(900, 600, 12), names(12))
        legend = np.asarray(few)[600:].reshape(-1, 3)
        shown = {tuple(map(int, color)) for color in np.unique(legend, axis=0)}
        assert set(palette(names(12)).values()) <= shown
        many = overlay(grey(900, 600), blobs(900, 600, 200), names(200))
        assert many.height < 1800

    def test_labels_of_any_script_and_length_fit(self):
        labels = {0: "猫と犬", 1: "Москва", 2: "naïve café", 3: "x" * 500, 4: "🦒", 5: "שלום"}
        picture = overlay(grey(640, 480), blobs(640, 480, 6), labels)
        assert picture.width == 640

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
    def test_photos_of_other_modes(self, mode):
        assert overlay(grey(64, 48).convert(mode), blobs(64, 48, 2), names(2)).mode == "RGB"

    def test_errors(self):
        with pytest.raises(ValueError, match="4 x 3 pixels but its label map 3 x 4"):
            overlay(grey(4, 3), np.zeros((4, 3), dtype=int), names(1))
        with pytest.raises(ValueError, match="alpha"):
            overlay(grey(4, 3), np.zeros((3, 4), dtype=int), names(1), alpha=55)


class TestStyles:
    @pytest.mark.parametrize("name", ["voc21", "cityscapes19"])
    def test_colorblind_colours_differ_for_every_kind_of_eye(self, name):
        id2label = dict(enumerate(label.name for label in load_label_set(name)))

        def least_difference(kind: str) -> float:
            seen = _as_seen(np.array(list(palette(id2label, kind).values())))  # (eyes, K, 3)
            apart = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1)
            return float((apart + 9 * np.eye(len(id2label))).min())

        # Side by side, a difference of 0.02 in OKLab can just be noticed.
        assert least_difference("colorblind") > 0.04 > 0.03 > least_difference("vivid")

    def test_a_word_keeps_its_colorblind_colour(self):
        one, other = palette({0: "cat", 1: "dog"}, "colorblind"), palette({3: "dog", 7: "cat"}, "colorblind")
        assert {one[0], one[1]} == {other[3], other[7]}
        assert palette({0: "cat"}, "colorblind") == {0: palette({4: "CAT"}, "colorblind")[4]}
        assert palette({0: "background"}, "colorblind") == {0: BACKGROUND_COLOR}

    def test_two_thousand_labels_in_time(self):
        started = time.monotonic()
        assert len(set(palette(names(1200), "colorblind").values())) > 1100
        assert time.monotonic() - started < 60

    def test_an_unknown_palette_is_named(self):
        for call in (lambda: palette({0: "a"}, "neon"), lambda: DrawingStyle("neon")):
            with pytest.raises(ValueError, match="'neon'; choose one of vivid, colorblind"):
                call()

    def test_contours_leave_the_inside_as_it_is(self):
        id2label = {0: "cat", 1: "dog"}
        drawn = overlay(grey(800, 600), blobs(800, 600, 2), id2label, names=False, legend=False, contours=True)
        colors = palette(id2label)
        assert drawn.getpixel((100, 300)) == drawn.getpixel((700, 300)) == (128, 128, 128)
        assert (drawn.getpixel((397, 300)), drawn.getpixel((403, 300))) == (colors[0], colors[1])
        assert drawn.getpixel((400, 300)) == (255, 255, 255)

    def test_the_palette_reaches_files_and_legends(self):
        semantic_map = np.array([[0, 1]])
        colors = palette({0: "cat", 1: "dog"}, "colorblind")
        shown = np.asarray(indexed_png(semantic_map, {0: "cat", 1: "dog"}, "colorblind").convert("RGB"))[0]
        assert [tuple(map(int, color)) for color in shown] == [colors[0], colors[1]]
        assert {s.id: s.color for s in segments(semantic_map, {0: "cat", 1: "dog"}, "colorblind")} == colors
