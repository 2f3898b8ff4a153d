"""The pass through blocks 1..n-1: same numbers as transformers, only what was asked for, and clear errors."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from arm_hf.modeling import attention
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.trunk import POSITION_RULES, TrunkRequest, VisionTower


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_maps_of_any_height_are_added(shift, dtype, monkeypatch):
    """A map does not change when all scores of a row are shifted, not even out of reach of the exponential function."""
    monkeypatch.setattr(attention, "BLOCK_VALUES", 50)
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    query[1, ..., 0], key[1, ..., 0] = 4.0, shift / 2
    totals = [torch.ones(2, 4, 9, 9), torch.zeros(2, 4, 9, 9)]
    expected = ((query * 0.5) @ key.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)
    found = attention.attend_and_add(query, key, value, 0.5, totals)
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found, expected.to(dtype) @ value, **close)
    torch.testing.assert_close(totals[0] - 1, expected, **close)
    torch.testing.assert_close(totals[1], expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
def test_hidden_states_and_maps_are_those_of_transformers(tiny_clip, size):
    image = noise(2, 3, *size)
    tiny_clip.set_attn_implementation("eager")
    reference = tiny_clip.vision_model(
        image, output_hidden_states=True, output_attentions=True, interpolate_pos_encoding=True
    )
    request = TrunkRequest(tuple(range(12)), attention_maps=(0, 5, 10), position_rule="transformers")
    for implementation in ("eager", "sdpa"):
        tiny_clip.set_attn_implementation(implementation)
        trunk = VisionTower(tiny_clip).run(image, request)
        for index, state in trunk.hidden_states.items():
            torch.testing.assert_close(state, reference.hidden_states[index], atol=1e-5, rtol=1e-4)
        for index, weights in trunk.attention_maps.items():
            torch.testing.assert_close(weights, reference.attentions[index], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(trunk.last_input, reference.hidden_states[-2], atol=1e-5, rtol=1e-4)
        assert trunk.grid == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("block_values", [100, 10_000])
def test_sums_of_maps_are_those_of_the_maps(tiny_clip, pixels, block_values, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_VALUES", block_values)
    maps = TrunkRequest(attention_maps=(0, 3, 4))
    sums = TrunkRequest(map_sums=((0, 3), (3, 4)))
    tower = VisionTower(tiny_clip)
    with torch.no_grad():
        kept, found, both = (tower.run(pixels, request) for request in (maps, sums, maps.merge(sums)))
    with_gradients = tower.run(pixels, sums, gradient_checkpointing=True)
    expected = {group: sum(kept.attention_maps[index] for index in group) for group in sums.map_sums}
    for trunk in (found, both, with_gradients):
        torch.testing.assert_close(dict(trunk.map_sums), expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(trunk.last_input, kept.last_input, atol=1e-5, rtol=1e-4)
    assert found.attention_maps == {} and with_gradients.map_sums[0, 3].requires_grad


@torch.no_grad()
def test_one_pass_serves_several_methods(tiny_clip, pixels, words):
    from arm_hf.modeling.method import get_method, list_methods

    dense = DenseCLIP(tiny_clip)
    # The two proxy methods read another model's features; test_proxy_methods.py hands them over.
    methods = [get_method(name) for name in list_methods() if name not in ("proxyclip", "corrclip")]
    settings = [method.settings({"position_rule": "reference"}) for method in methods]
    request = TrunkRequest()
    for method, own in zip(methods, settings, strict=True):
        request = request.merge(method.request(own, 12))
    trunk = dense.run_trunk(pixels, request)
    for method, own in zip(methods, settings, strict=True):
        shared = dense.score_map(dense.apply(method, own, trunk, words), words).values
        alone = dense.features(pixels, method, {"position_rule": "reference"}, class_embeddings=words)
        torch.testing.assert_close(shared, dense.score_map(alone, words).values, atol=1e-5, rtol=1e-4)


def test_requests_with_different_position_rules_do_not_mix():
    with pytest.raises(ValueError, match="'reference' and 'transformers' cannot share one trunk pass"):
        TrunkRequest().merge(TrunkRequest(position_rule="transformers"))


class TestPositionTable:
    def test_reference_rule_uses_the_table_as_it_is_for_as_many_patches(self, tiny_clip):
        tower = VisionTower(tiny_clip)
        table = tiny_clip.vision_model.embeddings.position_embedding.weight
        assert torch.equal(tower.position_table((4, 4)), table)
        assert torch.equal(tower.position_table((2, 8)), table)  # the reference code's quirk
        assert not torch.equal(tower.position_table((2, 8), "transformers"), table)

    @torch.no_grad()
    @pytest.mark.parametrize("grid", [(5, 8), (2, 8), (3, 3), (4, 4), (1, 1), (1, 30)])
    @pytest.mark.parametrize("rule", POSITION_RULES)
    def test_every_grid_has_a_row_per_patch(self, tiny_clip, grid, rule):
        table = VisionTower(tiny_clip).position_table(grid, rule)
        assert table.shape == (grid[0] * grid[1] + 1, 128)
        assert torch.equal(table[0], tiny_clip.vision_model.embeddings.position_embedding.weight[0])

    @torch.no_grad()
    @pytest.mark.parametrize("side", [7, 14, 16, 24])
    def test_reference_rule_never_loses_a_row_to_rounding(self, side):
        config = CLIPConfig(
            vision_config={"image_size": side * 2, "patch_size": 2, "hidden_size": 4, "num_hidden_layers": 1,
                           "num_attention_heads": 1, "intermediate_size": 4},
            text_config={"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4},
        )  # fmt: skip
        tower = VisionTower(CLIPModel(config))
        for length in range(1, 130):
            assert len(tower.position_table((length, 3))) == 3 * length + 1

    def test_unknown_rule(self, tiny_clip):
        with pytest.raises(ValueError, match=r"position_rule must be one of .*'reference'.*got 'nearest'"):
            VisionTower(tiny_clip).position_table((3, 3), "nearest")


def test_layers_that_do_not_exist(tiny_clip, pixels):
    tower = VisionTower(tiny_clip)
    with pytest.raises(ValueError, match=r"hidden state \[12\] does not exist in this CLIP; allowed are 0 to 11"):
        tower.run(pixels, TrunkRequest(hidden_states=(3, 12)))
    with pytest.raises(ValueError, match=r"attention map of block \[11\] does not exist.*0 to 10"):
        tower.run(pixels, TrunkRequest(attention_maps=(11,)))


def test_not_a_clip():
    with pytest.raises(TypeError, match=r"expected a transformers CLIPModel .* got Linear"):
        DenseCLIP(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_image_tower_alone_is_enough(tiny_clip, pixels, words):
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig.from_dict({**tiny_clip.config.vision_config.to_dict(), "projection_dim": 64})
    ).eval()
    missing = vision.load_state_dict(tiny_clip.state_dict(), strict=False).missing_keys
    assert not missing
    ours = DenseCLIP(vision).features(pixels, "sclip").patch_features
    torch.testing.assert_close(ours, DenseCLIP(tiny_clip).features(pixels, "sclip").patch_features)


def test_checkpointing_the_trunk_gives_the_same_gradients(tiny_clip, pixels):
    dense, parameter = DenseCLIP(tiny_clip), tiny_clip.vision_model.encoder.layers[2].mlp.fc1.weight
    gradients = []
    for checkpointing in (False, True):
        tiny_clip.zero_grad()
        dense.features(pixels, "clearclip", gradient_checkpointing=checkpointing).patch_features.sum().backward()
        gradients.append(parameter.grad.clone())
    torch.testing.assert_close(*gradients)
