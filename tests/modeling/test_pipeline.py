"""The pipeline as users call it: kinds of input, batches, options, odd pictures, clear one-line errors."""

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.pipelines.pt_utils import KeyDataset

from arm_hf.modeling.decision import window_boxes
from arm_hf.modeling.pipeline_arm import CLIPerPipeline, OpenVocabSegmentationPipeline, SclipPipeline
from arm_hf.modeling.text import TextEncoder

LABELS = "cat, grass, sky=blue sky|clouds"
NAMES = {"cat", "grass", "sky"}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def same(a: dict, b: dict) -> bool:
    """Whether two semantic results agree but for rounding at ties."""
    return a["semantic_map"].shape == b["semantic_map"].shape and (a["semantic_map"] == b["semantic_map"]).mean() > 0.99


@pytest.fixture
def pipe(arm, make_pipe) -> OpenVocabSegmentationPipeline:
    return make_pipe(arm)


class TestInputs:
    def test_every_kind_of_image(self, pipe, photo, tmp_path):
        photo.save(tmp_path / "photo.png")
        expected = pipe(photo, candidate_labels=LABELS, semantic=True)
        assert expected["semantic_map"].shape == (120, 160)
        assert expected["semantic_map"].dtype == np.int32 and expected["confidence"].dtype == np.float32
        assert expected["id2label"] == {0: "cat", 1: "grass", 2: "sky"}
        for image in (
            str(tmp_path / "photo.png"),
            tmp_path / "photo.png",
            np.asarray(photo),
            {"image": photo},
            {"image": photo, "candidate_labels": LABELS},
        ):
            result = pipe(image, candidate_labels=LABELS, semantic=True)
            assert np.array_equal(result["semantic_map"], expected["semantic_map"]), type(image)

    def test_many_images(self, pipe, photo):
        others = [photo, picture(90, 70), picture(64, 64, seed=1)]
        expected = [pipe(image, candidate_labels=LABELS, semantic=True) for image in others]
        dataset = Dataset.from_dict({"image": others})
        for images in (
            others,
            tuple(others),
            (image for image in others),
            iter(others),
            KeyDataset(dataset, "image"),
            [{"image": image} for image in others],
        ):
            results = list(pipe(images, candidate_labels=LABELS, semantic=True))
            assert len(results) == 3
            assert all(same(a, b) for a, b in zip(results, expected, strict=True)), type(images)
        assert pipe([], candidate_labels=LABELS) == []
        assert len(pipe([photo], candidate_labels=LABELS)) == 1

    @pytest.mark.parametrize("batch_size", [2, 3, 8])
    def test_a_batch_of_mixed_sizes_equals_singles(self, pipe, batch_size):
        images = [picture(80, 64), picture(100, 64, 1), picture(80, 64, 2), picture(31, 200, 3), picture(80, 64, 4)]
        expected = [pipe(image, candidate_labels=LABELS, semantic=True) for image in images]
        results = pipe(images, candidate_labels=LABELS, semantic=True, batch_size=batch_size)
        assert all(same(a, b) for a, b in zip(results, expected, strict=True))

    def test_a_generator_is_read_lazily(self, pipe, photo):
        read = []

        def images():
            for index in range(100):
                read.append(index)
                yield photo

        results = pipe(images(), candidate_labels=LABELS)
        next(iter(results))
        assert len(read) < 10

    def test_labels_per_image(self, pipe, photo):
        items = [{"image": photo, "candidate_labels": labels} for labels in ("cat, dog", ["sea", "sand", "sky"], "x")]
        results = pipe(items, semantic=True, batch_size=3)
        assert [list(result["id2label"].values()) for result in results] == [
            ["cat", "dog"],
            ["sea", "sand", "sky"],
            ["x"],
        ]
        alone = pipe(photo, candidate_labels=["sea", "sand", "sky"], semantic=True)
        assert same(results[1], alone)

    @pytest.mark.parametrize("size", [(1, 1), (20, 4000), (4000, 20), (1, 300), (65, 63)])
    def test_odd_pictures(self, pipe, size):
        result = pipe(picture(*size), candidate_labels=LABELS, semantic=True)
        assert result["semantic_map"].shape == size[::-1]
        assert sum(segment["pixels"] for segment in result["segments"]) == size[0] * size[1]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
    def test_modes(self, pipe, mode, tmp_path):
        image = Image.new("I;16", (40, 30), 30000) if mode == "I;16" else picture(40, 30).convert(mode)
        assert pipe(image, candidate_labels=LABELS, semantic=True)["semantic_map"].shape == (30, 40)

    def test_a_truncated_file_is_one_line(self, pipe, photo, tmp_path):
        photo.save(tmp_path / "cut.jpg")
        content = (tmp_path / "cut.jpg").read_bytes()
        (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cut\.jpg") as caught:
            pipe(str(tmp_path / "cut.jpg"), candidate_labels=LABELS)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("images", [None, 5, "no-such-file.jpg", np.zeros((0, 4, 3), np.uint8)])
    def test_no_image(self, pipe, images):
        with pytest.raises((ValueError, TypeError), match="image") as caught:
            pipe(images, candidate_labels=LABELS)
        assert "\n" not in str(caught.value)


class TestLabels:
    def test_result_is_sorted_by_area_with_masks(self, pipe, photo):
        segments = pipe(photo, candidate_labels=LABELS, use_arm=False, method="clip")
        semantic = pipe(photo, candidate_labels=LABELS, use_arm=False, method="clip", semantic=True)
        assert {segment["label"] for segment in segments} <= NAMES
        areas = []
        for segment in segments:
            assert set(segment) == {"label", "score", "mask"}
            mask = np.asarray(segment["mask"])
            assert segment["mask"].mode == "L" and segment["mask"].size == photo.size
            assert set(np.unique(mask)) <= {0, 255}
            index = {name: index for index, name in semantic["id2label"].items()}[segment["label"]]
            chosen = semantic["semantic_map"] == index
            assert np.array_equal(mask == 255, chosen)
            assert segment["score"] == pytest.approx(semantic["confidence"][chosen].mean(), rel=1e-4)
            areas.append(chosen.sum())
        assert areas == sorted(areas, reverse=True)
        assert sum(areas) == photo.width * photo.height

    def test_synonyms_share_a_class(self, pipe, photo):
        result = pipe(photo, candidate_labels=LABELS, semantic=True, class_scores=True, use_arm=False)
        words = pipe(photo, candidate_labels="cat, grass, blue sky, clouds, sky", semantic=True, class_scores=True,
                     use_arm=False)["class_scores"]  # fmt: skip
        expected = np.stack([words[0], words[1], words[2:].max(axis=0)])
        np.testing.assert_allclose(result["class_scores"], expected, atol=1e-5)

    def test_one_label(self, pipe, photo):
        (segment,) = pipe(photo, candidate_labels="cat")
        assert segment["label"] == "cat" and np.asarray(segment["mask"]).min() == 255

    def test_two_thousand_labels(self, pipe):
        names = [f"thing {index}" for index in range(2000)]
        result = pipe(picture(40, 30), candidate_labels=names, templates=["{}"], semantic=True, size=32)
        assert len(result["id2label"]) == 2000
        assert result["semantic_map"].max() < 2000

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ("", "no labels"),
            ([], "empty"),
            ("cat, , dog", "empty"),
            ("cat, dog, Cat", "given twice"),
            (["cat", 3], "must be a string"),
            (None, "candidate_labels is missing"),
        ],
    )
    def test_impossible_labels(self, pipe, photo, labels, message):
        with pytest.raises(ValueError, match=message) as caught:
            pipe(photo, candidate_labels=labels)
        assert "\n" not in str(caught.value)

    def test_words_are_encoded_once(self, pipe, photo, monkeypatch):
        encoded = []
        encode = TextEncoder._encode
        monkeypatch.setattr(
            TextEncoder, "_encode", lambda self, words, t: encoded.extend(words) or encode(self, words, t)
        )
        for labels in (LABELS, LABELS, "cat, tree, sky"):
            pipe([photo, photo], candidate_labels=labels)
        assert encoded == ["cat", "grass", "sky", "blue sky", "clouds", "tree"]
        pipe(photo, candidate_labels="cat", templates=["a drawing of a {}"])
        assert encoded[-1] == "cat" and len(encoded) == 7

    def test_templates_change_the_result(self, pipe, photo):
        maps = [
            pipe(photo, candidate_labels=LABELS, semantic=True, templates=templates)["confidence"]
            for templates in ("single", ["{}"])
        ]
        assert not np.allclose(*maps)

    def test_long_labels_warn_and_work(self, pipe, photo):
        with pytest.warns(UserWarning, match="longer than this text tower's 77 tokens"):
            pipe(photo, candidate_labels=["word " * 40, "cat"])


class TestBackground:
    def test_threshold(self, pipe, photo):
        plain = pipe(photo, candidate_labels="cat, dog", semantic=True, use_arm=False)
        result = pipe(photo, candidate_labels="cat, dog", semantic=True, use_arm=False, background=0.999)
        assert result["id2label"] == {0: "background", 1: "cat", 2: "dog"}
        unsure = plain["confidence"] < 0.999
        assert unsure.any()
        assert np.array_equal(result["semantic_map"], np.where(unsure, 0, plain["semantic_map"] + 1))

    def test_words(self, pipe, photo):
        result = pipe(photo, candidate_labels="cat, dog", semantic=True, background="sky|wall", use_arm=False)
        expected = pipe(photo, candidate_labels="background:=sky|wall, cat, dog", semantic=True, use_arm=False)
        assert np.array_equal(result["semantic_map"], expected["semantic_map"])
        assert result["id2label"][0] == "background"

    def test_the_models_default_and_how_to_switch_it_off(self, make_arm, make_pipe, photo):
        pipe = make_pipe(make_arm(background={"threshold": 0.3}))
        assert pipe(photo, candidate_labels="cat", semantic=True)["id2label"] == {0: "background", 1: "cat"}
        assert pipe(photo, candidate_labels="cat", semantic=True, background="none")["id2label"] == {0: "cat"}

    def test_impossible(self, pipe, photo):
        with pytest.raises(ValueError, match="between 0 and 1"):
            pipe(photo, candidate_labels="cat", background=1.5)


class TestOptions:
    def test_method_changes_the_result_and_calls_do_not_stick(self, pipe, photo):
        first = pipe(photo, candidate_labels=LABELS, semantic=True)["confidence"]
        other = pipe(photo, candidate_labels=LABELS, semantic=True, method="clip", use_arm=False)["confidence"]
        assert not np.allclose(first, other)
        again = pipe(photo, candidate_labels=LABELS, semantic=True)["confidence"]
        assert np.array_equal(first, again)

    def test_the_configs_method_and_its_options_are_the_default(self, make_arm, make_pipe, photo):
        pipe = make_pipe(make_arm(method="naclip", method_options={"gaussian_std": 1.0}))
        expected = pipe(photo, candidate_labels=LABELS, semantic=True, method="naclip",
                        method_options={"gaussian_std": 1.0})  # fmt: skip
        assert np.array_equal(pipe(photo, candidate_labels=LABELS, semantic=True)["confidence"], expected["confidence"])
        without = pipe(photo, candidate_labels=LABELS, semantic=True, method="naclip")
        assert not np.array_equal(without["confidence"], expected["confidence"])
        # An option alone changes that setting of the config's method.
        changed = pipe(photo, candidate_labels=LABELS, semantic=True, method_options={"attention": "kk"})
        assert not np.array_equal(changed["confidence"], expected["confidence"])

    @pytest.mark.parametrize("model", ["arm", "clip"])
    def test_equals_the_model_called_by_hand(self, arm, tiny_clip, make_pipe, photo, model, tiny_image_processor):
        pipe = make_pipe(arm if model == "arm" else tiny_clip)
        result = pipe(photo, candidate_labels=LABELS, semantic=True, method="sclip", class_scores=True)
        pixels = tiny_image_processor(images=photo, return_tensors="pt").pixel_values
        from arm_hf.modeling.dense_clip import DenseCLIP

        words = pipe.text_encoder.class_embeddings(["cat", "grass", "sky", "blue sky", "clouds"], "single")
        segment = arm.segment if model == "arm" else DenseCLIP(tiny_clip).segment
        (decision,) = segment(
            pixels, words, method="sclip", class_of_query=[0, 1, 2, 2, 2], sizes=[(120, 160)], return_class_scores=True
        )
        np.testing.assert_allclose(result["class_scores"], decision.class_scores.numpy(), atol=1e-6)
        assert np.array_equal(result["semantic_map"], decision.labels.numpy())

    def test_window(self, pipe, photo):
        whole = pipe(photo, candidate_labels=LABELS, semantic=True)
        assert len(window_boxes((64, 85), 48, 24)) == 6
        windowed = pipe(photo, candidate_labels=LABELS, semantic=True, window=48, stride=24, window_batch_size=2)
        assert not np.allclose(whole["confidence"], windowed["confidence"])
        large = pipe(photo, candidate_labels=LABELS, semantic=True, window=500)
        np.testing.assert_allclose(whole["confidence"], large["confidence"], atol=1e-5)

    def test_size(self, pipe, photo, monkeypatch):
        seen = []
        segment = pipe.model.segment

        def record(pixels, *args, **kwargs):
            seen.append(tuple(pixels.shape[-2:]))
            return segment(pixels, *args, **kwargs)

        monkeypatch.setattr(pipe.model, "segment", record)
        for size in (None, 32, {"height": 48, "width": 80}, {"shortest_edge": 40}):
            pipe(photo, candidate_labels=LABELS, size=size)
        assert seen[0] == (64, 85) and seen[1] in [(32, 42), (32, 43)]
        assert seen[2] == (48, 80) and seen[3][0] == 40

    def test_the_longer_side_is_bounded(self, pipe, monkeypatch):
        seen = []
        segment = pipe.model.segment

        def record(pixels, *args, **kwargs):
            seen.append(tuple(pixels.shape[-2:]))
            return segment(pixels, *args, **kwargs)

        monkeypatch.setattr(pipe.model, "segment", record)
        pipe(picture(4000, 20), candidate_labels=LABELS)
        assert seen == [(10, 2048)]

    def test_a_cropping_processor_gets_the_literatures_size(self, arm, tiny_tokenizer, photo):
        pipe = OpenVocabSegmentationPipeline(
            model=arm, tokenizer=tiny_tokenizer, image_processor=CLIPImageProcessor(), templates="single"
        )
        seen = []
        segment = arm.segment
        arm.segment = lambda pixels, *a, **k: seen.append(tuple(pixels.shape[-2:])) or segment(pixels, *a, **k)
        pipe(photo, candidate_labels="cat, dog")
        assert seen == [(336, 448)]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"metod": "clip"}, TypeError, "unknown argument metod; allowed are .*method"),
            ({"method": "clipp"}, ValueError, "unknown method 'clipp'"),
            ({"method": "clip", "method_options": {"std": 1}}, TypeError, "has no setting std"),
            ({"templates": "eighty"}, ValueError, "eighty"),
            ({"window": 0}, ValueError, "window must be at least 1"),
            ({"stride": 4}, ValueError, "no effect without window"),
            ({"window": 8, "stride": 9}, ValueError, "between 1 and window"),
            ({"window": 8, "window_batch_size": 0}, ValueError, "window_batch_size must be at least 1"),
            ({"size": 0}, ValueError, "size must be at least 1"),
        ],
    )
    def test_impossible_options(self, pipe, photo, options, error, message):
        with pytest.raises(error, match=message) as caught:
            pipe(photo, candidate_labels=LABELS, **options)
        assert "\n" not in str(caught.value)

    def test_options_given_when_it_is_built(self, arm, make_pipe, photo):
        pipe = make_pipe(arm, candidate_labels=LABELS, semantic=True, method="sclip")
        expected = make_pipe(arm)(photo, candidate_labels=LABELS, semantic=True, method="sclip")
        assert np.array_equal(pipe(photo)["semantic_map"], expected["semantic_map"])

    def test_plain_clip_has_no_arm(self, tiny_clip, make_pipe, photo):
        pipe = make_pipe(tiny_clip)
        assert {segment["label"] for segment in pipe(photo, candidate_labels=LABELS)} <= NAMES
        with pytest.raises(ValueError, match="use_arm=True, but this model is a CLIPModel without ARM"):
            pipe(photo, candidate_labels=LABELS, use_arm=True)

    @pytest.mark.parametrize(("pipeline_class", "method"), [(SclipPipeline, "sclip"), (CLIPerPipeline, "cliper")])
    def test_named_baselines(self, arm, tiny_clip, make_pipe, photo, pipeline_class, method):
        expected = make_pipe(tiny_clip)(photo, candidate_labels=LABELS, semantic=True, method=method)
        for model in (tiny_clip, arm):
            result = make_pipe(model, pipeline_class)(photo, candidate_labels=LABELS, semantic=True)
            np.testing.assert_allclose(result["confidence"], expected["confidence"], atol=1e-6)
        refined = make_pipe(arm, pipeline_class)(photo, candidate_labels=LABELS, semantic=True, use_arm=True)
        assert not np.allclose(refined["confidence"], expected["confidence"])

    def test_parts_that_are_missing(self, arm, tiny_tokenizer, tiny_image_processor):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            OpenVocabSegmentationPipeline(model=arm, image_processor=tiny_image_processor)
        with pytest.raises(ValueError, match="image_processor"):
            OpenVocabSegmentationPipeline(model=arm, tokenizer=tiny_tokenizer)

    def test_bfloat16(self, arm, make_pipe, photo):
        result = make_pipe(arm.to(torch.bfloat16))(photo, candidate_labels=LABELS, semantic=True, class_scores=True)
        assert result["confidence"].dtype == np.float32
        assert np.isfinite(result["class_scores"]).all()

    def test_no_warnings_in_ordinary_use(self, pipe, photo):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe([photo, photo], candidate_labels=LABELS, batch_size=2)
