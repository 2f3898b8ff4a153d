"""Saving and loading: lean, self-contained, packed; and that nothing is ever left random in silence."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel

from arm_hf.modeling.configuration_arm import ARMConfig
from arm_hf.modeling.modeling_arm import PACKED_WEIGHTS_NAME, ARMModel

WEIGHTS = "model.safetensors"


@torch.no_grad()
def logits(model: ARMModel, pixels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return model(pixels, class_embeddings=words).logits


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_weights(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_clip_config) -> tuple[Path, ARMModel]:
    """A small CLIP and a seeded ARM on it, saved in every form once; tests work on copies."""
    root = tmp_path_factory.mktemp("checkpoints")
    config = tiny_clip_config.to_dict()
    config["vision_config"].update(num_hidden_layers=8, hidden_size=64, intermediate_size=96)
    config["text_config"].update(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig.from_dict(config)).save_pretrained(root / "tiny-clip")
        model = ARMModel.from_clip(root / "tiny-clip", ffn_ratio=2.0).eval()
    copy.deepcopy(model).save_pretrained(root / "lean")
    copy.deepcopy(model).save_pretrained(root / "full", self_contained=True)
    copy.deepcopy(model).save_pretrained(root / "packed", weight_packing="int8")
    return root, model


@pytest.fixture
def tiny_clip_folder(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared[0] / "tiny-clip", tmp_path / "tiny-clip"))


@pytest.fixture
def model(prepared, tiny_clip_folder) -> ARMModel:
    """The ARM; it knows where its CLIP lies."""
    model = copy.deepcopy(prepared[1])
    model.config.clip_name_or_path = str(tiny_clip_folder)
    return model


@pytest.fixture
def saved(prepared, tiny_clip_folder, tmp_path) -> Callable[[str], Path]:
    def copy_of(form: str) -> Path:
        folder = Path(shutil.copytree(prepared[0] / form, tmp_path / form))
        edit_config(folder, clip_name_or_path=str(tiny_clip_folder))
        return folder

    return copy_of


@pytest.fixture
def lean(saved) -> Path:
    return saved("lean")


@pytest.fixture
def full(saved) -> Path:
    return saved("full")


@pytest.fixture
def packed(saved) -> Path:
    return saved("packed")


class TestRoundTrip:
    @pytest.mark.parametrize("form", ["lean", "full"])
    def test_outputs_are_exactly_the_same(self, request, model, pixels, words, form):
        folder = request.getfixturevalue(form)
        loaded = ARMModel.from_pretrained(folder)
        assert torch.equal(logits(loaded, pixels, words), logits(model, pixels, words))
        assert not loaded.training and not loaded.clip.training
        assert all(p.requires_grad == name.startswith("arm.") for name, p in loaded.named_parameters())
        assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
            key: value.dtype for key, value in model.state_dict().items()
        }

    def test_packed_outputs_are_close(self, packed, model, pixels, words):
        loaded = ARMModel.from_pretrained(packed)
        ours, expected = logits(loaded, pixels, words), logits(model, pixels, words)
        assert torch.nn.functional.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.99
        assert not torch.equal(ours, expected)

    def test_contents_and_sizes(self, lean, full, packed, model):
        sizes = {folder.name: sum(f.stat().st_size for f in folder.iterdir()) for folder in (lean, full, packed)}
        assert sizes["lean"] < sizes["full"] / 2
        assert sizes["packed"] < sizes["full"] / 3
        assert {key.split(".")[0] for key in load_file(lean / WEIGHTS)} == {"arm"}
        assert set(load_file(full / WEIGHTS)) == set(model.state_dict())
        for folder in (lean, full, packed):
            files = {file.name for file in folder.iterdir()}
            assert files == {"config.json", PACKED_WEIGHTS_NAME if folder is packed else WEIGHTS}

    def test_saving_leaves_the_model_and_its_config_alone(self, model, tmp_path):
        model.save_pretrained(tmp_path / "x")  # transformers itself notes the dtype and the architecture once
        before = model.config.to_dict()
        for options in ({"self_contained": True}, {"weight_packing": "int8"}, {}):
            model.save_pretrained(tmp_path / "x", **options)
            assert model.config.to_dict() == before

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_a_second_round_trip_changes_nothing(self, request, tmp_path, pixels, words, form):
        loaded = ARMModel.from_pretrained(request.getfixturevalue(form))
        loaded.save_pretrained(tmp_path / "again", self_contained=form != "lean")
        again = ARMModel.from_pretrained(tmp_path / "again")
        assert torch.equal(logits(again, pixels, words), logits(loaded, pixels, words))
        assert again.config.checkpoint_contents == ("head" if form == "lean" else "full")
        assert again.config.weight_packing is None

    def test_self_contained_needs_no_reference(self, full, tiny_clip_folder, pixels, words):
        expected = logits(ARMModel.from_pretrained(full), pixels, words)
        edit_config(full, clip_name_or_path=None)
        (tiny_clip_folder / WEIGHTS).unlink()
        assert torch.equal(logits(ARMModel.from_pretrained(full), pixels, words), expected)

    def test_a_model_without_reference_saves_everything(self, arm, tmp_path, pixels, words):
        arm.save_pretrained(tmp_path)
        assert torch.equal(logits(ARMModel.from_pretrained(tmp_path), pixels, words), logits(arm, pixels, words))

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_auto_classes(self, request, pixels, words, form):
        import arm_hf  # noqa: F401  (registers)

        folder = request.getfixturevalue(form)
        assert type(AutoConfig.from_pretrained(folder)) is ARMConfig
        loaded = AutoModel.from_pretrained(folder)
        assert type(loaded) is ARMModel
        assert torch.equal(logits(loaded, pixels, words), logits(ARMModel.from_pretrained(folder), pixels, words))


class TestArguments:
    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, "auto", None])
    def test_dtype(self, request, form, dtype, pixels, words):
        loaded = ARMModel.from_pretrained(request.getfixturevalue(form), dtype=dtype)
        expected = torch.bfloat16 if "bfloat16" in str(dtype) else torch.float32
        assert {value.dtype for value in loaded.state_dict().values() if value.is_floating_point()} == {expected}
        assert logits(loaded, pixels, words).dtype == expected

    @pytest.mark.parametrize("form", ["lean", "full"])
    def test_half_precision_is_kept(self, model, tmp_path, form):
        model.to(torch.bfloat16).save_pretrained(tmp_path / form, self_contained=form == "full")
        loaded = ARMModel.from_pretrained(tmp_path / form)
        assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_attention_implementation(self, request, form):
        loaded = ARMModel.from_pretrained(request.getfixturevalue(form), attn_implementation="eager")
        assert loaded.config._attn_implementation == "eager"
        assert loaded.clip.vision_model.config._attn_implementation == "eager"
        assert loaded.arm.cross_attention[0].attention.config._attn_implementation == "eager"

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_config_fields_can_be_overridden(self, request, form):
        loaded = ARMModel.from_pretrained(request.getfixturevalue(form), method="sclip", background=0.3)
        assert (loaded.config.method, loaded.config.background) == ("sclip", 0.3)

    def test_unknown_argument(self, full):
        with pytest.raises(TypeError, match="methd"):
            ARMModel.from_pretrained(full, methd="sclip")

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_loading_info(self, request, form):
        model, info = ARMModel.from_pretrained(request.getfixturevalue(form), output_loading_info=True)
        assert isinstance(model, ARMModel)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_own_config(self, request, form, pixels, words):
        folder = request.getfixturevalue(form)
        config = ARMConfig.from_pretrained(folder, coarse_form="logits")
        loaded = ARMModel.from_pretrained(folder, config=config)
        assert loaded.config.coarse_form == "logits"
        assert logits(loaded, pixels, words).isfinite().all()

    def test_state_dict_given(self, model, pixels, words):
        loaded = ARMModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert torch.equal(logits(loaded, pixels, words), logits(model, pixels, words))
        head = {key: value for key, value in model.state_dict().items() if key.startswith("arm.")}
        with pytest.raises(ValueError, match=r"lacks .* weights"):
            logits(ARMModel.from_pretrained(None, config=model.config, state_dict=head), pixels, words)

    def test_load_state_dict_marks_the_towers(self, model, pixels, words):
        empty = ARMModel(model.config).eval()
        empty.load_state_dict(model.state_dict())
        assert torch.equal(logits(empty, pixels, words), logits(model, pixels, words))

    def test_from_clip_folder_with_dtype(self, tiny_clip_folder, words):
        built = ARMModel.from_clip(tiny_clip_folder, dtype=torch.bfloat16, fusion_layers=(1, 2))
        assert built.dtype == built.clip.dtype == torch.bfloat16
        assert built.config.clip_name_or_path == str(tiny_clip_folder)

    def test_subfolder(self, model, tmp_path, pixels, words):
        for form, options in {
            "lean": {},
            "full": {"self_contained": True},
            "packed": {"weight_packing": "int8"},
        }.items():
            model.save_pretrained(tmp_path / "repo" / form, **options)
            loaded = ARMModel.from_pretrained(tmp_path / "repo", subfolder=form)
            torch.testing.assert_close(logits(loaded, pixels, words), logits(model, pixels, words), atol=0.5, rtol=0.5)


class TestNothingIsLeftRandom:
    @pytest.mark.parametrize("call", ["forward", "segment", "encode_text", "save_pretrained"])
    def test_a_model_from_a_config_refuses_to_run(self, model, pixels, words, tmp_path, call):
        empty = ARMModel(model.config)
        calls = {
            "forward": lambda: empty(pixels, class_embeddings=words),
            "segment": lambda: empty.segment(pixels, words),
            "encode_text": lambda: empty.encode_text(torch.ones(1, 4, dtype=torch.long)),
            "save_pretrained": lambda: empty.save_pretrained(tmp_path / "x", self_contained=True),
        }
        with pytest.raises(RuntimeError, match="built from a config alone"):
            calls[call]()

    def test_loading_the_head_alone_does_not_count(self, model, pixels, words):
        empty = ARMModel(model.config)
        head = {key: value for key, value in model.state_dict().items() if key.startswith("arm.")}
        empty.load_state_dict(head, strict=False)
        with pytest.raises(RuntimeError, match="built from a config alone"):
            empty(pixels, class_embeddings=words)

    def test_lean_needs_a_reference(self, arm, lean, tmp_path):
        with pytest.raises(ValueError, match=r"needs config\.clip_name_or_path"):
            arm.save_pretrained(tmp_path / "x", self_contained=False)
        edit_config(lean, clip_name_or_path=None)
        with pytest.raises(ValueError, match="its config names no CLIP; set clip_name_or_path"):
            ARMModel.from_pretrained(lean)

    def test_missing_tower_folder(self, lean, tmp_path):
        edit_config(lean, clip_name_or_path=str(tmp_path / "nowhere"))
        with pytest.raises(OSError, match="nowhere"):
            ARMModel.from_pretrained(lean)

    def test_missing_tower_weights(self, lean, tiny_clip_folder):
        (tiny_clip_folder / WEIGHTS).unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            ARMModel.from_pretrained(lean)

    def test_incomplete_tower(self, lean, tiny_clip_folder):
        edit_weights(tiny_clip_folder / WEIGHTS, lambda w: w.pop("vision_model.post_layernorm.weight"))
        with pytest.raises(ValueError, match=r"lacks 1 weights?, for example .*post_layernorm\.weight"):
            ARMModel.from_pretrained(lean)

    def test_another_tower(self, lean, model, tiny_clip_folder):
        config = CLIPConfig.from_dict({**model.clip.config.to_dict(), "projection_dim": 32})
        CLIPModel(config).save_pretrained(tiny_clip_folder)
        with pytest.raises(ValueError, match="does not fit this ARM: projection_dim 32 instead of 64"):
            ARMModel.from_pretrained(lean)

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    @pytest.mark.parametrize("key", ["arm.fusion.mlp.0.weight", "arm.self_attention.0.attention.q_proj.bias"])
    def test_missing_weights(self, request, form, key):
        folder = request.getfixturevalue(form)
        path = folder / (PACKED_WEIGHTS_NAME if form == "packed" else WEIGHTS)
        if form == "packed":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                weights = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(key)}  # noqa: SIM118
            save_file(weights, path, metadata=metadata)
        else:
            edit_weights(path, lambda weights: weights.pop(key))
        with pytest.raises(ValueError, match=f"lacks 1 weights?, for example {key}"):
            ARMModel.from_pretrained(folder)

    def test_missing_tower_weights_in_a_full_checkpoint(self, full):
        edit_weights(full / WEIGHTS, lambda weights: weights.pop("clip.visual_projection.weight"))
        with pytest.raises(ValueError, match=r"clip\.visual_projection\.weight"):
            ARMModel.from_pretrained(full)

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_other_widths(self, request, form):
        folder = request.getfixturevalue(form)
        edit_config(folder, ffn_ratio=4.0)
        with pytest.raises((ValueError, RuntimeError), match=r"(?s)ffn.*(512|256)|mismatch"):
            ARMModel.from_pretrained(folder)

    @pytest.mark.parametrize("form", ["lean", "full", "packed"])
    def test_cut_file(self, request, form):
        folder = request.getfixturevalue(form)
        path = folder / (PACKED_WEIGHTS_NAME if form == "packed" else WEIGHTS)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises((ValueError, OSError), match="damaged or cut short"):
            ARMModel.from_pretrained(folder)

    @pytest.mark.parametrize("form", ["lean", "full"])
    def test_pickles_are_not_read(self, request, form):
        folder = request.getfixturevalue(form)
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            ARMModel.from_pretrained(folder)

    def test_pickled_tower_is_not_read(self, lean, tiny_clip_folder):
        torch.save(load_file(tiny_clip_folder / WEIGHTS), tiny_clip_folder / "pytorch_model.bin")
        (tiny_clip_folder / WEIGHTS).unlink()
        with pytest.raises(OSError, match="safetensors"):
            ARMModel.from_pretrained(lean)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(OSError, match="nothing-here"):
            ARMModel.from_pretrained(str(tmp_path / "nothing-here"))
