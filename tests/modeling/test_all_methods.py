"""What every registered method must do; a new method is tested here without a line of its own."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from arm_hf.modeling import dense_clip
from arm_hf.modeling import method as method_module
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.method import (
    Method,
    MethodSettings,
    get_method,
    list_methods,
    register_method,
    setting,
)
from arm_hf.modeling.trunk import TrunkRequest

FIRST_FIVE = {"clip", "maskclip", "sclip", "clearclip", "naclip"}
every_method = pytest.mark.parametrize("name", list_methods())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Stands for the features of another model, on its own grid."""
    return F.avg_pool2d(pixels, 8).float()


def quadrants(pixels: torch.Tensor) -> torch.Tensor:
    """Stands for a generator of regions; zero pixels, as padding has them, are a region of their own."""
    rows, columns = (torch.arange(length) // 24 for length in pixels.shape[-2:])
    return (rows[:, None] % 2 + 2 * (columns % 2)).masked_fill((pixels == 0).all(dim=1), 9)


# What methods need that read other models.
OUTSIDE = {
    "proxyclip": {"proxy_features": patches},
    "corrclip": {"proxy_features": patches, "regions": quadrants},
}


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """Hands `OUTSIDE` to the methods that need it."""
    apply = DenseCLIP.apply

    def with_outside(self, method, settings, trunk, words=None, background=(), outside=None):
        return apply(self, method, settings, trunk, words, background, outside or OUTSIDE.get(method.name))

    monkeypatch.setattr(DenseCLIP, "apply", with_outside)


@pytest.fixture
def dense(tiny_clip) -> DenseCLIP:
    return DenseCLIP(tiny_clip)


@torch.no_grad()
def scores(dense: DenseCLIP, name: str, pixels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The score map of a method, (B, Q, h, w)."""
    return dense.query_maps(pixels, words, name).coarse


def test_the_first_five_are_registered():
    assert set(list_methods()) >= FIRST_FIVE
    assert set(dense_clip.BUILT_IN_METHODS) <= set(list_methods())


@every_method
class TestEveryMethod:
    @torch.no_grad()
    def test_shapes(self, dense, pixels, words, name):
        found = dense.features(pixels, name, class_embeddings=words)
        assert found.patch_features.shape[0] == 2
        assert found.patch_features.shape[-1] == words.shape[1]
        maps = dense.query_maps(pixels, words, name)
        assert maps.coarse.shape[:2] == (2, 5)
        assert torch.isfinite(maps.coarse).all()
        decisions = dense.segment(pixels, words, method=name)
        assert [tuple(decision.labels.shape) for decision in decisions] == [(64, 96)] * 2
        assert all(decision.labels.min() >= 0 and decision.labels.max() < 5 for decision in decisions)
        assert all(decision.confidence.min() >= 0 and decision.confidence.max() <= 1.001 for decision in decisions)

    def test_batch_equals_single(self, dense, pixels, words, name):
        together = scores(dense, name, pixels, words)
        alone = torch.cat([scores(dense, name, image[None], words) for image in pixels])
        torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-4)

    @pytest.mark.parametrize("size", [(50, 71), (5, 100), (1, 1), (65, 64)])
    def test_any_size(self, dense, words, name, size):
        (decision,) = dense.segment(noise(1, 3, *size), words, method=name)
        assert decision.labels.shape == size
        assert decision.confidence.isfinite().all()

    def test_padding_by_hand_gives_the_same(self, dense, words, name):
        image = noise(1, 3, 50, 71)
        padded = F.pad(image, (4, 5, 7, 7))  # to 64 x 80: the odd pixel goes right
        (ours,) = dense.segment(image, words, method=name)
        (by_hand,) = dense.segment(padded, words, method=name)
        assert torch.equal(ours.labels, by_hand.labels[7:57, 4:75])
        torch.testing.assert_close(ours.confidence, by_hand.confidence[7:57, 4:75])

    def test_deterministic(self, dense, pixels, words, name):
        assert torch.equal(scores(dense, name, pixels, words), scores(dense, name, pixels, words))

    def test_bfloat16_runs_and_is_close(self, dense, tiny_clip, pixels, words, name):
        exact = dense.segment(pixels, words, method=name)
        half = DenseCLIP(tiny_clip.to(torch.bfloat16)).segment(pixels.bfloat16(), words.bfloat16(), method=name)
        agreeing = torch.stack([a.labels == b.labels for a, b in zip(exact, half, strict=True)]).float().mean()
        assert agreeing > 0.8  # random weights: many pixels are near ties

    def test_unknown_setting_names_the_allowed_ones(self, dense, pixels, words, name):
        with pytest.raises(TypeError, match=r"has no setting temprature; allowed are .*logit_scale"):
            dense.features(pixels, name, {"temprature": 1.0}, class_embeddings=words)

    def test_settings_are_documented_and_usable(self, name):
        settings_class = get_method(name).settings_class
        assert issubclass(settings_class, MethodSettings)
        for field in dataclasses.fields(settings_class):
            assert len(field.metadata["help"]) > 10, field.name
        defaults = get_method(name).settings()
        assert get_method(name).settings(dataclasses.asdict(defaults)) == defaults
        with pytest.raises(dataclasses.FrozenInstanceError):
            defaults.logit_scale = 1.0

    def test_described(self, name):
        described = get_method(name)
        assert described.name == name
        for text in (described.paper, described.reference, described.summary, described.cost):
            assert text and "\n" not in text

    @torch.no_grad()
    def test_runs_each_trunk_block_once_and_never_the_last(self, dense, tiny_clip, pixels, words, name):
        blocks = tiny_clip.vision_model.encoder.layers
        attention, last_feed_forward, last_calls = [0] * len(blocks), [], []
        for index, block in enumerate(blocks):
            # Not the feed-forward layers: a method may apply one to tokens of its own (cra_dsi).
            projection = block.self_attn.k_proj
            projection.register_forward_hook(lambda *_, i=index: attention.__setitem__(i, attention[i] + 1))
        blocks[-1].mlp.register_forward_hook(lambda *_: last_feed_forward.append(1))
        blocks[-1].register_forward_hook(lambda *_: last_calls.append("block"))
        blocks[-1].self_attn.register_forward_hook(lambda *_: last_calls.append("attention"))
        dense.query_maps(pixels, words, name)
        assert attention[:-1] == [1] * (len(blocks) - 1)
        assert len(last_feed_forward) <= 1
        assert last_calls == []

    @torch.no_grad()
    def test_keeps_only_what_it_asks_for(self, dense, tiny_clip, pixels, words, name):
        # A block whose map or projections are wanted is computed explicitly, the others run their own forward (SDPA).
        own_forward = set()
        for index, block in enumerate(tiny_clip.vision_model.encoder.layers):
            block.register_forward_hook(lambda *_, i=index: own_forward.add(i))
        found = dense.features(pixels, name, hidden_states=(3, 7), class_embeddings=words)
        request = found.method.request(found.settings, 12)
        assert set(found.trunk.attention_maps) == set(request.attention_maps)
        assert set(found.trunk.hidden_states) == {*request.hidden_states, 3, 7}
        summed = {index for group in request.map_sums for index in group}
        assert own_forward == set(range(11)) - {*request.attention_maps, *request.heads, *summed}
        assert set(found.trunk.map_sums) == set(request.map_sums)

    def test_leaves_the_model_and_other_methods_alone(self, dense, tiny_clip, pixels, words, name):
        before = {key: value.clone() for key, value in tiny_clip.state_dict().items()}
        with torch.no_grad():
            plain = tiny_clip.get_image_features(pixels[..., :64]).pooler_output
        others = [other for other in ("clip", "naclip") if other != name]
        expected = {other: scores(dense, other, pixels, words) for other in others}
        scores(dense, name, pixels, words)
        for other in others:
            assert torch.equal(scores(dense, other, pixels, words), expected[other])
        assert all(torch.equal(value, before[key]) for key, value in tiny_clip.state_dict().items())
        with torch.no_grad():
            assert torch.equal(tiny_clip.get_image_features(pixels[..., :64]).pooler_output, plain)

    def test_arm_attaches_and_only_arm_gets_gradients(self, arm, pixels, words, name):
        arm.train()
        labels = torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(0))
        output = arm(pixels, class_embeddings=words, labels=labels, method=name)
        assert output.logits.shape == (2, 5, 16, 24)
        torch.testing.assert_close(output.logits, output.coarse_map + output.refinement_map)
        output.loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in arm.arm.parameters())
        assert all(parameter.grad is None for parameter in arm.clip.parameters())

    @pytest.mark.parametrize("use_arm", [False, True])
    def test_pipeline_accepts_it(self, arm, make_pipe, photo, name, use_arm):
        result = make_pipe(arm)(photo, candidate_labels="cat, grass", method=name, use_arm=use_arm, semantic=True)
        assert result["semantic_map"].shape == (photo.height, photo.width)
        assert sum(segment["pixels"] for segment in result["segments"]) == photo.height * photo.width

    def test_sliding_window(self, dense, words, name):
        decisions = dense.segment(noise(2, 3, 70, 90), words, method=name, window=48, stride=20)
        assert [tuple(decision.labels.shape) for decision in decisions] == [(70, 90)] * 2


# Plain formulas of the last block, in float64 and without any of the package's helpers.
def attention_by_hand(name: str, q: torch.Tensor, k: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    s = q.shape[-1] ** -0.5
    if name == "clip":
        return (s * q @ k.mT).softmax(-1)
    if name == "maskclip":
        return torch.eye(q.shape[-2], dtype=q.dtype)
    if name == "sclip":
        return (s * q @ q.mT).softmax(-1) + (s * k @ k.mT).softmax(-1)
    if name == "clearclip":
        return (s * q @ q.mT).softmax(-1)
    bias = torch.zeros(q.shape[-2], q.shape[-2], dtype=q.dtype)
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    for i, (yi, xi) in enumerate(places, start=1):
        for j, (yj, xj) in enumerate(places, start=1):
            bias[i, j] = torch.exp(torch.tensor(-((yi - yj) ** 2 + (xi - xj) ** 2) / (2 * 5.0**2)))
    return (s * k @ k.mT + bias).softmax(-1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", sorted(FIRST_FIVE))
@torch.no_grad()
def test_last_block_formula(tiny_clip, name, full):
    clip = tiny_clip.double()
    image = noise(1, 3, 48, 64).double()
    hidden = clip.vision_model(image, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    block = clip.vision_model.encoder.layers[-1]
    x = block.layer_norm1(hidden)
    q, k, v = (getattr(block.self_attn, f"{role}_proj")(x).reshape(1, 13, 2, 64).permute(0, 2, 1, 3) for role in "qkv")
    out = block.self_attn.out_proj((attention_by_hand(name, q, k, (3, 4)) @ v).permute(0, 2, 1, 3).reshape(1, 13, 128))
    if full:
        out = out + hidden
        out = out + block.mlp(block.layer_norm2(out))
    expected = clip.visual_projection(clip.vision_model.post_layernorm(out))[:, 1:].reshape(1, 3, 4, 64)
    options = {"residual": full, "mlp": full, "position_rule": "transformers"}
    found = DenseCLIP(clip).features(image, name, options).patch_features
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


class TestRegistry:
    @pytest.fixture(autouse=True)
    def restore(self, monkeypatch) -> Iterator[None]:
        monkeypatch.setattr(method_module, "_METHODS", dict(method_module._METHODS))

    def test_a_method_from_outside_works_everywhere(self, arm, tiny_clip, make_pipe, photo, pixels, words):
        @dataclasses.dataclass(frozen=True)
        class ToySettings(MethodSettings):
            layer: int = setting(5, "hidden state that is projected")

        @register_method(
            "toy",
            settings=ToySettings,
            paper="none",
            summary="an early layer",
            request=lambda settings, num_blocks: TrunkRequest(hidden_states=(settings.layer,)),
        )
        def toy(context, settings):
            return context.tower.project(context.trunk.hidden_states[settings.layer])[:, 1:]

        assert "toy" in list_methods()
        dense = DenseCLIP(tiny_clip)
        with torch.no_grad():
            five = dense.features(pixels, "toy").patch_features
            two = dense.features(pixels, "toy", {"layer": 2}).patch_features
        assert five.shape == (2, 4, 6, 64)
        assert not torch.allclose(five, two)
        assert arm(pixels, class_embeddings=words, method="toy").logits.shape == (2, 5, 16, 24)
        for model in (arm, tiny_clip):
            result = make_pipe(model)(photo, candidate_labels="cat, sky", method="toy", method_options={"layer": 3})
            assert {segment["label"] for segment in result} <= {"cat", "sky"}

    def test_a_class_with_scores_of_its_own(self, tiny_clip, pixels, words):
        @register_method("own_scores", paper="none", summary="a class")
        class OwnScores(Method):
            needs_class_embeddings = True

            def patch_features(self, context, settings):
                assert context.class_embeddings is not None
                return context.tower.project(context.trunk.last_input)[:, 1:]

            def score_map(self, context, settings, patch_features):
                values = torch.zeros(2, 5, *patch_features.shape[1:3])
                values[:, 3] = 0.5
                return method_module.ScoreMap(values, "none")

        dense = DenseCLIP(tiny_clip)
        decision = dense.segment(pixels, words, method="own_scores")[0]
        assert (decision.labels == 3).all()
        torch.testing.assert_close(decision.confidence, torch.full((64, 96), 0.5))
        with pytest.raises(ValueError, match="needs class_embeddings"):
            dense.features(pixels, "own_scores")

    def test_unknown_name_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown method 'clearclp'.*clearclip.*Did you mean 'clearclip'"):
            get_method("clearclp")

    def test_overwriting_warns_and_bad_names_are_refused(self):
        with pytest.warns(UserWarning, match="'clip' was registered before"):
            register_method("clip")(lambda context, settings: None)
        with pytest.raises(ValueError, match="letters, digits and underscores"):
            register_method("two words")
