"""LoRA beside ARM: what is trained, what is saved, how it is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPModel

from arm_hf import ARMModel
from arm_hf.training.checkpoints import RunFolder

Run = Callable[..., int]
Losses = Callable[[Path], dict[int, float]]


@pytest.fixture
def lora(flags: list[str]) -> list[str]:
    """A run with LoRA on two projections of two blocks."""
    return [*flags, "--lora", "--lora-blocks", "2", "12", "--lora-rank", "4", "--learning-rate", "5e-3"]


def test_lora_is_saved_beside_arm_and_loads_as_an_adapter(
    run_training: Run, lora: list[str], tmp_path: Path, tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, torch.Tensor] = {}
    pixels, words = torch.randn(2, 3, 64, 64), torch.randn(3, 64)
    save = RunFolder.save_model

    def remember(self: RunFolder, folder: Path, model: ARMModel, *parts, **options) -> None:
        with torch.no_grad():
            trained["logits"] = model.eval()(pixels, class_embeddings=words).logits
        save(self, folder, model, *parts, **options)

    monkeypatch.setattr(RunFolder, "save_model", remember)
    assert run_training(*lora) == 0
    last = tmp_path / "run" / "last"

    adapter = load_file(last / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 2
    assert {name.split(".layers.")[1].split(".self_attn")[0] for name in adapter} == {"1", "11"}
    assert all(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name), "B starts at 0"
    assert all(name.startswith("arm.") for name in load_file(last / "model.safetensors"))

    for loaded in (ARMModel.from_pretrained(last), AutoModel.from_pretrained(last)):
        with torch.no_grad():
            assert torch.allclose(loaded.eval()(pixels, class_embeddings=words).logits, trained["logits"], atol=1e-4)
        assert [name for name, p in loaded.named_parameters() if p.requires_grad and not name.startswith("arm.")] == []
    loaded.save_pretrained(tmp_path / "merged")
    again = ARMModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(again.eval()(pixels, class_embeddings=words).logits, trained["logits"], atol=1e-4)

    clip = CLIPModel.from_pretrained(tiny_clip_folder)
    changed = [name for name, weight in clip.state_dict().items() if not weight.equal(again.clip.state_dict()[name])]
    assert len(changed) == 4
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_peft_loads_the_adapter_on_its_own(
    run_training: Run, lora: list[str], tmp_path: Path, tiny_clip_folder: Path
) -> None:
    peft = pytest.importorskip("peft")
    assert run_training(*lora, "--max-steps", "3") == 0
    last = tmp_path / "run" / "last"
    bare = ARMModel.from_clip(str(tiny_clip_folder))
    bare.arm.load_state_dict(ARMModel.from_pretrained(last).arm.state_dict())
    pixels, words = torch.randn(1, 3, 64, 64), torch.randn(3, 64)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(bare, last / "adapter").eval()
        expected = ARMModel.from_pretrained(last).eval()(pixels, class_embeddings=words).logits
        assert torch.allclose(adapted(pixels, class_embeddings=words).logits, expected, atol=1e-4)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_run_with_lora_resumes_bit_by_bit(
    run_training: Run, lora: list[str], losses: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*lora, "--checkpoint-every", "2", "--max-steps", "6"]
    assert run_training(*more) == 0
    broken = [*more, "--output-dir", str(tmp_path / "broken")]
    write = RunFolder.write_log

    def die(self: RunFolder, line: dict) -> None:
        if line["step"] == 4:
            raise Killed
        write(self, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "write_log", die)
        run_training(*broken)
    assert run_training(*broken, "--resume") == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "run")


def test_an_arm_of_an_adapted_clip_needs_that_clip(
    run_training: Run, lora: list[str], flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert run_training(*lora, "--max-steps", "1") == 0
    last = str(tmp_path / "run" / "last")
    two = [*flags, "--output-dir", str(tmp_path / "two"), "--max-steps", "1", "--init-arm", last]
    assert run_training(*two) == 2
    assert "name that checkpoint as clip too" in capfd.readouterr().err
    assert run_training(*two, "--clip", last) == 0
    assert (tmp_path / "two" / "clip" / "model.safetensors").is_file()
