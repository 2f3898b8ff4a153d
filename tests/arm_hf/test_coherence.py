"""Coherence and alignment of layers: the numbers against plain loops, the command on a tiny folder."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from arm_hf.coherence import PairCounts, auroc, measure_coherence, patch_label_counts
from arm_hf.data import open_data
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline

CLASSES = ["background", "cat", "grass"]


@pytest.fixture
def folder(tmp_path):
    """Two images of 4 x 6 patches: label maps with blocks, stripes, and ignored pixels."""
    root = tmp_path / "data"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(2):
        pixels = random.integers(0, 60, (64, 96, 3), dtype=np.uint8)
        labels = np.zeros((64, 96), dtype=np.uint8)
        labels[:40, 30:70] = 1
        labels[40:, number * 20 :] = 2
        labels[:, 85:] = 255
        pixels[labels == 1] += 120
        pixels[..., 1][labels == 2] += 150
        Image.fromarray(pixels).save(root / "images" / f"photo_{number}.png")
        Image.fromarray(labels).save(root / "labels" / f"photo_{number}.png")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES, "background_index": 0, "ignore_index": 255}))
    (root / "val.txt").write_text("photo_0\nphoto_1\n")
    return root


@pytest.fixture
def pipe(tiny_clip, tiny_tokenizer, tiny_image_processor):
    return OpenVocabSegmentationPipeline(
        model=tiny_clip, tokenizer=tiny_tokenizer, image_processor=tiny_image_processor
    )


def area_by_hand(pairs: list[tuple[float, bool]]) -> float:
    """Share of (same, different) couples in the right order."""
    same = [score for score, agree in pairs if agree]
    different = [score for score, agree in pairs if not agree]
    wins = sum((a > b) + 0.5 * (a == b) for a in same for b in different)
    return wins / (len(same) * len(different))


class TestArea:
    def test_against_couples(self):
        features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        labels = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))
        pairs = torch.combinations(torch.arange(30)).T
        counts = PairCounts()
        counts.add(features, labels[pairs[0]] == labels[pairs[1]], pairs)
        units = F.normalize(features, dim=-1)
        plain = [(float(units[i] @ units[j]), bool(labels[i] == labels[j])) for i, j in pairs.T.tolist()]
        assert counts.summary()["coherence"] == pytest.approx(area_by_hand(plain), abs=2e-4)
        assert counts.summary()["mean_of_images"] == counts.summary()["coherence"]

    def test_against_scikit_learn(self):
        metrics = pytest.importorskip("sklearn.metrics")
        counts = torch.randint(0, 9, (2, 50), generator=torch.Generator().manual_seed(2))
        scores = np.repeat(np.tile(np.arange(50), 2), counts.flatten().numpy())
        truth = np.repeat([0, 1], counts.sum(dim=1).numpy())
        assert auroc(counts) == pytest.approx(metrics.roc_auc_score(truth, scores))

    def test_extremes(self):
        assert auroc(torch.tensor([[5, 0], [0, 3]])) == 1
        assert auroc(torch.tensor([[0, 5], [3, 0]])) == 0
        assert auroc(torch.tensor([[0, 5], [0, 3]])) == 0.5
        with pytest.raises(ValueError, match="patches of different labels"):
            auroc(torch.tensor([[0, 0], [1, 3]]))


def test_patch_label_counts(tiny_clip):
    labels = np.random.default_rng(0).choice([0, 1, 2, 255], (40, 53)).astype(np.int64)
    counts = patch_label_counts(labels, DenseCLIP(tiny_clip), torch.zeros(1, 3, 40, 53), 3)
    padded = np.full((48, 64), 255)
    padded[4:44, 5:58] = labels  # 8 rows and 11 columns more, the odd one right
    expected = [
        [int((padded[y : y + 16, x : x + 16] == label).sum()) for label in range(3)]
        for y in range(0, 48, 16)
        for x in range(0, 64, 16)
    ]
    assert counts.tolist() == expected


@torch.no_grad()
def test_measure_against_plain_loops(folder, pipe, tiny_clip):
    data = open_data(folder)
    report = measure_coherence(pipe, data, templates="single")
    words = pipe.text_encoder.class_embeddings(["cat", "grass"], "single")
    vision, last = tiny_clip.vision_model, tiny_clip.vision_model.encoder.layers[-1]
    scores = {key: [] for key in ("query", "key", "value", "deep")}
    hits = pixels_of_classes = 0
    for name in ("photo_0.png", "photo_1.png"):
        image = folder / "images" / name
        labels = np.asarray(Image.open(folder / "labels" / name)).astype(int)
        patches = [labels[y : y + 16, x : x + 16] for y in range(0, 64, 16) for x in range(0, 96, 16)]
        usual = []
        for patch in patches:
            known = patch[patch != 255]
            usual.append(int(np.bincount(known).argmax()) if 2 * known.size >= 256 else None)
        pixels = pipe.image_processor(Image.open(image), return_tensors="pt")["pixel_values"]
        table = DenseCLIP(tiny_clip).tower.embed(pixels)[0]
        states = [table]
        for block in vision.encoder.layers[:-1]:
            states.append(block(states[-1], attention_mask=None))
        block = vision.encoder.layers[6]  # layer 7
        normed = block.layer_norm1(states[6])[0, 1:]
        vectors = {name: getattr(block.self_attn, f"{name[0]}_proj")(normed) for name in ("query", "key", "value")}
        x = states[9]  # index -3: the 10th layer
        x = (x + vision.encoder.layers[9].mlp(vision.encoder.layers[9].layer_norm2(x)))[0, 1:]
        vectors["deep"] = last.self_attn.v_proj(last.layer_norm1(x))
        out = tiny_clip.visual_projection(vision.post_layernorm(last.self_attn.out_proj(vectors["deep"])))
        for index, patch in enumerate(patches):
            best = 1 + int((F.normalize(out[index], dim=0) @ words.T).argmax())
            hits += int((patch == best).sum())
            pixels_of_classes += int(((patch == 1) | (patch == 2)).sum())
        for name, features in vectors.items():
            units = F.normalize(features, dim=-1)
            for i in range(24):
                for j in range(i):
                    if None not in (usual[i], usual[j]) and (usual[i], usual[j]) != (0, 0):
                        scores[name].append((float(units[i] @ units[j]), usual[i] == usual[j]))
    for name in ("query", "key", "value"):
        assert report.layers[6][name]["coherence"] == pytest.approx(area_by_hand(scores[name]), abs=2e-3)
    assert report.values[2]["index"] == -3
    assert report.values[2]["coherence"] == pytest.approx(area_by_hand(scores["deep"]), abs=2e-3)
    assert report.values[2]["alignment"] == pytest.approx(hits / pixels_of_classes)
    assert report.values[0]["coherence"] == report.layers[-1]["value"]["coherence"]
    best = max(report.layers, key=lambda layer: layer["key"]["coherence"])["layer"]
    assert report.record()["k_M"]["layer"] == report.key_layer == best
    assert f"layer={best}" in report.table()[-1]
    assert len(report.layers) == len(report.values) == 12


class TestCommand:
    @pytest.fixture
    def arm(self, tmp_path, root):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

        def run(*arguments):
            return subprocess.run(
                [sys.executable, "-m", "arm_hf.cli", "coherence", *map(str, arguments)],
                cwd=tmp_path,
                env={**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=600,
            )

        return run

    def test_numbers_and_file(self, arm, folder, tiny_clip_folder, tmp_path):
        done = arm(folder, "--model", tiny_clip_folder, "--templates", "single", "--out", "numbers.json")
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "numbers.json").read_text())
        assert record["images"] == 2 and len(record["layers"]) == 12
        assert f"--method-option layer={record['k_M']['layer']}" in done.stdout
        again = arm(folder, "--model", tiny_clip_folder, "--out", "numbers.json")
        assert again.returncode == 2 and "is there already" in again.stderr

    def test_errors_are_one_line(self, arm, folder):
        done = arm(folder / "nothing")
        assert done.returncode == 2
        assert done.stderr.startswith("arm-hf: error: there is no folder") and len(done.stderr.splitlines()) == 1
