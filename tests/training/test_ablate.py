"""What ARM adds: the tables of the evidence, and runs of it with a tiny CLIP on made-up photos."""

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from arm_hf import ARMModel
from arm_hf.label_sets import load_label_set
from arm_hf.training import ablate, ablation_tables
from arm_hf.training.ablation_runs import Bench, Training, load_arms
from arm_hf.training.options import TrainingOptions


def record(gain, *, variant="recipe", seed=0, chosen="msrc", host="sclip", experiment="hosts"):
    alone = {
        "mean_iou_in_labels": 40.0,
        "boundary_iou": 20.0,
        "overall_accuracy": 70.0,
        "seconds": 0.1,
        "trunk_seconds": 0.3,
    }
    refined = {**alone, "mean_iou_in_labels": 40.0 + gain, "boundary_iou": 20.0 + 2 * gain, "seconds": 0.2}
    names = {"experiment": experiment, "variant": variant, "seed": seed, "set": chosen, "host": host}
    return {**names, "unseen": chosen == "msrc", "alone": alone, "with_arm": refined}


def test_the_hosts_table_averages_over_seeds_sets_and_hosts():
    records = [
        record(gain, seed=seed, chosen=chosen, host=host)
        for seed, chosen, host, gain in (
            (0, "voc20", "sclip", 1.0),
            (1, "voc20", "sclip", 3.0),
            (0, "msrc", "sclip", 4.0),
            (1, "msrc", "sclip", 6.0),
            (0, "voc20", "gem", -2.0),
            (1, "voc20", "gem", 0.0),
            (0, "msrc", "gem", 0.0),
            (1, "msrc", "gem", 0.0),
        )
    ]
    lines = ablation_tables.host_tables(records)
    assert "| sclip | 40.0 | 40.0 |" in lines  # alone
    assert "| sclip | +2.0 | +5.0 | +3.5 |" in lines  # mIoU
    assert "| sclip | +4.0 | +10.0 | +7.0 |" in lines  # boundary IoU
    assert "| gem | -1.0 | +0.0 | -0.5 |" in lines
    assert "| mean | +0.5 | +2.5 | +1.5 |" in lines
    assert any("has not seen (msrc): +2.5 ±" in line for line in lines)
    assert any("sclip 1.25, gem 1.25" in line for line in lines), "0.2 + 0.3 s with ARM, 0.1 + 0.3 s without"
    spread = statistics.stdev([0.75, 2.25])
    assert f"Mean gain over hosts and sets, over seeds: +1.5 ± {spread:.1f} mIoU." in lines


def test_the_variants_table_shows_mean_and_spread_over_seeds():
    records = [
        record(gain, variant=variant, seed=seed, experiment="layers")
        for variant, seed, gain in (("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, -1.0), ("b", 1, -1.0))
    ]
    lines = ablation_tables.variant_table(records)
    assert "| without ARM | 40.0 |  |" in lines
    assert "| a | 41.5 ± 0.7 | +1.5 ± 0.7 |" in lines
    assert "| b | 39.0 ± 0.0 | -1.0 ± 0.0 |" in lines


def test_experiments_are_the_papers_tables():
    sizes = {name: len(variants) for name, variants in ablate.EXPERIMENTS.items()}
    assert sizes == {"hosts": 1, "hosts_coarse": 1, "layers": 6, "blocks": 7, "scale": 4, "loss": 3, "training_base": 2}
    known = {each.name for each in ablate.SETS}
    for variants in ablate.EXPERIMENTS.values():
        assert len({variant.name for variant in variants}) == len(variants)
        assert all(set(variant.sets) <= known for variant in variants)


@pytest.fixture
def data_folder(tmp_path):
    rng = np.random.default_rng(0)
    for folder, label_set in ablate.TRAINING_SETS.items():
        root = tmp_path / "data" / folder
        for part in ("images", "labels"):
            (root / part).mkdir(parents=True)
        names = [label.name for label in load_label_set(label_set)]
        (root / "classes.json").write_text(json.dumps({"classes": names}))
        for index in range(3):
            Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(root / "images" / f"{index}.jpg")
            label = np.zeros((70, 90), np.uint8)
            label[20:50, 30:60] = 1 + index
            Image.fromarray(label).save(root / "labels" / f"{index}.png")
        for split in ("train", "val", "val_balanced"):
            (root / f"{split}.txt").write_text("0\n1\n2\n")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_run_trains_evaluates_and_goes_on_where_it_was(data_folder, tiny_clip_folder, tmp_path, monkeypatch):
    work = tmp_path / "work"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "fusion_layers: [1, 2]\ncrop_size: 64\nresize_min: 64\nresize_max: 64\nshortest_edge: 64\n"
        "batch_size: 2\nworkers: 0\ncpu: true\nnum_attention_heads: 2\nloss: cross_entropy\ncoarse_form: logits\n"
    )
    variant = ablate.Variant("recipe", hosts=("clearclip", "sclip"), sets=("coco_stuff171", "voc20"))
    monkeypatch.setitem(ablate.EXPERIMENTS, "hosts", (variant,))
    arguments = ["--clip", str(tiny_clip_folder), "--data", str(data_folder), "--work-dir", str(work)]
    arguments += ["--config", str(recipe), "--max-steps", "2", "--seeds", "0", "1", "--experiments", "hosts", "loss"]
    variants = (ablate.Variant("paper", {"loss": "bce"}, sets=("voc20",)), ablate.Variant("recipe", sets=("voc20",)))
    monkeypatch.setitem(ablate.EXPERIMENTS, "loss", variants)
    monkeypatch.setattr(ablate, "LAYER_PAIRS", ((1, 2),))
    ablate.main([*arguments, "--processes", "2", "--speed"])
    evidence = json.loads((work / "evidence.json").read_text())
    records = evidence["records"]
    assert all(evidence["images_per_second"][name] > 0 for name in ("CLIP in every step", "cached features"))
    assert not list(work.glob(".speed*"))
    assert len(records) == 2 * 2 * 2 + 2 * 2
    assert {each["set"] for each in records} == {"coco_stuff171", "voc20"}
    assert all(0 <= each[key]["mean_iou_in_labels"] <= 100 for each in records for key in ("alone", "with_arm"))
    assert "points of mIoU" in (work / "evidence.md").read_text()
    trainings = sorted(path.name for path in (work / "arms").iterdir())
    assert trainings == ["loss=bce+seed0", "loss=bce+seed1", "recipe+seed0", "recipe+seed1"], "the recipe once"
    assert len(list((work / "cache").iterdir())) == 1, "one cache for all"

    given = [*arguments, "--arm", str(work / "arms" / "recipe+seed1" / "last"), "--work-dir", str(tmp_path / "given")]
    with pytest.raises(SystemExit):
        ablate.main(given)  # there are other experiments than the hosts
    ablate.main([*given, "--experiments", "hosts"])
    again = json.loads((tmp_path / "given" / "evidence.json").read_text())
    assert [each["with_arm"]["mean_iou_in_labels"] for each in again["records"]] == [
        each["with_arm"]["mean_iou_in_labels"]
        for each in records
        if each["experiment"] == "hosts" and each["seed"] == 1
    ]
    assert "ARM: that of `last`" in (tmp_path / "given" / "evidence.md").read_text()

    def never(*args, **kwargs):
        raise AssertionError("was done before")

    monkeypatch.setattr("arm_hf.training.train.train", never)
    monkeypatch.setattr("arm_hf.evaluating.evaluate_data", never)
    ablate.main(arguments)
    assert json.loads((work / "evidence.json").read_text()) == {**evidence, "images_per_second": {}}


def test_trainings_are_named_after_what_differs_from_the_recipe(tmp_path):
    recipe = TrainingOptions(clip="clip", loss="cross_entropy")
    bench = Bench(recipe, tmp_path, tmp_path)
    same = [Training(), Training({"loss": "cross_entropy"}), Training({"fusion_layers": [3, 7]})]
    assert {bench.folder(each).name for each in same} == {"recipe+seed0"}
    other = Training({"loss": "bce", "fusion_layers": [1, 5]}, seed=2)
    assert bench.row("gem", other) == "gem + ARM (fusion_layers=1-5+loss=bce+seed2)"
    assert replace(bench, weight=0.5).row("gem", Training()) == "gem + ARM (recipe+seed0 x0.5)"


def test_an_arm_of_another_clip_is_refused(tiny_clip, tmp_path):
    model = ARMModel.from_clip(tiny_clip, fusion_layers=[1, 2], num_attention_heads=2)
    model.save_pretrained(tmp_path / "recipe+seed0" / "last", self_contained=True)
    folder = str(tmp_path / "recipe+seed0" / "last")
    found = load_arms(tiny_clip, {"one": folder}, weight=0.5)["one"]
    assert found.clip is tiny_clip
    assert found.arm.refinement_scale == 0.5
    other = type(tiny_clip)(tiny_clip.config)
    with pytest.raises(ValueError, match=r"recipe\+seed0/last' holds an ARM of another CLIP"):
        load_arms(other, {"one": folder})
