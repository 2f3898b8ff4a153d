"""int8 weight files: what comes back, what stays exact, what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from arm_hf.modeling.packed_weights import SCALE_SUFFIX, load_int8, quantize_rows, save_int8


def test_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(96, 128, generator=generator) * torch.logspace(-4, 2, 96)[:, None],
        "kernel": torch.randn(64, 3, 7, 7, generator=generator),
        "zeros": torch.zeros(64, 64),
        "small": torch.randn(8, 8, generator=generator),
        "bias": torch.randn(300, generator=generator),
        "tiny_values": torch.full((5,), 1e-9),
        "huge": torch.tensor([1e6, 1.0]),
        "logit_scale": torch.tensor(2.6592),
        "x.position_embedding.weight": torch.randn(64, 64, generator=generator) + 40,
        "ids": torch.arange(5)[None],
        "flag": torch.tensor(True),
    }
    path = tmp_path / "model.int8.safetensors"
    save_int8(state, path, {"note": "x"})
    loaded = load_int8(path)
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].shape == tensor.shape
        if not tensor.is_floating_point():
            assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    for name in ("matrix", "kernel", "zeros"):
        step = state[name].flatten(1).abs().amax(1) / 127
        error = (loaded[name] - state[name]).flatten(1).abs().amax(1)
        assert (error <= 0.56 * step + 1e-7).all(), name
    for name in ("logit_scale", "x.position_embedding.weight", "huge"):
        assert torch.equal(loaded[name], state[name]), name
    torch.testing.assert_close(loaded["bias"], state["bias"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loaded["tiny_values"], state["tiny_values"], rtol=1e-3, atol=1e-6)
    assert path.stat().st_size < 0.5 * sum(t.numel() * t.element_size() for t in state.values())
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    assert load_int8(path, torch.bfloat16)["matrix"].dtype == torch.bfloat16


def test_packing_twice_changes_nothing(tmp_path):
    state = {"w": torch.randn(64, 128, generator=torch.Generator().manual_seed(1))}
    save_int8(state, tmp_path / "a")
    once = load_int8(tmp_path / "a")
    save_int8(once, tmp_path / "b")
    torch.testing.assert_close(load_int8(tmp_path / "b")["w"], once["w"], rtol=0, atol=2e-3)


def test_rows_have_their_own_scale():
    integers, scale = quantize_rows(torch.stack([torch.linspace(-1, 1, 255), torch.linspace(-100, 100, 255)]))
    assert integers.min() == -127 and integers.max() == 127
    torch.testing.assert_close(scale[1] / scale[0], torch.tensor(100.0, dtype=torch.float16), rtol=2e-3, atol=0)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="inf or nan"):
        save_int8({"w": torch.tensor([float("nan")])}, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must not end"):
        save_int8({f"w{SCALE_SUFFIX}": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no packed weights"):
        load_int8(tmp_path / "missing")
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not packed"):
        load_int8(tmp_path / "plain.safetensors")
