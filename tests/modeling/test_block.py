"""A block computed on the CPU without gradients is transformers' block."""

import copy

import pytest
import torch
from torch import nn

from arm_hf.modeling.block import add_projection, feed_forward, is_plain, run_block


@pytest.fixture
def block(tiny_clip):
    torch.manual_seed(0)
    block = tiny_clip.vision_model.encoder.layers[0]
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.2)
    return block.eval()


@pytest.fixture
def hidden(tiny_clip):
    return torch.randn(2, 17, tiny_clip.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("wanted", [{}, {"return_heads": True}, {"return_map": True}])
def test_without_gradients_the_numbers_are_those_of_transformers(block, hidden, activation, wanted):
    from transformers.activations import ACT2FN

    block.mlp.activation_fn = ACT2FN[activation]
    kept = hidden.clone()
    with torch.no_grad():
        expected = block(hidden, attention_mask=None)
        found = run_block(block, hidden, **wanted)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, kept, atol=0, rtol=0)


def test_gradients_flow_as_in_transformers(block, hidden):
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    run_block(block, inputs[0])[0].square().sum().backward()
    block(inputs[1], attention_mask=None).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_a_layer_that_is_more_than_a_product_is_called(block, hidden, name):
    """Adapters and hooks must see the call."""
    called = []
    listening = copy.deepcopy(block)
    getattr(listening.mlp, name).register_forward_hook(lambda module, given, out: called.append(name) or 2 * out)
    with torch.no_grad():
        expected = hidden + listening.mlp(listening.layer_norm2(hidden))
        assert called == [name]
        torch.testing.assert_close(feed_forward(listening, hidden), expected)
    assert called == [name, name]


def test_what_a_plain_layer_is():
    assert is_plain(nn.Linear(4, 4))
    assert not is_plain(nn.Linear(4, 4, bias=False))
    assert not is_plain(nn.Linear(4, 4).bfloat16())
    assert not is_plain(nn.Sequential(nn.Linear(4, 4)))


@torch.no_grad()
def test_a_projection_is_added_to_what_was_there():
    linear, states = nn.Linear(6, 4), torch.randn(2, 3, 5, 6).transpose(1, 2)
    turned, repeated = torch.randn(2, 3, 5, 4).transpose(1, 2), torch.randn(4).expand(2, 5, 3, 4)
    for residual in (torch.randn(2, 5, 3, 4), turned, repeated):
        torch.testing.assert_close(add_projection(residual, linear, states), residual + linear(states))
