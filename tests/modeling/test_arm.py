"""The Attention Refinement Module: its equations, switches, sizes, training behaviour and losses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from arm_hf.modeling import arm as arm_module
from arm_hf.modeling.arm import AttentionRefinementModule, ScaleBlock, refinement_map
from arm_hf.modeling.configuration_arm import ARMConfig
from arm_hf.modeling.loss import segmentation_loss
from arm_hf.modeling.modeling_arm import ARMModel


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


# -- Eqs. 1 to 5 in plain tensors ------------------------------------------------------------------------------------


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(block: nn.Module, x: torch.Tensor, memory: torch.Tensor | None, heads: int) -> torch.Tensor:
    """One block for one image: x (N, D), memory (M, D) or None for self-attention."""
    a, normed = block.attention, layer_norm(x, block.attention_norm)
    source = normed if memory is None else memory
    q, k, v = linear(normed, a.q_proj), linear(source, a.k_proj), linear(source, a.v_proj)
    d = q.shape[-1] // heads
    mixed = []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        mixed.append((q[:, part] @ k[:, part].T / math.sqrt(d)).softmax(-1) @ v[:, part])
    x = x + linear(torch.cat(mixed, dim=-1), a.out_proj)
    if block.ffn is not None:
        x = x + linear(gelu(linear(layer_norm(x, block.ffn_norm), block.ffn[0])), block.ffn[2])
    return x


def scale_block(block: ScaleBlock, maps: torch.Tensor) -> torch.Tensor:
    """(D, h, w) -> (D, 2h, 2w), pixel by pixel."""
    depth, height, width = maps.shape
    weight, bias = block.upsample.weight, block.upsample.bias
    doubled = torch.zeros(depth, 2 * height, 2 * width, dtype=maps.dtype)
    for y in range(2 * height):
        for x in range(2 * width):
            doubled[:, y, x] = maps[:, y // 2, x // 2] @ weight[:, :, y % 2, x % 2] + bias
    doubled = gelu(doubled)
    if block.depthwise is None:
        return doubled
    padded = F.pad(doubled, (1, 1, 1, 1))
    kernel = block.depthwise.weight[:, 0]  # (D, 3, 3)
    smooth = torch.zeros_like(doubled)
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, dy : dy + 2 * height, dx : dx + 2 * width]
            smooth += kernel[:, dy, dx, None, None] * shifted
    return layer_norm(smooth.permute(1, 2, 0), block.norm).permute(2, 0, 1)


@torch.no_grad()
def arm_by_hand(model: ARMModel, pixels: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M_c and M_r of one image with `clearclip` as host, (Q, H', W') each."""
    arm, config = model.arm, model.config
    features = model.features(pixels, "clearclip")
    height, width = features.trunk.grid
    deep = features.patch_features[0].flatten(0, 1)  # F_d (N, D)
    cosine = F.normalize(deep, dim=-1) @ words.T
    coarse = (model.clip.logit_scale.exp() * cosine).softmax(dim=-1)  # Eq. 1
    coarse = coarse.T.reshape(1, -1, height, width)

    states = torch.cat([features.trunk.hidden_states[layer][0, 1:] for layer in config.fusion_layers], dim=-1)
    if arm.fusion.norm is not None:
        states = layer_norm(states, arm.fusion.norm)
    states = linear(states, arm.fusion.mlp[0])
    if config.mlp_layers == 2:
        states = linear(gelu(states), arm.fusion.mlp[2])  # F_m
    memory = deep if arm.deep_norm is None else layer_norm(deep, arm.deep_norm)
    for block in arm.cross_attention:
        states = attention(block, states, memory, config.num_attention_heads)  # Eq. 2
    for block in arm.self_attention:
        states = attention(block, states, None, config.num_attention_heads)  # Eq. 3
    maps = states.T.reshape(-1, height, width)
    for block in arm.scale_blocks:
        maps = scale_block(block, maps)  # R_v
    refinement = torch.einsum("qd,dhw->qhw", words, maps) * config.refinement_scale  # Eq. 4
    coarse = F.interpolate(coarse, size=refinement.shape[-2:], mode="bilinear", align_corners=False)[0]
    return coarse, refinement


ABLATIONS = [
    {},
    # Table 4: pairs of layers
    *({"fusion_layers": layers} for layers in [(1, 3), (1, 5), (1, 7), (3, 5), (5, 7)]),
    # Table 5: self- and cross-attention
    *(
        {"num_self_attention_layers": own, "num_cross_attention_layers": cross}
        for own, cross in [(0, 0), (0, 1), (1, 0), (2, 1), (1, 2), (2, 2)]
    ),
    # Table 6: without attention, without scale blocks, without both
    {"num_scale_blocks": 0},
    {"num_scale_blocks": 0, "num_self_attention_layers": 0, "num_cross_attention_layers": 0},
    # Further switches of docs
    {"ffn_ratio": None},
    {"mlp_layers": 1, "input_norm": False, "deep_norm": False},
    {"num_scale_blocks": 1, "scale_block": "plain"},
    {"num_attention_heads": 2, "ffn_ratio": 1.5, "refinement_scale": 0.25},
    {"fusion_layers": (7,)},
    {"fusion_layers": (0, 4, 11)},
]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@torch.no_grad()
def test_equations(make_arm, words, options):
    model = make_arm(**options).double()
    for parameter in model.arm.parameters():  # biases and norms start at 0 and 1 and would hide a slip
        parameter.add_(0.05 * noise(*parameter.shape).double())
    pixels, words = noise(1, 3, 48, 64).double(), words.double()
    coarse, refinement = arm_by_hand(model, pixels, words)
    output = model(pixels, class_embeddings=words)
    torch.testing.assert_close(output.coarse_map[0], coarse)
    torch.testing.assert_close(output.refinement_map[0], refinement)
    torch.testing.assert_close(output.logits[0], coarse + refinement)  # Eq. 5


# -- Directions that the paper's equations fix -----------------------------------------------------------------------


class TestDirections:
    @torch.no_grad()
    def test_linear_in_the_coarse_map_with_slope_one(self, arm, pixels, words, monkeypatch):
        plain = arm(pixels, class_embeddings=words)
        coarse_map = arm.coarse_map
        monkeypatch.setattr(arm, "coarse_map", lambda *args: coarse_map(*args) + 0.25)
        shifted = arm(pixels, class_embeddings=words)
        torch.testing.assert_close(shifted.logits, plain.logits + 0.25)
        monkeypatch.setattr(arm, "coarse_map", lambda *args: 3 * coarse_map(*args))
        scaled = arm(pixels, class_embeddings=words)
        torch.testing.assert_close(scaled.logits, plain.logits + 2 * plain.coarse_map)

    @torch.no_grad()
    def test_permuting_the_classes_permutes_the_maps(self, arm, pixels, words):
        order = torch.tensor([3, 0, 4, 2, 1])
        plain = arm(pixels, class_embeddings=words).logits
        torch.testing.assert_close(arm(pixels, class_embeddings=words[order]).logits, plain[:, order])

    @torch.no_grad()
    def test_a_further_class_leaves_the_other_refinement_rows_alone(self, arm, pixels, words):
        plain = arm(pixels, class_embeddings=words)
        more = arm(pixels, class_embeddings=torch.cat([words, noise(1, 64, seed=9)]))
        torch.testing.assert_close(more.refinement_map[:, :5], plain.refinement_map)
        assert (more.coarse_map[:, :5] < plain.coarse_map).all()  # the softmax of Eq. 1 is shared

    @torch.no_grad()
    def test_zero_init_is_the_identity(self, make_arm, pixels, words):
        model = make_arm(zero_init=True)
        output = model(pixels, class_embeddings=words)
        assert output.refinement_map.abs().max() == 0
        torch.testing.assert_close(output.logits, output.coarse_map)
        with_arm = model.segment(pixels, words)
        alone = model.segment(pixels, words, use_arm=False, logit_scale=model.dense.logit_scale)
        agreeing = torch.stack([a.labels == b.labels for a, b in zip(with_arm, alone, strict=True)])
        assert agreeing.float().mean() > 0.9  # probabilities are upsampled here, cosines there

    @torch.no_grad()
    def test_refinement_does_not_depend_on_the_words(self, arm, pixels):
        features = arm.features(pixels)
        assert arm.refinement_features(features).shape == (2, 64, 16, 24)

    @torch.no_grad()
    @pytest.mark.parametrize("count", [1, 64, 65])
    def test_few_words_and_many_words_are_refined_alike(self, arm, pixels, count):
        words = noise(count, 64, seed=count)
        maps = arm.query_maps(pixels, words)
        assert (maps.class_embeddings is None) == (count <= 64)  # up to D words M_r is the smaller one
        expected = arm(pixels, class_embeddings=words).logits
        torch.testing.assert_close(maps.chunk(), expected, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_class_embeddings_are_normalised(self, arm, pixels, words):
        plain, long = (arm(pixels, class_embeddings=factor * words).logits for factor in (1.0, 7.5))
        torch.testing.assert_close(plain, long)

    @torch.no_grad()
    def test_batch_equals_single(self, arm, pixels, words):
        together = arm(pixels, class_embeddings=words).logits
        alone = torch.cat([arm(image[None], class_embeddings=words).logits for image in pixels])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("coarse_form", ["probabilities", "logits"])
    def test_segment_decides_on_the_fused_map(self, make_arm, pixels, words, coarse_form):
        model = make_arm(coarse_form=coarse_form)
        logits = model(pixels, class_embeddings=words).logits
        scores = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
        scores = scores.sigmoid() if coarse_form == "probabilities" else scores.softmax(dim=1)
        decisions = model.segment(pixels, words, return_class_scores=True)
        for decision, expected in zip(decisions, scores, strict=True):
            torch.testing.assert_close(decision.class_scores, expected, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_coarse_scale(self, make_arm, pixels, words):
        model = make_arm(coarse_scale=10.0)
        features = model.features(pixels)
        cosine = F.normalize(features.patch_features, dim=-1) @ words.T
        expected = (10 * cosine).softmax(-1).permute(0, 3, 1, 2)
        torch.testing.assert_close(model.coarse_map(features, words), expected)
        torch.testing.assert_close(
            model.coarse_map(features, words, logit_scale=3.0), (3 * cosine).softmax(-1).permute(0, 3, 1, 2)
        )


# -- Size ------------------------------------------------------------------------------------------------------------

VIT_B16 = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 16}
VIT_L14 = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}


@pytest.mark.parametrize(
    ("vision", "projection", "ffn_ratio", "millions"),
    [
        (VIT_B16, 512, 4.0, 9.46),
        (VIT_B16, 512, None, 5.26),
        (VIT_L14, 768, 4.0, 18.7),
        (VIT_L14, 768, None, 9.3),
    ],
)
def test_number_of_parameters(vision, projection, ffn_ratio, millions):
    clip_config = CLIPConfig(vision_config=vision, projection_dim=projection)
    config = ARMConfig(clip_config=clip_config, ffn_ratio=ffn_ratio)
    with torch.device("meta"):
        module = AttentionRefinementModule(config)
    count = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=4e-3)  # the specification rounds


@pytest.mark.parametrize(("patch", "blocks"), [(8, 1), (14, 1), (16, 2), (32, 3)])
def test_scale_blocks_by_patch(patch, blocks):
    config = ARMConfig(clip_config=CLIPConfig(vision_config={"patch_size": patch}))
    assert config.num_scale_blocks is None and config.num_scale_blocks_for_patch == blocks
    assert ARMConfig(clip_config=CLIPConfig(), num_scale_blocks=0).num_scale_blocks_for_patch == 0


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", ["eomt", "plain"])
def test_cpu_path_of_the_scale_block_is_the_transposed_convolution(kind, rows, monkeypatch):
    monkeypatch.setattr(arm_module, "BAND_VALUES", rows * 4 * 16 * 7)
    block = ScaleBlock(16, kind)
    maps, words = noise(2, 16, 5, 7), noise(3, 16, seed=1)
    expected = block.activation(block.upsample(maps))
    if kind == "eomt":
        expected = block.norm(block.depthwise(expected))
    for gradients in (True, False):  # two paths
        with torch.set_grad_enabled(gradients):
            found, times_three, of_words = block(maps), block(maps, 3.0), block(maps, 3.0, words)
        assert found.shape == (2, 16, 10, 14)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, check_stride=False)
        torch.testing.assert_close(times_three, 3 * expected, atol=1e-5, rtol=1e-4, check_stride=False)
        torch.testing.assert_close(of_words, refinement_map(times_three, words), atol=1e-5, rtol=1e-4)


# -- Configuration ---------------------------------------------------------------------------------------------------


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fusion_layers": (3, 12)}, r"integers from 0 to 11 \(this CLIP has 12 blocks\), got \(3, 12\)"),
            ({"fusion_layers": (-1, 3)}, "fusion_layers must be integers"),
            ({"fusion_layers": (1.5, 3)}, "fusion_layers must be integers"),
            ({"fusion_layers": ()}, "fusion_layers"),
            ({"fusion_layers": (3, 3)}, "must differ"),
            ({"num_attention_heads": 7}, "num_attention_heads must divide CLIP's projection width 64, got 7"),
            ({"num_attention_heads": 0}, "num_attention_heads must divide"),
            ({"mlp_layers": 3}, "mlp_layers must be 1 or 2, got 3"),
            ({"ffn_ratio": 0.0}, "ffn_ratio must be positive or None"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
            ({"num_scale_blocks": -1}, "num_scale_blocks must not be negative"),
            ({"num_cross_attention_layers": -1}, "num_cross_attention_layers must not be negative"),
            ({"num_self_attention_layers": -2}, "num_self_attention_layers must not be negative"),
            ({"coarse_form": "cosine"}, "coarse_form must be one of .*probabilities.*got 'cosine'"),
            ({"scale_block": "bilinear"}, "scale_block must be one of"),
            ({"loss": "dice"}, "loss must be one of"),
            ({"loss_resolution": "half"}, "loss_resolution must be one of"),
            ({"ignored_pixels": "keep"}, "ignored_pixels must be one of"),
            ({"odd_sizes": "crop"}, "odd_sizes must be one of"),
            ({"checkpoint_contents": "all"}, "checkpoint_contents must be one of"),
            ({"weight_packing": "int4"}, "weight_packing must be one of"),
        ],
    )
    def test_impossible_values(self, tiny_clip_config, options, message):
        with pytest.raises(ValueError, match=message):
            ARMConfig(clip_config=tiny_clip_config, **options)

    def test_round_trip(self, tiny_clip_config, tmp_path):
        config = ARMConfig(
            clip_config=tiny_clip_config,
            clip_name_or_path="org/name",
            clip_revision="abc",
            method="sclip",
            method_options={"residual": False},
            fusion_layers=(1, 5),
            ffn_ratio=None,
            background={"threshold": 0.3, "words": ["sky"]},
            templates=["a {}"],
        )
        config.save_pretrained(tmp_path)
        again = ARMConfig.from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        assert again.fusion_layers == (1, 5)
        assert again.clip_config.vision_config.hidden_size == 128

    def test_from_a_dict(self, tiny_clip_config):
        config = ARMConfig(clip_config=tiny_clip_config.to_dict())
        assert config.hidden_size == 64

    def test_default_clip_config(self):
        assert ARMConfig().hidden_size == 512

    def test_unknown_option_of_from_clip(self, tiny_clip):
        with pytest.raises(TypeError, match="unknown option fusion_layer; allowed"):
            ARMModel.from_clip(tiny_clip, fusion_layer=(1, 2))


# -- Computation variants --------------------------------------------------------------------------------------------


class TestComputation:
    @torch.no_grad()
    def test_eager_equals_sdpa(self, arm, pixels, words):
        sdpa = arm(pixels, class_embeddings=words).logits
        arm.set_attn_implementation("eager")
        assert arm.arm.cross_attention[0].attention.config._attn_implementation == "eager"
        assert arm.clip.vision_model.config._attn_implementation == "eager"
        torch.testing.assert_close(arm(pixels, class_embeddings=words).logits, sdpa, atol=1e-5, rtol=1e-4)

    def test_activation_checkpointing_gives_the_same_gradients(self, arm, pixels, words):
        arm.train()
        labels = integers(5, 2, 64, 96)

        def gradients():
            arm.zero_grad()
            arm(pixels, class_embeddings=words, labels=labels).loss.backward()
            return [parameter.grad.clone() for parameter in arm.arm.parameters()]

        plain = gradients()
        runs = []
        arm.arm.self_attention[0].attention_norm.register_forward_hook(lambda *_: runs.append(1))
        arm.activation_checkpointing_enable()
        checkpointed = gradients()
        assert len(runs) == 2  # forward, and once more in the backward pass
        for a, b in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(a, b)
        arm.activation_checkpointing_disable()
        gradients()
        assert len(runs) == 3

    @torch.no_grad()
    def test_compile(self, tiny_clip_config, pixels, words):
        config = copy.deepcopy(tiny_clip_config)
        config.vision_config.num_hidden_layers = 2  # tracing takes a second per block
        arm = ARMModel.from_clip(CLIPModel(config), fusion_layers=(0, 1)).eval()
        torch.compiler.reset()
        compiled = torch.compile(arm, backend="eager")
        expected = arm(pixels, class_embeddings=words).logits
        torch.testing.assert_close(compiled(pixels, class_embeddings=words).logits, expected)

    @torch.no_grad()
    def test_bfloat16(self, arm, pixels, words):
        exact = arm(pixels, class_embeddings=words)
        half = arm.to(torch.bfloat16)(pixels, class_embeddings=words)
        assert half.logits.dtype == torch.bfloat16
        cosine = F.cosine_similarity(exact.refinement_map.flatten(), half.refinement_map.float().flatten(), dim=0)
        assert cosine > 0.99

    def test_autocast_and_hooks_get_their_calls_without_gradients(self, arm, pixels, words):
        seen = []
        with torch.no_grad():
            exact = arm(pixels, class_embeddings=words)
            with torch.autocast("cpu", torch.bfloat16):
                half = arm(pixels, class_embeddings=words)
            parts = (arm.arm.scale_blocks[0].depthwise, arm.arm.self_attention[0].attention.out_proj)
            for part in parts:
                part.register_forward_hook(lambda module, *_: seen.append(module))
            watched = arm(pixels, class_embeddings=words)
        torch.testing.assert_close(half.logits.float(), exact.logits, atol=0.1, rtol=0.1)
        assert [id(part) for part in seen] == [id(parts[1]), id(parts[0])]
        torch.testing.assert_close(watched.logits, exact.logits, atol=1e-5, rtol=1e-5)

    def test_autocast_trains(self, arm, pixels, words):
        arm.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = arm(pixels, class_embeddings=words, labels=integers(5, 2, 64, 96)).loss
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in arm.arm.parameters())

    def test_training_leaves_clip_alone(self, arm, pixels, words):
        arm.train()
        assert arm.training and arm.arm.training
        assert not any(module.training for module in arm.clip.modules())
        assert [name for name, p in arm.named_parameters() if p.requires_grad and not name.startswith("arm.")] == []
        before = {key: value.clone() for key, value in arm.state_dict().items()}
        optimizer = torch.optim.AdamW(arm.parameters(), lr=1e-2, weight_decay=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            output = arm(pixels, class_embeddings=words, labels=integers(5, 2, 64, 96))
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
        assert losses[-1] < losses[0]
        changed = {key for key, value in arm.state_dict().items() if not torch.equal(value, before[key])}
        assert {key.split(".")[0] for key in changed} == {"arm"}
        assert changed == {key for key in before if key.startswith("arm.")}

    @torch.no_grad()
    def test_prompts_instead_of_embeddings(self, arm, pixels):
        ids = integers(500, 3, 7)
        ids[:, -1] = 513
        output = arm(pixels, input_ids=ids)
        assert output.class_embeddings.shape == (3, 64)
        again = arm(pixels, class_embeddings=output.class_embeddings)
        torch.testing.assert_close(output.logits, again.logits)
        ensembled = arm(pixels, input_ids=ids[None].expand(2, -1, -1))  # 2 queries of 3 prompts
        mean = F.normalize(output.class_embeddings.mean(dim=0), dim=0)
        torch.testing.assert_close(ensembled.class_embeddings, mean.expand(2, -1))

    @torch.no_grad()
    def test_outputs(self, arm, pixels, words):
        output = arm(pixels, class_embeddings=words, output_hidden_states=True)
        assert output.loss is None
        assert [tuple(state.shape) for state in output.hidden_states] == [(2, 25, 128)] * 2
        assert output.patch_features.shape == (2, 4, 6, 64)
        reference = arm.clip.vision_model(pixels[..., :64], output_hidden_states=True).hidden_states
        square = arm(pixels[..., :64], class_embeddings=words, output_hidden_states=True)
        for state, layer in zip(square.hidden_states, (3, 7), strict=True):
            torch.testing.assert_close(state, reference[layer], atol=1e-5, rtol=1e-4)
        first = arm(pixels, class_embeddings=words, return_dict=False)[0]
        torch.testing.assert_close(first, output.logits)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "either input_ids or class_embeddings"),
            ({"class_embeddings": torch.ones(2, 64), "input_ids": torch.ones(2, 3).long()}, "either input_ids or"),
            ({"class_embeddings": torch.ones(2, 63)}, r"class_embeddings must be \(Q, 64\), got \(2, 63\)"),
            ({"class_embeddings": torch.ones(64)}, r"must be \(Q, 64\)"),
            ({"input_ids": torch.ones(3).long()}, r"input_ids must be \(Q, T\) or \(Q, P, T\)"),
        ],
    )
    def test_impossible_arguments(self, arm, pixels, arguments, message):
        with pytest.raises(ValueError, match=message):
            arm(pixels, **arguments)

    @pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64), (1, 3, 0, 64)])
    def test_impossible_pixels(self, arm, words, shape):
        with pytest.raises(ValueError, match=r"pixel_values must be \(B, 3, H, W\) and not empty"):
            arm(torch.zeros(shape), class_embeddings=words)


# -- Losses ----------------------------------------------------------------------------------------------------------


class TestLoss:
    @staticmethod
    def config(**options):
        return ARMConfig(clip_config=CLIPConfig(), **options)

    @pytest.fixture
    def maps(self):
        return noise(2, 4, 6, 8)

    @pytest.fixture
    def labels(self):
        labels = integers(4, 2, 12, 16)
        labels[:, :3] = 255
        return labels

    def test_bce_is_the_mean_over_classes_and_labelled_pixels(self, maps, labels):
        up = F.interpolate(maps, size=(12, 16), mode="bilinear", align_corners=False).double()
        probability, losses = up.sigmoid(), []
        for b, y, x in (labels != 255).nonzero().tolist():
            for k in range(4):
                p = probability[b, k, y, x]
                losses.append(-(p if labels[b, y, x] == k else 1 - p).log())
        loss = segmentation_loss(maps, labels, self.config())
        torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)

    def test_zeros_keeps_ignored_pixels_with_empty_targets(self, maps, labels):
        up = F.interpolate(maps, size=(12, 16), mode="bilinear", align_corners=False)
        target = torch.stack([(labels == k).float() for k in range(4)], dim=1)
        expected = (-target * F.logsigmoid(up) - (1 - target) * F.logsigmoid(-up)).mean()
        loss = segmentation_loss(maps, labels, self.config(ignored_pixels="zeros"))
        torch.testing.assert_close(loss, expected)

    def test_cross_entropy(self, maps, labels):
        up = F.interpolate(maps, size=(12, 16), mode="bilinear", align_corners=False)
        expected = -up.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0][labels != 255].mean()
        torch.testing.assert_close(segmentation_loss(maps, labels, self.config(loss="cross_entropy")), expected)

    def test_map_resolution_takes_the_nearest_label(self, maps, labels):
        config = self.config(loss_resolution="map")
        torch.testing.assert_close(
            segmentation_loss(maps, labels, config), segmentation_loss(maps, labels[:, ::2, ::2], config)
        )

    @pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_label_types(self, maps, labels, loss, dtype):
        config = self.config(loss=loss)
        expected = segmentation_loss(maps, labels, config)
        torch.testing.assert_close(segmentation_loss(maps, labels.to(dtype), config), expected)

    @pytest.mark.parametrize("ignored", [255, -100])
    def test_region_weighting_counts_every_label_by_the_root_of_its_area(self, maps, labels, ignored):
        labels = torch.where(labels == 255, ignored, labels)
        up = F.interpolate(maps, size=(12, 16), mode="bilinear", align_corners=False)
        per_pixel = F.cross_entropy(up, labels, ignore_index=ignored, reduction="none")
        total, weight = 0.0, 0.0
        for b in range(len(labels)):
            for k in labels[b].unique():
                if k != ignored:
                    inside = labels[b] == k
                    total += per_pixel[b][inside].mean() * inside.sum() ** 0.5
                    weight += inside.sum() ** 0.5
        config = self.config(loss="cross_entropy", pixel_weighting="region", ignore_index=ignored)
        torch.testing.assert_close(segmentation_loss(maps, labels, config), total / weight)

    @pytest.mark.parametrize("pixel_weighting", ["even", "region"])
    @pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
    def test_nothing_labelled_is_zero_not_nan(self, maps, labels, loss, pixel_weighting):
        maps.requires_grad_()
        config = self.config(loss=loss, pixel_weighting=pixel_weighting)
        value = segmentation_loss(maps, torch.full_like(labels, 255), config)
        value.backward()
        assert value == 0 and maps.grad.abs().sum() == 0

    def test_another_ignore_index(self, maps, labels):
        moved = torch.where(labels == 255, -100, labels)
        torch.testing.assert_close(
            segmentation_loss(maps, moved, self.config(ignore_index=-100)),
            segmentation_loss(maps, labels, self.config()),
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda labels: torch.where(labels == 3, 4, labels), r"label values \[4\] are out of range: 4 classes"),
            (lambda labels: labels - 300, "out of range"),
            (lambda labels: labels.float(), "must be integers"),
            (lambda labels: labels[0], r"shape \(B, H, W\)"),
            (lambda labels: labels[:1], "1 label maps for 2 images"),
        ],
    )
    def test_impossible_labels(self, maps, labels, change, message):
        with pytest.raises(ValueError, match=message):
            segmentation_loss(maps, change(labels), self.config())

    def test_loss_on_the_refinement_alone(self, make_arm, pixels, words):
        model = make_arm(loss="bce_refinement")
        labels = integers(5, 2, 64, 96)
        output = model(pixels, class_embeddings=words, labels=labels)
        torch.testing.assert_close(output.loss, segmentation_loss(output.refinement_map, labels, model.config))

    @pytest.mark.parametrize("size", [(50, 71), (64, 96)])
    def test_odd_sizes_are_cropped_before_the_loss(self, arm, words, size):
        labels = integers(5, 1, *size)
        output = arm(noise(1, 3, *size), class_embeddings=words, labels=labels)
        (decision,) = arm.segment(noise(1, 3, *size), words, return_class_scores=True)
        scores = torch.special.logit(decision.class_scores.double())[None]
        expected = segmentation_loss(scores, labels, arm.config)
        torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)
