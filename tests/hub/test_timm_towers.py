"""Towers of timm and checkpoints of open_clip become the same CLIP in transformers."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from transformers import CLIPModel

from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pipeline_arm import OpenVocabSegmentationPipeline
from arm_hf.segmenting import load_pipeline
from arm_hf.timm_towers import (
    clip_from_open_clip,
    config_from_open_clip,
    join_towers,
    load_open_clip,
    vision_from_timm,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 24}
WIDTH, TEXT_WIDTH, DIM = 64, 32, 24


def model_cfg(quick_gelu: bool) -> dict:
    return {
        "embed_dim": DIM,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": WIDTH, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 514, "width": TEXT_WIDTH, "heads": 2, "layers": 2},
    }


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A transformer block as open_clip names it."""

    def __init__(self, width: int, heads: int, activation: nn.Module):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        for name, part in (("c_fc", nn.Linear(width, 4 * width)), ("gelu", activation)):
            self.mlp.add_module(name, part)
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, activation: nn.Module):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Reference(nn.Module):
    """CLIP in plain torch, from Radford et al. (2021) section 2.4, with open_clip's names of weights."""

    def __init__(self, quick_gelu: bool):
        super().__init__()
        activation = QuickGELU() if quick_gelu else nn.GELU()
        visual = nn.Module()
        visual.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        visual.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        visual.transformer = Tower(WIDTH, 2, activation)
        visual.proj = nn.Parameter(torch.randn(WIDTH, DIM))
        self.visual = visual
        self.token_embedding = nn.Embedding(514, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(12, TEXT_WIDTH))
        self.transformer = Tower(TEXT_WIDTH, 2, activation)
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.randn(TEXT_WIDTH, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.3)

    def encode_image(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
        return v.ln_post(v.transformer(v.ln_pre(x)))[:, 0] @ v.proj

    def encode_text(self, ids):
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(params=[True, False], ids=["quickgelu", "gelu"])
def reference(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reference(request.param).eval()
    model.quick_gelu = request.param
    return model


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def words() -> torch.Tensor:
    return torch.tensor([[512, 7, 300, 513, 513, 513], [512, 9, 40, 41, 42, 513]])


@torch.no_grad()
def test_both_sides_of_an_open_clip_checkpoint(reference):
    clip = clip_from_open_clip(reference.state_dict(), config_from_open_clip(model_cfg(reference.quick_gelu)))
    image = clip.get_image_features(pixels()).pooler_output
    text = clip.get_text_features(words()).pooler_output
    assert torch.allclose(image, reference.encode_image(pixels()), atol=1e-4, rtol=1e-5)
    assert torch.allclose(text, reference.encode_text(words()), atol=1e-4, rtol=1e-5)
    assert clip.logit_scale == reference.logit_scale
    other = clip_from_open_clip(reference.state_dict(), config_from_open_clip(model_cfg(not reference.quick_gelu)))
    assert not torch.allclose(other.get_image_features(pixels()).pooler_output, image, atol=1e-3)


@torch.no_grad()
def test_newer_names_of_the_text_side(reference):
    config = config_from_open_clip(model_cfg(reference.quick_gelu))
    state = {
        (key if key.startswith(("visual.", "logit")) else f"text.{key}"): value
        for key, value in reference.state_dict().items()
    }
    state["text.text_projection.weight"] = state.pop("text.text_projection").T
    state["text.attn_mask"] = torch.zeros(12, 12)
    got, plain = clip_from_open_clip(state, config), clip_from_open_clip(reference.state_dict(), config)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in got.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"])
def test_a_random_timm_tower(name):
    tower = timm.create_model(name, pretrained=False, **SMALL).eval()
    tower.pretrained_cfg = {}
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.1)
    tower.head.bias.zero_()
    clip = vision_from_timm(tower)
    assert clip.config.hidden_act == ("quick_gelu" if "quickgelu" in name else "gelu")
    output = clip(pixels())
    assert torch.allclose(output.image_embeds, tower(pixels()), atol=1e-5)
    tokens = clip.vision_model.post_layernorm(output.last_hidden_state)
    assert torch.allclose(tokens, tower.forward_features(pixels()), atol=1e-5)
    # and so the dense methods run on it
    assert DenseCLIP(clip).features(pixels(40), "sclip").patch_features.shape == (2, 5, 5, DIM)


@torch.no_grad()
def test_timms_own_conversion_agrees(reference):
    """open_clip weights through timm, then through us, are what they are directly."""
    kind = "quickgelu_224" if reference.quick_gelu else "224"
    tower = timm.create_model(f"vit_base_patch16_clip_{kind}", pretrained=False, **{**SMALL, "depth": 2}).eval()
    tower.pretrained_cfg = {}
    tower.load_state_dict(checkpoint_filter_fn(reference.state_dict(), tower))
    assert torch.allclose(tower(pixels()), reference.encode_image(pixels()), atol=1e-4)
    assert torch.allclose(vision_from_timm(tower)(pixels()).image_embeds, tower(pixels()), atol=1e-5)


@torch.no_grad()
def test_weights_that_need_quickgelu_get_it():
    """timm runs OpenAI's weights with GELU under the plain name; its note on them decides here."""
    plain = timm.create_model("vit_base_patch16_clip_224.openai", pretrained=False, **SMALL).eval()
    quick = timm.create_model("vit_base_patch16_clip_quickgelu_224.openai", pretrained=False, **SMALL).eval()
    plain.head.bias.zero_()
    nn.init.normal_(plain.head.weight)
    quick.load_state_dict(plain.state_dict())
    clip = vision_from_timm(plain)
    assert clip.config.hidden_act == "quick_gelu"
    assert torch.allclose(clip(pixels()).image_embeds, quick(pixels()), atol=1e-5)
    assert not torch.allclose(clip(pixels()).image_embeds, plain(pixels()), atol=1e-5)
    laion = timm.create_model("vit_base_patch16_clip_224.laion2b", pretrained=False, **SMALL)
    laion.head.bias.data.zero_()
    assert vision_from_timm(laion).config.hidden_act == "gelu"


def test_joined_with_the_words_of_another(tiny_clip):
    tower = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", pretrained=False, **{**SMALL, "num_classes": 64}
    ).eval()
    tower.head.bias.data.zero_()
    vision = vision_from_timm(tower)
    joined = join_towers(vision, tiny_clip)
    assert isinstance(joined, CLIPModel)
    with torch.no_grad():
        assert torch.equal(joined.get_image_features(pixels()).pooler_output, vision(pixels()).image_embeds)
        ids = words()
        assert torch.equal(joined.get_text_features(ids).pooler_output, tiny_clip.get_text_features(ids).pooler_output)
        assert joined.logit_scale == tiny_clip.logit_scale
    tower.reset_classifier(10)
    tower.head.bias.data.zero_()
    with pytest.raises(ValueError, match="projects to 10 numbers, the text side to 64"):
        join_towers(vision_from_timm(tower), tiny_clip)


def test_a_repository_of_timm_becomes_a_segmenter(tmp_path, reference, tiny_tokenizer, photo):
    record = {
        "model_cfg": model_cfg(reference.quick_gelu),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "interpolation": "bicubic"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    state = {key: value.contiguous() for key, value in reference.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    tiny_tokenizer.save_pretrained(tmp_path)
    clip, tokenizer, processor = load_open_clip(str(tmp_path))
    assert clip.config.vision_config.hidden_act == ("quick_gelu" if reference.quick_gelu else "gelu")
    assert list(processor.image_std) == [0.25, 0.5, 0.5] and not processor.do_center_crop
    model = ARMModel.from_clip(clip, fusion_layers=(0, 1), num_attention_heads=2)
    pipe = OpenVocabSegmentationPipeline(model=model, tokenizer=tokenizer, image_processor=processor)
    result = pipe(photo, candidate_labels="a, b", templates=["{}"], semantic=True)
    assert result["semantic_map"].shape == (photo.height, photo.width)
    # and where the package loads models by name
    pipe = load_pipeline(str(tmp_path), device="cpu")
    assert type(pipe.model).__name__ == "CLIPModel"
    result = pipe(photo, candidate_labels="a, b", templates=["{}"], semantic=True, method="sclip")
    assert result["semantic_map"].shape == (photo.height, photo.width)
    with pytest.raises(ValueError, match="cannot load the model 'timm/absent': timm/absent has no open_clip_config"):
        load_pipeline("timm/absent", device="cpu")


def test_what_is_no_plain_clip_is_refused(tmp_path, reference):
    with pytest.raises(OSError, match="has no open_clip_config"):
        load_open_clip(str(tmp_path))
    cfg = model_cfg(True)
    for part, key, value in (
        ("vision_cfg", "timm_model_name", "convnext"),
        ("vision_cfg", "layers", [1, 2]),
        ("text_cfg", "hf_model_name", "roberta"),
    ):
        with pytest.raises(ValueError, match=f"only plain ViT CLIPs can be read; this config has {part}.{key}"):
            config_from_open_clip({**cfg, part: {**cfg[part], key: value}})
    state = reference.state_dict()
    with pytest.raises(ValueError, match="do not fit"):
        clip_from_open_clip({**state, "visual.extra": torch.zeros(1)}, config_from_open_clip(cfg))
    with pytest.raises(ValueError, match=r"no weight 'ln_final\.weight'"):
        clip_from_open_clip({k: v for k, v in state.items() if "ln_final" not in k}, config_from_open_clip(cfg))
    with pytest.raises(ValueError, match="do not fit"):
        wider = {**cfg, "embed_dim": 32}
        clip_from_open_clip(state, config_from_open_clip(wider))
    with pytest.raises(ValueError, match="expected a CLIP image tower"):
        vision_from_timm(timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1))
    classifier = timm.create_model("vit_base_patch16_clip_224", pretrained=False, **SMALL)
    nn.init.ones_(classifier.head.bias)
    with pytest.raises(ValueError, match="has a bias"):
        vision_from_timm(classifier)
