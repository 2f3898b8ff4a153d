"""The adapter to vision foundation models (timm, transformers), and region maps from mask generators."""

import builtins

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.proxy_features import ProxyFeatures
from arm_hf.modeling.regions import (
    MaskGenerator,
    connected_components,
    correct_labels,
    regions_from_masks,
    resize_nearest,
)

from .conftest import noise

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TRANSFORMERS = {
    "vit": (ViTModel, ViTConfig, {"image_size": 32, "patch_size": 8}, 1),
    "dinov2": (Dinov2Model, Dinov2Config, {"image_size": 56, "patch_size": 14}, 1),
    "dinov2_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"image_size": 56, "patch_size": 14}, 5),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"patch_size": 16, "num_register_tokens": 4}, 5),
}
TIMM = {  # name -> arguments and prefix tokens; the shapes of DINO, DINOv2 and DINOv3, made small
    "vit_base_patch8_224": ({"embed_dim": 32, "depth": 3, "num_heads": 2}, 1),
    "vit_small_patch14_reg4_dinov2": ({"embed_dim": 32, "depth": 3, "num_heads": 2}, 5),
    "vit_small_patch16_dinov3_qkvb": ({"embed_dim": 32, "depth": 3, "num_heads": 2}, 5),
}


def transformers_model(name: str) -> tuple[nn.Module, int]:
    model, config, shape, prefix = TRANSFORMERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(**SMALL, **shape)).eval(), prefix


def imagenet(pixels: torch.Tensor, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD) -> torch.Tensor:
    """CLIP's pixels normalised for another model, the long way."""
    mean, std, clip_mean, clip_std = (
        torch.tensor(values).view(3, 1, 1) for values in (mean, std, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (pixels * clip_std + clip_mean - mean) / std


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_transformers_models(name):
    model, prefix = transformers_model(name)
    patch = model.config.patch_size
    pixels = noise(2, 3, 3 * patch, 5 * patch)
    proxy = ProxyFeatures(model)
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    inputs = []
    attention = [module for module in model.modules() if hasattr(module, "q_proj") or hasattr(module, "query")][-1]
    handle = attention.register_forward_pre_hook(
        lambda _, arguments, keywords: inputs.append((*arguments, *keywords.values())[0]), with_kwargs=True
    )
    tokens = model(imagenet(pixels), **options).last_hidden_state
    handle.remove()
    expected = tokens[:, prefix:].transpose(1, 2).reshape(2, 32, 3, 5)
    torch.testing.assert_close(proxy(pixels), expected, atol=1e-5, rtol=1e-4)

    names = ("q_proj", "k_proj") if hasattr(attention, "q_proj") else ("query", "key")
    query, key = (getattr(attention, role) for role in names)
    both = (query(inputs[0]) + key(inputs[0]))[:, prefix:].transpose(1, 2).reshape(2, 32, 3, 5)
    torch.testing.assert_close(proxy(pixels, "q+k"), both, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not attention._forward_pre_hooks


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_models(name):
    pytest.importorskip("timm")
    options, prefix = TIMM[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        proxy = ProxyFeatures.from_timm(name, pretrained=False, **options)
    (patch, _), model = proxy.patch_size, proxy.model
    if getattr(model.blocks[-1].attn, "q_bias", None) is not None:
        model.blocks[-1].attn.q_bias.normal_()
    pixels = noise(2, 3, 3 * patch, 5 * patch)
    statistics = model.pretrained_cfg
    prepared = imagenet(pixels, statistics["mean"], statistics["std"])
    inputs = []
    handle = model.blocks[-1].attn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    expected = model.forward_features(prepared)[:, prefix:].transpose(1, 2).reshape(2, 32, 3, 5)
    handle.remove()
    torch.testing.assert_close(proxy(pixels), expected, atol=1e-5, rtol=1e-4)

    attention = model.blocks[-1].attn
    biases = [getattr(attention, role, None) for role in ("q_bias", "k_bias", "v_bias")]
    bias = attention.qkv.bias if biases[0] is None else torch.cat(biases)
    query, key, _ = F.linear(inputs[0], attention.qkv.weight, bias)[:, prefix:].chunk(3, dim=-1)
    both = (query + key).transpose(1, 2).reshape(2, 32, 3, 5)
    torch.testing.assert_close(proxy(pixels, "q+k"), both, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_kind_of_the_adapter_goes_first():
    model, _ = transformers_model("vit")
    pixels = noise(1, 3, 16, 16)
    wanted = ProxyFeatures(model)(pixels, "q+k")
    assert torch.equal(ProxyFeatures(model, "q+k")(pixels), wanted)
    assert torch.equal(ProxyFeatures(model, "q+k")(pixels, "tokens"), wanted)


@pytest.mark.parametrize(
    ("size", "scale", "grid"),
    [((64, 96), 1.0, (5, 7)), ((1, 1), 1.0, (1, 1)), ((64, 96), 2.0, (9, 14)), ((64, 96), 0.01, (1, 1))],
)
def test_any_size_becomes_whole_patches(size, scale, grid):
    model, _ = transformers_model("dinov2")
    assert ProxyFeatures(model, scale=scale)(noise(1, 3, *size)).shape == (1, 32, *grid)


@torch.no_grad()
def test_methods_choose_the_kind_and_half_precision_works(tiny_clip):
    model, _ = transformers_model("vit")
    dense, pixels, proxy = DenseCLIP(tiny_clip), noise(2, 3, 64, 96), ProxyFeatures(model)
    regions = torch.arange(6).view(2, 3)
    for method, kind in (("proxyclip", "tokens"), ("corrclip", "q+k")):
        outside = {"proxy_features": proxy, "regions": regions}
        found = dense.features(pixels, method, outside=outside).patch_features
        expected = dense.features(pixels, method, outside={**outside, "proxy_features": proxy(pixels, kind)})
        assert found.shape == (2, 8, 12, 64)
        torch.testing.assert_close(found, expected.patch_features)
    assert proxy.to(torch.bfloat16)(pixels).dtype == torch.bfloat16
    half = DenseCLIP(tiny_clip.bfloat16()).features(pixels.bfloat16(), "corrclip", outside=outside)
    assert half.patch_features.dtype == torch.bfloat16


def test_wrong_models_and_arguments_are_refused(monkeypatch):
    model, _ = transformers_model("vit")
    with pytest.raises(ValueError, match="kind must be one of tokens, q\\+k or None, got 'keys'"):
        ProxyFeatures(model, "keys")
    with pytest.raises(ValueError, match="kind must be one of"):
        ProxyFeatures(model)(noise(1, 3, 8, 8), "values")
    with pytest.raises(ValueError, match="scale must be positive"):
        ProxyFeatures(model, scale=0)
    with pytest.raises(TypeError, match="Linear has no patch size"):
        ProxyFeatures(nn.Linear(2, 2))
    without = nn.Linear(2, 2)
    without.config = model.config
    with pytest.raises(TypeError, match="no attention with query and key"):
        ProxyFeatures(without)
    model.embeddings.forward = lambda *_, **__: torch.zeros(1, 3, 32)
    with pytest.raises(ValueError, match=r"ViTModel gave \(1, 3, 32\) for 4 x 4 patches"):
        ProxyFeatures(model)(noise(1, 3, 32, 32))

    real = builtins.__import__

    def without_timm(name, *arguments, **keywords):
        if name == "timm":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ImportError, match='run "pip install timm"'):
        ProxyFeatures.from_timm("vit_base_patch8_224.dino")


def test_from_transformers_reads_a_folder(tmp_path):
    model, _ = transformers_model("dinov2")
    model.save_pretrained(tmp_path)
    proxy = ProxyFeatures.from_transformers(str(tmp_path), scale=2.0)
    pixels = noise(1, 3, 28, 28)
    assert proxy(pixels).shape == (1, 32, 4, 4)
    torch.testing.assert_close(proxy(pixels), ProxyFeatures(model, scale=2.0)(pixels))


def square(top: int, left: int, side: int, size=(20, 30)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


class TestRegions:
    def test_small_masks_stay_visible(self):
        regions = regions_from_masks([square(4, 4, 3), square(0, 0, 15), torch.from_numpy(square(10, 20, 5))])
        assert regions.dtype == torch.int32
        assert regions[5, 5] == 3 and regions[1, 1] == 1 and regions[12, 22] == 2 and regions[19, 29] == 0
        as_pictures = [Image.fromarray(square(4, 4, 3)), Image.fromarray(square(0, 0, 15))]
        assert (regions_from_masks(as_pictures)[5, 5], regions_from_masks(as_pictures)[1, 1]) == (2, 1)

    def test_no_mask_and_unequal_masks(self):
        assert torch.equal(regions_from_masks([], (4, 5)), torch.zeros(4, 5, dtype=torch.int32))
        with pytest.raises(ValueError, match="give size"):
            regions_from_masks([])
        with pytest.raises(ValueError, match=r"must all be 20 x 30, got one of shape \(4, 5\)"):
            regions_from_masks([square(0, 0, 2), np.zeros((4, 5))])

    @pytest.mark.parametrize("form", ["pipeline", "mask", "segmentation", "list"])
    def test_generators(self, form):
        seen = []

        def generator(image, **options):
            seen.append((image, options))
            bright = np.asarray(image)[..., 0] > 128
            return {
                "pipeline": {"masks": [bright], "scores": [1.0]},
                "mask": [{"mask": bright}],
                "segmentation": [{"segmentation": bright}],
                "list": [bright],
            }[form]

        rgb = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        found = MaskGenerator(generator, points_per_batch=8)((rgb - mean) / std)
        assert torch.equal(found, ((rgb[:, 0] * 255).round() > 128).int())
        assert seen[0][0].size == (30, 20) and seen[0][1] == {"points_per_batch": 8}

    @pytest.mark.parametrize("size", [(3, 5), (20, 30), (47, 61), (1, 1)])
    def test_nearest_is_that_of_torch_for_any_id(self, size):
        maps = torch.randint(0, 1000, (2, 20, 30), generator=torch.Generator().manual_seed(0))
        expected = F.interpolate(maps[None].float(), size=size, mode="nearest")[0].long()
        assert torch.equal(resize_nearest(maps, size), expected)
        assert torch.equal(resize_nearest(maps + 2**40, size), expected + 2**40)

    def test_components_are_dbscan_with_one_sample(self):
        cluster = pytest.importorskip("sklearn.cluster")
        for seed in range(20):
            points = noise(40, 2, seed=seed)
            distance = torch.cdist(points, points)
            expected = torch.from_numpy(
                cluster.DBSCAN(eps=0.4, min_samples=1, metric="precomputed").fit_predict(distance.numpy())
            )
            assert torch.equal(connected_components(distance <= 0.4).unique(return_inverse=True)[1], expected)
        chain = torch.eye(300).roll(1, 0).bool() | torch.eye(300).roll(-1, 0).bool()
        assert not connected_components(chain).any()

    def test_map_correction(self):
        labels = np.array([[0, 0, 1, 2], [0, 3, 1, 2], [4, 4, 3, 3]])
        regions = np.array([[0, 0, 5, 5], [0, 0, 5, 5], [7, 7, 7, 7]])
        corrected = correct_labels(labels, regions)
        assert isinstance(corrected, np.ndarray) and corrected.dtype == labels.dtype
        expected = [[0, 0, 1, 1], [0, 3, 1, 1], [3, 3, 3, 3]]  # ties go to the smallest label
        assert corrected.tolist() == expected
        assert correct_labels(torch.from_numpy(labels).int(), regions).tolist() == expected
        assert correct_labels(labels, regions, unsegmented=-1)[1, 1] == 0
        assert correct_labels(labels, regions[:, ::2]).tolist() == expected
        with pytest.raises(ValueError, match=r"must be \(H, W\)"):
            correct_labels(labels[None], regions)
