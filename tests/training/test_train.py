"""Training of ARM: what comes out, what a resumed run computes, and what bad input says."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

from arm_hf import ARMModel
from arm_hf.metrics import ConfusionMatrix
from arm_hf.modeling.configuration_arm import ARMConfig
from arm_hf.training.checkpoints import RunFolder
from arm_hf.training.options import TrainingOptions, parse_options, save_options
from arm_hf.training.views import StepPlan, Views, open_training_sets

Run = Callable[..., int]
Losses = Callable[[Path], dict[int, float]]


# -- options ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    options = TrainingOptions()
    assert (options.loss, options.learning_rate, options.weight_decay) == ("bce", 1e-4, 1e-3)
    assert (options.batch_size, options.epochs, options.crop_size) == (4, 5, 336)
    assert (options.method, options.fusion_layers) == ("clearclip", [3, 7])
    assert options.clip == "openai/clip-vit-base-patch16"


def test_every_form_of_arm_is_a_flag_with_the_models_default() -> None:
    not_options = {"clip_config", "clip_name_or_path", "ignore_index", "background", "odd_sizes", "initializer_range"}
    not_options |= {"adapter", "checkpoint_contents", "weight_packing", "clip_revision"}
    own = {name for name in ARMConfig.__annotations__ if name not in ("model_type", "sub_configs_defaults")}
    fields = TrainingOptions().arm_fields()
    assert set(fields) == own - not_options
    for name, value in fields.items():
        expected = ARMConfig.__dataclass_fields__[name].default
        assert value == (list(expected) if isinstance(expected, tuple) else expected or value), name


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 3e-4\nepochs: 7\nffn_ratio: null\nmethod_options: {position_rule: bilinear}\n")
    options = parse_options(["--config", str(path), "--epochs", "9", "--no-deep-norm", "--fusion-layers", "2", "5"])
    assert (options.learning_rate, options.epochs, options.ffn_ratio, options.batch_size) == (3e-4, 9, None, 4)
    assert (options.deep_norm, options.fusion_layers) == (False, [2, 5])
    assert options.arm_fields()["method_options"] == {"position_rule": "bilinear"}


def test_saved_options_are_a_config(tmp_path: Path) -> None:
    options = TrainingOptions(ffn_ratio=None, data=["a b", "c"], lora=True, mixed_precision="no", val_threshold=None)
    save_options(options, tmp_path / "options.yaml")
    assert parse_options(["--config", str(tmp_path / "options.yaml")]) == options


@pytest.mark.parametrize(
    "path", sorted(Path(parse_options.__globals__["CONFIGS"]).glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_are_valid(path: Path) -> None:
    options = parse_options(["--config", path.stem])
    assert options.crop_size % 14 == 0 or options.crop_size % 16 == 0


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("epochz: 3", [], "unknown options: epochz"),
        ("epochs: many", [], "invalid int value: 'many'"),
        ("[1, 2]", [], "mapping"),
        ("a: [", [], "cannot read"),
        ("", ["--nonsense", "1"], "unrecognized arguments"),
        ("", ["--loss", "dice"], "invalid choice: 'dice'"),
        ("", ["--epochs", "0"], "epochs must be positive"),
        ("", ["--crop-size", "400"], "crop_size <= resize_min"),
        ("", ["--lora", "--cache-features"], "cannot be cached"),
        ("", ["--method-options", "a"], "written KEY=VALUE, got 'a'"),
        ("", ["--data", "a", "b", "--class-names", "voc21"], "one label set per entry"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, content: str, arguments: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_options(["--config", str(path), *arguments]).arm_fields()


# -- what is learnt from ------------------------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch_by_one_process_or_by_many() -> None:
    plan = StepPlan((10, 7), 4, seed=1)
    assert plan.steps_per_epoch == 3
    whole = [sorted(step) for step in plan.epoch(2)]
    assert all(len({key[0] for key in step}) == 1 for step in whole), "a step has one set"
    assert len({key for step in whole for key in step}) == 12
    assert plan.epoch(3) != plan.epoch(2)
    shared = [list(plan.parts(5, 9, 2, process, 2)) for process in range(2)]
    alone = list(plan.parts(5, 9, 1, 0, 1))
    for step in range(4):
        parts = [key for process in shared for part in process[2 * step : 2 * step + 2] for key in part]
        assert sorted(parts) == sorted(alone[step])


def test_background_is_no_word_to_learn(make_data: Callable[..., Path], tiny_clip_folder: Path) -> None:
    folder = make_data(classes=("background", "cat", "dog"), background_index=0)
    options = TrainingOptions(data=[str(folder)], batch_size=2, crop_size=64, resize_min=64, resize_max=64)
    (chosen,), ignore = open_training_sets(options)
    assert (chosen.words, ignore) == (("cat", "dog"), 255)
    labels = Views([chosen], options, [0.5] * 3, [0.5] * 3)[0, 0, 0]["labels"]
    assert set(labels.unique().tolist()) == {0, 255}, "photo 0 holds background and cat"


def test_crops_show_the_pixels_that_their_labels_name(make_data: Callable[..., Path]) -> None:
    """The discs' colours are their classes: red, green, blue."""
    options = TrainingOptions(data=[str(make_data())], batch_size=2, crop_size=64, resize_min=64, resize_max=90)
    sets, _ = open_training_sets(options)
    views = Views(sets, options, [0.0] * 3, [1.0] * 3)
    seen = []
    for epoch in range(3):
        for image in range(10):
            view = views[0, image, epoch]
            counted = view["labels"] != 255
            agree = view["pixels"].argmax(0)[counted] == view["labels"][counted]
            assert agree.float().mean() > 0.95
            seen.append(view["pixels"].sum().item())
    assert len(set(seen)) == 30, "every epoch has other crops"
    assert views[0, 3, 1]["pixels"].equal(views[0, 3, 1]["pixels"])


# -- what comes out -----------------------------------------------------------------------------------------------


def test_checkpoints_hold_arm_alone_and_load_everywhere(
    run_training: Run, flags: list[str], losses: Losses, read_log: Callable, tmp_path: Path
) -> None:
    data = flags[flags.index("--data") + 1]
    assert run_training(*flags, "--epochs", "8", "--val-data", data, "--schedule", "constant") == 0
    run = tmp_path / "run"
    curve = losses(run)
    assert list(curve) == list(range(1, 41))
    assert curve[40] < 0.8 * curve[1], "it learns"
    assert all(name.startswith("arm.") for name in load_file(run / "best" / "model.safetensors"))

    scores = [line["mean_iou"]["mean"] for line in read_log(run) if "mean_iou" in line]
    assert len(scores) == 8
    segment = pipeline("open-vocab-segmentation", model=str(run / "best"))
    confusion = ConfusionMatrix(3)
    for name in (Path(data) / "val.txt").read_text().split():
        labels = np.asarray(Image.open(Path(data) / "labels" / f"{name}.png"))
        image = str(Path(data) / "images" / f"{name}.png")
        result = segment(image, candidate_labels=["cat", "dog", "sky"], templates="single", semantic=True)
        confusion.update(np.asarray(result["semantic_map"]), labels)
    assert confusion.compute()["mean_iou"] == pytest.approx(max(scores), abs=1e-6)

    one, two = ARMModel.from_pretrained(run / "last"), AutoModel.from_pretrained(run / "last")
    pixels, words = torch.randn(1, 3, 64, 64), torch.randn(3, 64)
    with torch.no_grad():
        assert one(pixels, class_embeddings=words).logits.equal(two(pixels, class_embeddings=words).logits)


def test_a_model_that_holds_its_own_towers_can_be_trained_on(
    run_training: Run, flags: list[str], tmp_path: Path, tiny_clip_folder: Path
) -> None:
    whole = tmp_path / "whole"
    model = ARMModel.from_clip(str(tiny_clip_folder))
    model.config.clip_name_or_path = None
    model.save_pretrained(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (whole / name).write_bytes((tiny_clip_folder / name).read_bytes())
    assert run_training(*flags, "--clip", str(whole), "--max-steps", "2") == 0
    (whole / "model.safetensors").unlink()
    trained = ARMModel.from_pretrained(tmp_path / "run" / "last")
    assert trained.clip.state_dict()["logit_scale"] == model.clip.state_dict()["logit_scale"]


def test_training_starts_from_another_arm(run_training: Run, flags: list[str], losses: Losses, tmp_path: Path) -> None:
    assert run_training(*flags, "--schedule", "constant") == 0
    assert run_training(*flags, "--output-dir", str(tmp_path / "two"), "--init-arm", str(tmp_path / "run/last")) == 0
    assert losses(tmp_path / "two")[1] < 0.9 * losses(tmp_path / "run")[1]


def test_several_sets_with_their_own_words(
    run_training: Run, flags: list[str], make_data: Callable[..., Path], losses: Losses, tmp_path: Path
) -> None:
    one, two = (
        flags[flags.index("--data") + 1],
        str(make_data("more", ("background", "car", "tree", "road"), 6, background_index=0)),
    )
    assert run_training(*flags, "--data", one, two, "--val-data", one, two, "--epochs", "1") == 0
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    "variant",
    [
        ("--loss", "cross_entropy", "--coarse-form", "logits"),
        ("--loss", "bce_refinement", "--loss-resolution", "map"),
        ("--ignored-pixels", "zeros", "--ffn-ratio", "none"),
        ("--num-cross-attention-layers", "0", "--num-scale-blocks", "0"),
        ("--mixed-precision", "bf16"),
        ("--mixed-precision", "bf16", "--autocast-arm"),
    ],
    ids=lambda v: " ".join(v),
)
def test_the_loss_does_not_depend_on_accumulation(
    variant: tuple[str, ...], run_training: Run, flags: list[str], losses: Losses, tmp_path: Path
) -> None:
    """A step's loss is the mean over all its pixels, and images differ in how many count."""
    whole = [*flags, *variant, "--max-steps", "3"]
    assert run_training(*whole) == 0
    assert run_training(*whole, "--output-dir", str(tmp_path / "two"), "--gradient-accumulation-steps", "2") == 0
    one, two = losses(tmp_path / "run"), losses(tmp_path / "two")
    tolerance = 1e-5 if "bf16" not in variant else 3e-3
    assert all(math.isfinite(value) for value in one.values())
    assert two == pytest.approx(one, rel=tolerance)


def test_tensorboard_gets_the_curve(run_training: Run, flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_training(*flags, "--trackers", "tensorboard", "--max-steps", "3") == 0
    events = EventAccumulator(str(tmp_path / "run" / "arm")).Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3]


# -- resuming -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_in_the_middle_of_an_epoch_bit_by_bit(
    precision: str, run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--dropout", "0.1", "--checkpoint-every", "3", "--mixed-precision", precision]
    assert run_training(*flags, *more) == 0
    broken = [*flags, *more, "--output-dir", str(tmp_path / "broken")]
    write = RunFolder.write_log

    def die(self: RunFolder, line: dict) -> None:
        if line["step"] == 8:
            raise Killed
        write(self, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "write_log", die)
        run_training(*broken)
    assert max(losses(tmp_path / "broken")) == 7
    assert run_training(*broken, "--resume") == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "run")
    one, two = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("run", "broken"))
    assert all(one[name].equal(two[name]) for name in one)


def test_a_run_that_is_asked_to_stop_saves_where_it_is(
    run_training: Run,
    flags: list[str],
    losses: Losses,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    assert run_training(*flags) == 0
    stopped = [*flags, "--output-dir", str(tmp_path / "stopped")]
    write = RunFolder.write_log

    def ask(self: RunFolder, line: dict) -> None:
        write(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_log", ask)
        assert run_training(*stopped) == 128 + signal.SIGTERM
    assert "go on with --resume" in capfd.readouterr().out
    assert max(losses(tmp_path / "stopped")) == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run_training(*stopped, "--resume") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "run")


def test_resume_needs_the_same_options_and_a_run_is_not_overwritten_unasked(
    run_training: Run, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert run_training(*flags, "--max-steps", "2") == 0
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    assert run_training(*flags, "--max-steps", "3") == 2
    assert "holds a run already" in capfd.readouterr().err
    assert run_training(*flags, "--max-steps", "3", "--resume") == 2
    assert "max_steps 2 (now 3)" in capfd.readouterr().err
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before
    assert run_training(*flags, "--max-steps", "3", "--overwrite") == 0
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() != before


# -- bad input ----------------------------------------------------------------------------------------------------


def spoil(folder: Path, what: str) -> None:
    """Break a data set."""
    photo, labels = folder / "images" / "photo3.png", folder / "labels" / "photo3.png"
    if what == "no label map":
        labels.unlink()
    elif what == "no image":
        photo.unlink()
    elif what == "other size":
        Image.open(labels).resize((50, 40), Image.Resampling.NEAREST).save(labels)
    elif what == "unknown label":
        Image.fromarray(np.full((83, 100), 9, np.uint8)).save(labels)
    elif what == "broken image":
        photo.write_bytes(photo.read_bytes()[:100])
    elif what == "empty list":
        (folder / "train.txt").write_text("\n")
    elif what == "too few":
        (folder / "train.txt").write_text("photo1")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no label map", "photo3"),
        ("no image", "photo3"),
        ("other size", r"photo3.*50 x 40.*100 x 83"),
        ("unknown label", r"photo3.*9.*0 to 2"),
        ("broken image", "photo3"),
        ("empty list", r"train.txt.* no images"),
        ("too few", r"1 images, fewer than one batch \(batch_size 2\)"),
    ],
)
def test_bad_data_is_one_clear_line(
    what: str, message: str, run_training: Run, flags: list[str], capfd: pytest.CaptureFixture
) -> None:
    spoil(Path(flags[flags.index("--data") + 1]), what)
    assert run_training(*flags) == 2
    assert_one_error(capfd, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--class-names", "voc21"), "'voc21' names 21 classes, but 'discs' has 3"),
        (("--val-data", "{data}", "--val-class-names", "voc21"), "'voc21' names 21 classes, but 'discs' has 3"),
        (("--batch-size", "2", "--gradient-accumulation-steps", "4"), "must be a multiple of 1 processes x 4"),
        (("--crop-size", "60"), "multiple of this CLIP's patch, 16; got 60: use 48 or 64"),
        (("--method", "clearklip"), "unknown method 'clearklip'"),
        (("--method-options", "sharpness=1"), "no setting sharpness"),
        (("--fusion-layers", "3", "12"), "fusion_layers must be integers from 0 to 11"),
        (("--trackers", "abacus"), "'abacus' is unknown or not installed"),
        (("--method", "cliper", "--cache-features"), "cannot be cached"),
        (("--lora", "--lora-blocks", "13"), "from 1 to 12"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(
    more: tuple[str, ...], message: str, run_training: Run, flags: list[str], capfd: pytest.CaptureFixture
) -> None:
    data = flags[flags.index("--data") + 1]
    assert run_training(*flags, *(entry.format(data=data) for entry in more)) == 2
    assert_one_error(capfd, message)


def test_an_arm_of_another_clip_is_refused(
    run_training: Run, flags: list[str], tmp_path: Path, tiny_clip_folder: Path, capfd: pytest.CaptureFixture
) -> None:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(tiny_clip_folder).to_dict()
    config["vision_config"]["hidden_size"] = 64
    ARMModel.from_clip(CLIPModel(CLIPConfig(**config))).save_pretrained(tmp_path / "narrow")
    assert run_training(*flags, "--init-arm", str(tmp_path / "narrow")) == 2
    assert_one_error(capfd, "made for another CLIP than this run's: CLIP's width 64, not 128")
    assert run_training(*flags, "--init-arm", str(tiny_clip_folder)) == 2
    assert_one_error(capfd, "init_arm must be an ARM checkpoint")


def test_a_loss_that_is_not_finite_names_its_batch(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    more = ["--learning-rate", "1e30", "--max-grad-norm", "none", "--checkpoint-every", "1", "--schedule", "constant"]
    assert run_training(*flags, *more) == 2
    step = max(losses(tmp_path / "run"))
    error = assert_one_error(capfd, f"not finite at step {step + 1}")
    options = parse_options(flags)
    keys = next(StepPlan((10,), 2, options.seed).parts(step, step + 1, 1, 0, 1))
    assert all(f"discs/photo{key[1]}" in error for key in keys)


def test_a_full_disk_leaves_the_checkpoint_before(
    run_training: Run, flags: list[str], losses: Losses, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    assert run_training(*flags, "--checkpoint-every", "3") == 0
    finished = losses(tmp_path / "run")
    full = [*flags, "--checkpoint-every", "3", "--output-dir", str(tmp_path / "full")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = RunFolder.save_state

    def fill(self: RunFolder, state: dict) -> None:
        if state["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_state", fill)
        try:
            assert run_training(*full) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_error(capfd, r"cannot write the training state .*File too large.* step 3 is intact")
    assert not list((tmp_path / "full").rglob("*.part"))
    assert run_training(*full, "--resume") == 0
    assert losses(tmp_path / "full") == finished


def assert_one_error(capfd: pytest.CaptureFixture, message: str) -> str:
    """One line on stderr says what is wrong; returns it."""
    import re

    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    return lines[0]
