"""The table of known CLIPs: sizes that add up, and settings that run."""

import pytest
import torch
from timm.models import get_pretrained_cfg
from transformers import CLIPConfig, CLIPModel

from arm_hf.known_models import KNOWN_MODELS, SHAPES, known_model
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.modeling_arm import ARMModel

ONE_OF_A_SHAPE = {model.shape: model for model in KNOWN_MODELS}

# Millions of parameters of both towers as open_clip's table of models gives them; the 378 px one differs from H/14 by
# its position table alone, (27^2 - 16^2) * 1280.
PARAMETERS = {
    "B/32": 151.28,
    "B/16": 149.62,
    "L/14": 427.62,
    "L/14-336": 427.94,
    "H/14": 986.11,
    "H/14-378": 986.71,
    "g/14": 1366.68,
    "bigG/14": 2539.57,
}


def test_every_shape_is_that_of_a_model():
    assert set(ONE_OF_A_SHAPE) == set(SHAPES) == set(PARAMETERS)
    assert len({model.id for model in KNOWN_MODELS}) == len(KNOWN_MODELS)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_sizes_add_up(shape):
    model = ONE_OF_A_SHAPE[shape]
    clip, _ = model.num_parameters()
    assert round(clip / 1e6, 2) == PARAMETERS[shape]
    config, sizes = model.arm_config(), model.sizes
    assert config.hidden_size == sizes.projection_dim
    assert sizes.image_size % sizes.patch_size == 0
    assert sizes.width % sizes.heads == 0 and sizes.text_width % sizes.text_heads == 0
    assert max(config.fusion_layers) < sizes.layers
    # x8, x4, x2: Table 6's "scale blocks" by the rule of EoMT
    assert config.num_scale_blocks_for_patch == {32: 3, 16: 2, 14: 1}[sizes.patch_size]
    assert config.clip_config.text_config.eos_token_id == 49407


def test_sizes_of_arm():
    """The figures that follow from the paper's decisions: 9.5 M with ViT-B/16, 18.7 M with L/14."""
    sizes = {shape: ONE_OF_A_SHAPE[shape].num_parameters()[1] / 1e6 for shape in ("B/16", "L/14")}
    assert sizes == {"B/16": pytest.approx(9.47, abs=0.01), "L/14": pytest.approx(18.71, abs=0.01)}
    small = known_model("openai/clip-vit-base-patch16").arm_config(ffn_ratio=None)
    assert small.ffn_ratio is None and small.clip_name_or_path == "openai/clip-vit-base-patch16"


@pytest.mark.parametrize("model", [m for m in KNOWN_MODELS if m.format == "open_clip"], ids=lambda m: m.id)
def test_timm_says_the_same(model):
    """Patch, input size, width of the projection, licence and activation, from timm's own records."""
    name = model.id.removeprefix("timm/")
    cfg = get_pretrained_cfg(name)
    sizes = model.sizes
    assert cfg.hf_hub_id == model.id
    assert cfg.num_classes == sizes.projection_dim and cfg.input_size[-1] == sizes.image_size
    assert f"patch{sizes.patch_size}_" in name
    natively_quick = any("natively QuickGELU" in note for note in cfg.notes or ())
    assert model.hidden_act == ("quick_gelu" if natively_quick else "gelu")
    if model.trained_on.startswith("DFN"):
        assert cfg.license == model.licence


def test_lookup():
    assert known_model("openai/clip-vit-large-patch14-336").sizes.image_size == 336
    assert known_model("timm/vit_base_patch16_clip_quickgelu_224.openai").id == "timm/vit_base_patch16_clip_224.openai"
    assert known_model("somebody/else") is None
    assert "Table 4" in known_model("openai/clip-vit-base-patch16").evidence
    assert "untried" in known_model("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k").evidence


@pytest.mark.parametrize("shape", ["B/16", "L/14", "H/14", "g/14", "bigG/14"])
def test_recommended_settings_run_on_a_narrow_tower_of_that_depth(shape, tiny_clip_config):
    model = ONE_OF_A_SHAPE[shape]
    record = tiny_clip_config.to_dict()
    record["vision_config"].update(
        num_hidden_layers=model.sizes.layers, hidden_size=32, intermediate_size=32, num_attention_heads=2
    )
    record["vision_config"]["patch_size"] = model.sizes.patch_size
    record["vision_config"]["image_size"] = 2 * model.sizes.patch_size
    record["text_config"].update(num_hidden_layers=1)
    clip = CLIPModel(CLIPConfig.from_dict(record)).eval()
    pixels = torch.randn(1, 3, 2 * model.sizes.patch_size, 3 * model.sizes.patch_size)
    words = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    with torch.no_grad():
        arm = ARMModel.from_clip(clip, fusion_layers=model.fusion_layers).eval()
        scale = 2**arm.config.num_scale_blocks_for_patch
        assert arm(pixels, class_embeddings=words).logits.shape == (1, 3, 2 * scale, 3 * scale)
        for method, options in model.method_settings.items():
            features = DenseCLIP(clip).features(pixels, method, options, class_embeddings=words)
            assert features.patch_features.shape == (1, 2, 3, 64), method
