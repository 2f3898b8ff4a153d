"""CLIPs of the Hub by id: shape, activation, licence, and what is recommended for dense prediction with them.

The table answers questions about a model before anything is downloaded (will ARM fit, how large will it be, which
layers, which settings), and fills the cards. It is not a limit: every CLIP that transformers loads works.

Sources: shapes and activations from the configs of open_clip and timm (a `quickgelu` in the name, or timm's note
"natively QuickGELU"); ids and licences from the model pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClipShape:
    """Sizes of both towers.

    Attributes:
        patch_size, image_size: In pixels; `image_size` is that of pre-training and fixes the position table.
        width, layers, heads, mlp: Of the image tower.
        projection_dim: D, the width that images and words share; ARM works in it.
        text_width, text_layers, text_heads, text_mlp: Of the text tower.
    """

    patch_size: int
    image_size: int
    width: int
    layers: int
    heads: int
    mlp: int
    projection_dim: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int


SHAPES: Mapping[str, ClipShape] = {
    "B/32": ClipShape(32, 224, 768, 12, 12, 3072, 512, 512, 12, 8, 2048),
    "B/16": ClipShape(16, 224, 768, 12, 12, 3072, 512, 512, 12, 8, 2048),
    "L/14": ClipShape(14, 224, 1024, 24, 16, 4096, 768, 768, 12, 12, 3072),
    "L/14-336": ClipShape(14, 336, 1024, 24, 16, 4096, 768, 768, 12, 12, 3072),
    "H/14": ClipShape(14, 224, 1280, 32, 16, 5120, 1024, 1024, 24, 16, 4096),
    "H/14-378": ClipShape(14, 378, 1280, 32, 16, 5120, 1024, 1024, 24, 16, 4096),
    "g/14": ClipShape(14, 224, 1408, 40, 16, 6144, 1024, 1024, 24, 16, 4096),
    "bigG/14": ClipShape(14, 224, 1664, 48, 16, 8192, 1280, 1280, 32, 20, 5120),
}

PAPER_LAYERS = (3, 7)


@dataclass(frozen=True)
class KnownModel:
    """A CLIP of the Hub.

    Attributes:
        id: Hub id.
        shape: Key of `SHAPES`.
        hidden_act: "quick_gelu" or "gelu", as the weights were trained; the other one loads too and is wrong.
        licence: Of the weights, as their page says.
        trained_on: Image-text pairs it was trained on.
        format: "transformers" loads with `CLIPModel.from_pretrained` (and so by name everywhere in this package);
            "open_clip" is read by `arm_hf.timm_towers.load_open_clip`.
        fusion_layers: Recommended l_i, l_j for ARM.
        evidence: What that recommendation rests on.
    """

    id: str
    shape: str
    hidden_act: str
    licence: str
    trained_on: str
    format: str = "transformers"
    fusion_layers: tuple[int, int] = PAPER_LAYERS

    @property
    def sizes(self) -> ClipShape:
        """The numbers behind `shape`."""
        return SHAPES[self.shape]

    @property
    def evidence(self) -> str:
        """What the recommended layers rest on."""
        if self.shape == "B/16":
            return "the best of six pairs in Table 4 of the ARM paper"
        if self.shape.startswith("L/14"):
            return "the only pair the ARM paper names; its L/14 results use no other"
        return "the pair of the ARM paper, untried at this depth and patch size"

    @property
    def method_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of the methods whose values depend on the tower, by method; all others keep their defaults.

        `cliper` has values for VOC21 of its code (B/16, and L/14 for the deeper towers; `CLIPER_OPTIONS` has the other
        sets), `resclip` the layers its code uses at any depth, `cra_dsi` the relative depth of its paper.
        """
        from arm_hf.modeling.layer_fusion_methods import CLIPER_OPTIONS

        depth = self.sizes.layers
        return {
            "cliper": dict(CLIPER_OPTIONS["voc21", "L/14" if depth >= 24 else "B/16"]),
            "resclip": {"rcs_layers": (6, 9)},
            "cra_dsi": {"layer": 5 if depth == 12 else round(depth * 9 / 24)},
        }

    def clip_config(self) -> Any:
        """The `CLIPConfig` of these weights."""
        from transformers import CLIPConfig

        sizes = self.sizes
        shared = {"hidden_act": self.hidden_act, "projection_dim": sizes.projection_dim}
        return CLIPConfig(
            projection_dim=sizes.projection_dim,
            vision_config={
                **shared,
                "patch_size": sizes.patch_size,
                "image_size": sizes.image_size,
                "hidden_size": sizes.width,
                "num_hidden_layers": sizes.layers,
                "num_attention_heads": sizes.heads,
                "intermediate_size": sizes.mlp,
            },
            text_config={
                **shared,
                "hidden_size": sizes.text_width,
                "num_hidden_layers": sizes.text_layers,
                "num_attention_heads": sizes.text_heads,
                "intermediate_size": sizes.text_mlp,
                "vocab_size": 49408,
                "bos_token_id": 49406,
                "eos_token_id": 49407,
                "pad_token_id": 49407,
            },
        )

    def arm_config(self, **options: Any) -> Any:
        """The `ARMConfig` that is recommended for these weights; `options` are further fields of it."""
        from arm_hf.modeling.configuration_arm import ARMConfig

        named = {"clip_name_or_path": self.id} if self.format == "transformers" else {}
        return ARMConfig(clip_config=self.clip_config(), **{**named, "fusion_layers": self.fusion_layers, **options})

    def num_parameters(self) -> tuple[int, int]:
        """Parameters of the CLIP and of an ARM on it; nothing is allocated."""
        import torch
        from transformers import CLIPModel

        from arm_hf.modeling.arm import AttentionRefinementModule

        with torch.device("meta"):
            parts = CLIPModel(self.clip_config()), AttentionRefinementModule(self.arm_config())
        clip, arm = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
        return clip, arm


_OPENAI = ("quick_gelu", "mit", "WIT-400M (OpenAI, not public)")
_LAION = ("gelu", "mit", "LAION-2B")
_METACLIP = ("quick_gelu", "cc-by-nc-4.0", "CommonCrawl 2.5B, curated as MetaCLIP says")
_METACLIP_400M = ("quick_gelu", "cc-by-nc-4.0", "CommonCrawl 400M, curated as MetaCLIP says")

KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel("openai/clip-vit-base-patch32", "B/32", *_OPENAI),
    KnownModel("openai/clip-vit-base-patch16", "B/16", *_OPENAI),
    KnownModel("openai/clip-vit-large-patch14", "L/14", *_OPENAI),
    KnownModel("openai/clip-vit-large-patch14-336", "L/14-336", *_OPENAI),
    KnownModel("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "B/32", *_LAION),
    KnownModel("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "B/16", *_LAION),
    KnownModel("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "L/14", *_LAION),
    KnownModel("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "H/14", *_LAION),
    KnownModel("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "g/14", *_LAION),
    KnownModel("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "bigG/14", *_LAION),
    KnownModel("facebook/metaclip-b32-400m", "B/32", *_METACLIP_400M),
    KnownModel("facebook/metaclip-b16-400m", "B/16", *_METACLIP_400M),
    KnownModel("facebook/metaclip-l14-400m", "L/14", *_METACLIP_400M),
    KnownModel("facebook/metaclip-b32-fullcc2.5b", "B/32", *_METACLIP),
    KnownModel("facebook/metaclip-b16-fullcc2.5b", "B/16", *_METACLIP),
    KnownModel("facebook/metaclip-l14-fullcc2.5b", "L/14", *_METACLIP),
    KnownModel("facebook/metaclip-h14-fullcc2.5b", "H/14", *_METACLIP),
    KnownModel("timm/vit_base_patch16_clip_224.dfn2b", "B/16", "gelu", "apple-ascl", "DFN-2B", "open_clip"),
    KnownModel("timm/vit_large_patch14_clip_224.dfn2b", "L/14", "quick_gelu", "apple-ascl", "DFN-2B", "open_clip"),
    KnownModel("timm/vit_large_patch14_clip_224.dfn2b_s39b", "L/14", "gelu", "apple-ascl", "DFN-2B", "open_clip"),
    KnownModel("timm/vit_huge_patch14_clip_224.dfn5b", "H/14", "quick_gelu", "apple-ascl", "DFN-5B", "open_clip"),
    KnownModel("timm/vit_huge_patch14_clip_378.dfn5b", "H/14-378", "quick_gelu", "apple-ascl", "DFN-5B", "open_clip"),
    KnownModel("timm/vit_base_patch32_clip_224.openai", "B/32", *_OPENAI, "open_clip"),
    KnownModel("timm/vit_base_patch16_clip_224.openai", "B/16", *_OPENAI, "open_clip"),
    KnownModel("timm/vit_large_patch14_clip_224.openai", "L/14", *_OPENAI, "open_clip"),
    KnownModel("timm/vit_large_patch14_clip_336.openai", "L/14-336", *_OPENAI, "open_clip"),
)
"""The DFN weights of Apple's own pages (apple/DFN2B-CLIP-ViT-B-16, ...) are pickles; timm's copies are safetensors."""


def known_model(model_id: str) -> KnownModel | None:
    """The entry of a hub id, or None; timm's quickgelu names mean the same repository as the plain ones."""
    wanted = model_id.replace("_clip_quickgelu_", "_clip_")
    return next((model for model in KNOWN_MODELS if model.id == wanted), None)
