"""The parts that train the embedded model: losses against a plain loop, exact resuming, tokenizer, counts."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

pytest.importorskip("cv2")

from arm_hf.modeling.trunk import VisionTower
from arm_hf.training.mini.crops import CropOptions, draw_batch, random_view
from arm_hf.training.mini.data import IGNORE, BalancedSampler, load_photos
from arm_hf.training.mini.evaluate import Confusion, Task, border_mask, task_truth
from arm_hf.training.mini.fair_base import TagStage, tag_loss, view_tags
from arm_hf.training.mini.recipe import average_states
from arm_hf.training.mini.targets import (
    ConceptWords,
    Regions,
    all_concepts,
    build_rules,
    dense_and_image_loss,
    words_nll,
)
from arm_hf.training.mini.text_student import TextStage, build_student, retrieval_accuracy, train_student
from arm_hf.training.mini.tokenizer import save_tokenizer, train_tokenizer, word_weights
from arm_hf.training.mini.train_vision import DensePath, VisionStage, position_rows, sample_patches, train_vision
from arm_hf.training.mini.vision_tower import PATCH, WIDTH, build_clip_vision, quiet_direction, raw_embeddings
from arm_hf.training.mini.vocabulary import concept_of, concept_words, readable

CLASSES = {
    "voc2012": ["background", "aeroplane", "dog", "diningtable"],
    "msrc": ["grass", "sky", "cow"],
    "coco_stuff171": ["person", "dog", "cow", "airplane", "grass", "sky-other", "table", "wall-brick"],
}
DIM = 16


def unit_vectors(count, seed=0):
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def concept_table(classes=CLASSES):
    concepts = all_concepts(classes)
    words = sorted({word for concept in concepts for word in concept_words(concept)})
    return ConceptWords(concepts, dict(zip(words, unit_vectors(len(words)), strict=True)))


@pytest.fixture(scope="module")
def rules():
    main = concept_table().main()
    return build_rules(CLASSES, CLASSES["coco_stuff171"], main @ main.T)


@pytest.fixture
def data_folder(tmp_path):
    """Two sets of four tiny photos: coloured squares on a plain ground."""
    rng = np.random.default_rng(0)
    for name in ("voc2012", "msrc"):
        for part in ("images", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "classes.json").write_text(json.dumps({"classes": CLASSES[name]}))
        for i in range(4):
            label = np.zeros((48, 64), np.uint8)
            label[10:30, 12 : 30 + i] = 1 + i % (len(CLASSES[name]) - 1)
            label[:2] = IGNORE
            image = rng.integers(0, 255, (8, 3))[label % 8].astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name / "images" / f"{i}.jpg")
            Image.fromarray(label).save(tmp_path / name / "labels" / f"{i}.png")
        (tmp_path / name / "train.txt").write_text("\n".join(map(str, range(4))))
    return tmp_path


def tiny_tower(seed=0):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
        projection_dim=DIM,
    )
    return CLIPVisionModelWithProjection(config).eval()


def test_readable_names():
    assert readable("floor-marble") == "marble floor"
    assert readable("sky-other") == "sky"
    assert readable("pottedplant") == "potted plant"
    assert concept_of("voc2012_extra", "sofa") == "couch"
    assert concept_words("any table")[0] == "table"


def test_rules_keep_permitted_inside_allowed(rules):
    assert bool((rules.allowed | ~rules.permitted).all())
    assert bool(rules.permitted.any(-1).all())
    background = rules.first_rule["voc2012"]
    dog = rules.concepts.index("dog")
    assert not rules.permitted[:, background, dog].any(), "an object of the set is never background"
    assert rules.allowed[:, background, dog].all()
    closed, opened = rules.allowed[:, rules.first_rule["msrc"] + 2]
    assert bool((opened | ~closed).all())


def test_clashing_words_are_not_wrong_answers(rules):
    grass = rules.first_rule["voc2012"] + 2  # dog: grass is wrong, cow far away is wrong in the open form
    assert rules.allowed[0, grass, rules.concepts.index("grass")]
    road_like = build_rules(
        {"msrc": ["water"], "coco_stuff171": ["sea", "dog"]}, ["sea", "dog"], torch.eye(40)[:29, :29]
    )
    row = road_like.first_rule["msrc"]
    assert not road_like.allowed[1, row, road_like.concepts.index("sea")]
    assert road_like.allowed[1, row, road_like.concepts.index("dog")]


def test_words_nll_is_minus_log_probability():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    permitted = torch.zeros(5, 7, dtype=torch.bool)
    permitted[torch.arange(5), torch.arange(5)] = True
    expected = F.cross_entropy(logits, torch.arange(5), reduction="none")
    torch.testing.assert_close(words_nll(logits, permitted, torch.ones_like(permitted)), expected)


def test_words_nll_by_the_best_word_is_the_decision_of_a_label_of_many_words():
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0]]).expand(2, -1)
    permitted = torch.tensor([[True, True, False, False]]).expand(2, -1)
    allowed = torch.tensor([[True, True, True, False]]).expand(2, -1)
    summed, best = words_nll(logits, permitted, allowed, torch.tensor([False, True])).tolist()
    e = math.exp
    assert summed == pytest.approx(-math.log((e(2) + e(1.5)) / (e(2) + e(1.5) + e(1))))
    assert best == pytest.approx(-math.log(e(2) / (e(2) + e(1))))  # the second word is neither right nor wrong


def test_tags_say_which_classes_are_shown_and_nothing_else(rules):
    table = rules
    start = table.first_rule["voc2012"]
    labels = torch.full((1, 20, 20), 255)
    labels[0, 5:15] = 0  # background
    labels[0, :5, :5] = 1
    labels[0, 16, 10] = 2  # below the least share
    view, rule = view_tags(labels, torch.tensor([start]), table, 0.005)
    assert view.tolist() == [0]
    assert rule.tolist() == [start + 1]
    shuffled = labels.flatten()[torch.randperm(400, generator=torch.Generator().manual_seed(0))].view(1, 20, 20)
    assert view_tags(shuffled, torch.tensor([start]), table, 0.005)[1].tolist() == rule.tolist()


def test_tag_loss_does_not_depend_on_where_a_class_is(rules):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 9, 16, generator=generator)
    words = F.normalize(torch.randn(len(rules.concepts), 16, generator=generator), dim=-1)
    rule = rules.is_object.nonzero()[0]
    view = torch.zeros(1, dtype=torch.long)
    losses = [
        tag_loss(dense[:, order], view, rule, rules, words, torch.tensor(10.0)).item()
        for order in (torch.arange(9), torch.randperm(9, generator=generator))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pulled = torch.cat([dense[:, :8], 5 * words[rules.main_concept[rule]][None]], dim=1)
    assert tag_loss(pulled, view, rule, rules, words, torch.tensor(10.0)).item() < losses[0]


def test_tag_loss_of_cls_reads_the_vector_of_the_view(rules):
    words = F.normalize(torch.randn(len(rules.concepts), 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    rule = rules.is_object.nonzero()[0]
    view, right = torch.zeros(1, dtype=torch.long), words[rules.main_concept[rule]][None]
    losses = [tag_loss(x, view, rule, rules, words, torch.tensor(10.0)).item() for x in (right, -right)]
    assert losses[0] < 1 < losses[1]


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling must be one of patches, cls, both, got 'max'"):
        TagStage(pooling="max")


def test_weighted_mean_of_stages():
    saved = [{"tower": {"w": torch.full((2,), float(i))}, "logit_scale": float(i)} for i in (0, 1, 2)]
    assert average_states(saved)["tower"]["w"].tolist() == [1.0, 1.0]
    mean = average_states(saved, [0.25, 0.25, 0.5])
    assert mean["tower"]["w"].tolist() == [1.25, 1.25]
    assert mean["logit_scale"] == 1.25


def test_vectorised_loss_equals_a_plain_loop(rules):
    generator = torch.Generator().manual_seed(1)
    count, views = 60, 3
    features = torch.randn(count, DIM, generator=generator)
    cls = torch.randn(views, DIM, generator=generator)
    image_of = torch.randint(views, (count,), generator=generator)
    rule_of = torch.randint(len(rules.is_object), (count,), generator=generator)
    form = torch.tensor([0, 1, 1])
    words, extra = concept_table().main(), unit_vectors(4, seed=9)
    scale, samples = torch.tensor(12.0), 40
    parts = dense_and_image_loss(features, cls, image_of, rule_of, form, rules, words, extra, scale, samples)

    def nll(vector, right, wrong):
        everything = torch.cat([words, extra])
        scores = scale * everything @ F.normalize(vector, dim=0)
        return scores[list(right | wrong)].logsumexp(0) - scores[list(right)].logsumexp(0)

    patch = region = image = torch.zeros(())
    patch_weight = region_weight = image_weight = 0.0
    extras = set(range(len(words), len(words) + 4))
    for view in range(views):
        shown = {}
        for rule in range(len(rules.is_object)):
            members = features[(image_of == view) & (rule_of == rule)]
            if not len(members):
                continue
            f = int(form[view])
            right = set(rules.permitted[f, rule].nonzero().flatten().tolist())
            wrong = set(rules.allowed[f, rule].nonzero().flatten().tolist()) | (extras if f else set())
            for member in members:
                patch = patch + nll(member, right, wrong) * len(members) ** -0.5
                patch_weight += len(members) ** -0.5
            region = region + nll(F.normalize(members, dim=1).mean(0), right, wrong) * len(members) ** 0.25
            region_weight += len(members) ** 0.25
            if rules.is_object[rule] and len(members) >= 0.015 * samples:
                shown[rule] = len(members)
        present = {int(rules.main_concept[rule]) for rule in shown}
        for rule, area in shown.items():
            right = set(rules.permitted[1, rule].nonzero().flatten().tolist())
            wrong = set(rules.allowed[1, rule].nonzero().flatten().tolist()) | extras
            image = image + nll(cls[view], right, wrong - present) * area**0.5
            image_weight += area**0.5
    torch.testing.assert_close(parts.patch, patch / patch_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.region, region / region_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.image, image / image_weight, rtol=1e-4, atol=1e-5)


def test_region_means():
    regions = Regions.group(torch.tensor([0, 0, 1, 0]), torch.tensor([2, 2, 2, 1]), 5)
    means = regions.mean(torch.tensor([[1.0], [3.0], [5.0], [7.0]]))
    assert dict(
        zip(zip(regions.image.tolist(), regions.rule.tolist(), strict=True), means[:, 0].tolist(), strict=True)
    ) == {
        (0, 1): 7.0,
        (0, 2): 2.0,
        (1, 2): 5.0,
    }


def test_same_seed_same_views(data_folder):
    photos = load_photos(data_folder, ["voc2012", "msrc"], "train", None)
    sampler = BalancedSampler(photos, {"voc2012": 0.5, "msrc": 0.5}, skip={("voc2012", 0)})
    options = CropOptions(size=56)
    first, second = (draw_batch(photos, sampler, options, 3, 14, seed=5) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    assert first.pixels.shape == (3, 3, 56, 56) and first.labels.shape == (3, 16, 16)
    assert not torch.equal(first.pixels, draw_batch(photos, sampler, options, 3, 14, seed=6).pixels)


def test_views_keep_photo_and_labels_together(data_folder):
    photo = load_photos(data_folder, ["msrc"], "train", None)[0]
    photo.image = np.repeat((photo.label == 1)[..., None] * 255, 3, axis=2).astype(np.uint8)
    options = CropOptions(size=56, colour=0, grey=0, max_zoom=1, subpixels=14)
    for seed in range(5):
        image, label = random_view(photo, 1, options, 14, np.random.default_rng(seed))
        agrees = (image[..., 0] > 0.5) == (label == 1)
        assert agrees[label != IGNORE].mean() > 0.97


def test_sampled_labels_come_from_their_patch():
    labels = torch.arange(16).reshape(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    index, chosen = sample_patches(labels, 56, 14, 0.5, torch.Generator().manual_seed(0))
    assert index.shape == (1, 8) and torch.equal(index, chosen)


@pytest.mark.parametrize("grid", [4, 5, 7])
def test_dense_path_equals_the_products_clearclip(grid):
    from arm_hf.modeling.dense_clip import DenseCLIP

    tower = tiny_tower()
    tower.logit_scale = torch.nn.Parameter(torch.zeros(()))
    pixels = torch.randn(2, 3, 14 * grid, 14 * grid, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = position_rows(tower.vision_model.embeddings.position_embedding.weight, grid)
        torch.testing.assert_close(rows, VisionTower(tower).position_table((grid, grid)))
        path = DensePath(tower, 1)
        dense, cls = path.upper(path.lower(pixels))
        if grid == 4:
            torch.testing.assert_close(cls, tower(pixels).image_embeds, atol=1e-5, rtol=1e-4)
        expected = DenseCLIP(tower).features(pixels, "clearclip").patch_features.flatten(1, 2)
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)


def test_vision_training_resumes_exactly(data_folder, tmp_path):
    classes = {name: CLASSES[name] for name in ("voc2012", "msrc")}
    words = concept_table(classes)
    table = build_rules(classes, [], words.main() @ words.main().T)
    photos = load_photos(data_folder, list(classes), "train", None)
    sampler = BalancedSampler(photos, {"voc2012": 0.5, "msrc": 0.5}, skip={("voc2012", 0)})
    stage = VisionStage(steps=2, batch_size=2, size=56, frozen_blocks=1, warmup=1, negatives=3, save_every=1)

    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        return train_vision(
            tiny_tower(), 2.6, photos, sampler, table, words, unit_vectors(9, 3), stage, folder, stop_after
        )

    whole, scale = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=1)
    parts, other_scale = run(tmp_path / "parts")
    assert scale == other_scale
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    frozen = "vision_model.encoder.layers.0.mlp.fc1.weight"
    trained = "vision_model.encoder.layers.2.self_attn.q_proj.weight"
    start = tiny_tower().state_dict()
    assert torch.equal(whole[frozen], start[frozen]) and not torch.equal(whole[trained], start[trained])
    with pytest.raises(ValueError, match="other options"):
        stage = replace(stage, batch_size=3)
        run(tmp_path / "parts")


@pytest.fixture(scope="module")
def tokenizer():
    words = ["dog", "cat", "puppy", "house", "grass"]
    return train_tokenizer(word_weights(words, ["traffic light"], ["a photo of a {}."]), 600, 24)


def test_tokenizer_is_a_clip_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a photo of a dog.", "Traffic  LIGHT", "café ☂ 猫 naïve!", "x" * 40, ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == loaded(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[1:-1], "an unknown token would end the text early"
    assert len(tokenizer("dog")["input_ids"]) == 3
    padded = tokenizer(["dog", "a photo of a dog."], padding=True)["input_ids"]
    assert padded[0][-1] == tokenizer.eos_token_id and len(padded[0]) == len(padded[1])


def test_text_student_learns_and_resumes(tokenizer, tmp_path):
    words = ["dog", "cat", "puppy", "house", "grass", "traffic light"]
    targets = unit_vectors(len(words))
    stage = TextStage(
        width=DIM, layers=1, heads=2, max_length=24, steps=30, batch_size=12, warmup=2, lr=1e-2, save_every=5
    )
    named, rest = (words[:3], targets[:3]), (words[3:], targets[3:])

    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        model = build_student(tokenizer, stage, words, targets)
        return train_student(model, tokenizer, named, rest, ["a photo of a {}."], stage, folder, stop_after)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=15)
    parts = run(tmp_path / "parts")
    for (name, ours), theirs in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        batch = tokenizer([f"a photo of a {word}." for word in words], padding=True, return_tensors="pt")
        found = F.normalize(whole(**batch).text_embeds, dim=-1)
    assert retrieval_accuracy(found, targets) == 100.0


def synthetic_encoder():
    """Random weights in the layout of the ONNX file."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=0.05):
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "backbone.embeddings.patch_embeddings.projection.weight": random(WIDTH, 3, PATCH, PATCH, scale=0.01),
        "backbone.embeddings.patch_embeddings.projection.bias": random(WIDTH),
        "backbone.embeddings.cls_token": random(1, 1, WIDTH),
        "backbone.layernorm.weight": 1 + random(WIDTH),
        "backbone.layernorm.bias": random(WIDTH),
        "position.patch": random(37 * 37, WIDTH),
        "position.cls": random(WIDTH),
    }
    block = "backbone.encoder.layer.0"
    for name in ("query", "key", "value"):
        weights[f"{block}.attention.attention.{name}.weight"] = random(WIDTH, WIDTH)
        weights[f"{block}.attention.attention.{name}.bias"] = random(WIDTH)
    for name, shape in (
        ("attention.output.dense", (WIDTH, WIDTH)),
        ("mlp.fc1", (4 * WIDTH, WIDTH)),
        ("mlp.fc2", (WIDTH, 4 * WIDTH)),
    ):
        weights[f"{block}.{name}.weight"] = random(*shape)
        weights[f"{block}.{name}.bias"] = random(shape[0])
    for name in ("norm1", "norm2"):
        weights[f"{block}.{name}.weight"] = 1 + random(WIDTH)
        weights[f"{block}.{name}.bias"] = random(WIDTH)
    weights[f"{block}.layer_scale1.lambda1"] = random(WIDTH, scale=0.5)
    weights[f"{block}.layer_scale2.lambda1"] = random(WIDTH, scale=0.5)
    return weights


def test_conversion_keeps_the_hidden_states():
    weights = synthetic_encoder()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    model = build_clip_vision(weights, pixels, 1, 56, projection_dim=DIM, constant=100.0)
    with torch.no_grad():
        tokens = raw_embeddings(weights, pixels, 4)
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states

        def part(x, name):
            return F.linear(
                x, weights[f"backbone.encoder.layer.0.{name}.weight"], weights[f"backbone.encoder.layer.0.{name}.bias"]
            )

        def norm(x, name):
            key = f"backbone.encoder.layer.0.{name}"
            return F.layer_norm(x, (WIDTH,), weights[f"{key}.weight"], weights[f"{key}.bias"], 1e-6)

        normed = norm(tokens, "norm1")
        q, k, v = (
            part(normed, f"attention.attention.{n}").unflatten(-1, (6, 64)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = tokens + weights["backbone.encoder.layer.0.layer_scale1.lambda1"] * part(
            attended, "attention.output.dense"
        )
        hidden = part(F.gelu(part(norm(out, "norm2"), "mlp.fc1")), "mlp.fc2")
        out = out + weights["backbone.encoder.layer.0.layer_scale2.lambda1"] * hidden
    for ours, theirs in ((states[0], tokens), (states[1], out)):
        ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs))
        assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).mean() < 0.03


def test_quiet_direction_is_orthogonal_to_ones():
    tokens = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) + 3
    tokens[:, 4] = tokens.mean()
    direction = quiet_direction(tokens)
    assert abs(direction.sum().item()) < 1e-4 and abs(direction.norm().item() - 1) < 1e-5


def test_confusion_counts_by_hand():
    counts = Confusion.empty(3)
    truth = np.array([[0, 0, 1], [1, IGNORE, 1]])
    predicted = np.array([[0, 1, 1], [1, 2, 2]])
    counts.add(truth, predicted, np.ones_like(truth, dtype=bool))
    summary = counts.summary()
    assert summary["classes_present"] == 2 and summary["images"] == 1
    assert summary["miou"] == 50.0 and summary["pixel_accuracy"] == 60.0  # IoU 1/2 and 2/4
    assert counts.per_class(["a", "b", "c"]) == {"a": 50.0, "b": 50.0}


def test_task_truth_shifts_and_ignores():
    task = Task("x", "voc2012", shift=-1, ignored=(2,))
    assert task_truth(task, np.array([0, 1, 2, 3, 255], np.uint8)).tolist() == [255, 0, 255, 2, 255]
    assert border_mask(np.array([[0] * 20 + [1] * 20] * 20, np.uint8)).sum() == 20 * 8


def embedded_folder():
    spec = importlib.util.find_spec("arm_hf")
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets" / "arm-clip-mini"
    return folder if (folder / "model.int8.safetensors").exists() else None


@pytest.mark.skipif(embedded_folder() is None, reason="the embedded model is not there")
def test_embedded_model_knows_its_words():
    from arm_hf import ARMModel
    from arm_hf.modeling.text import TextEncoder

    folder = embedded_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 35e6
    model = ARMModel.from_pretrained(folder).eval()
    encoder = TextEncoder(model.clip, CLIPTokenizer.from_pretrained(folder))
    words = ["dog", "cat", "car", "grass", "sky", "couch", "airplane", "motorcycle", "person", "road", "boat", "tv"]
    variants = [
        "puppy", "kitten", "automobile", "lawn", "blue sky", "sofa", "aeroplane", "motorbike", "man", "street", "ship",
        "tvmonitor",
    ]  # fmt: skip
    with torch.no_grad():
        names = encoder.class_embeddings(words, "single")
        others = encoder.class_embeddings(variants, "single")
    assert (others @ names.T).argmax(1).tolist() == list(range(len(words)))
    with torch.no_grad():
        photo = torch.zeros(1, 3, 56, 84)
        output = model(photo, class_embeddings=names)
        embeds = model.clip.get_image_features(torch.zeros(1, 3, 336, 336)).pooler_output
    assert output.logits.shape[:2] == (1, len(words)) and torch.isfinite(output.logits).all()
    assert embeds.shape == (1, names.shape[1])
