"""CLIPer's fine-grained compensation: self-attention of a Stable Diffusion UNet sharpens a coarse score map.

Sun et al., "CLIPer", ICCV 2025, section 3.3 and Eq. 9, with the numbers of the authors' code (c05fa41): ten maps of two
layers, each divided by its column maximum, cut at a threshold and normalised by rows; then multiplied onto the
coarse map. The code multiplies the ten N x N maps first; the same result comes from right to left, one map times the
Q columns of the coarse map at a time, at a fraction of the cost and with one N x N map in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .decision import QueryMaps
from .trunk import Padding

MODES = ("sfsa", "mean", "selection")
LAYERS = ("up_blocks.3.attentions.1", "up_blocks.3.attentions.0")
INSTALL = "pip install diffusers"


@dataclass(frozen=True)
class CompensationSettings:
    """Settings of the compensation; the defaults are those of the CLIPer code.

    Attributes:
        mode: "sfsa" multiplies all maps, "mean" averages them, "selection" takes one.
        selected_map: The one map of "selection", an index into layers x heads.
        attention_threshold: Entries below it (after division by the column maximum) are cut; the code uses the value of
            the coarse map's `attention_threshold`.
        image_size: Side of the square that the image is stretched to, in pixels; 512 gives 64 x 64 positions.
        timestep_index: Index into 50 inference steps. With the PNDM scheduler of Stable Diffusion 2.1 base, 45 is step
            101 of 1000.
        layers: Transformer blocks of the UNet whose self-attention (attn1) is read, in the order of the product.
        seed: Seed of the noise that is added to the latent. The authors' code draws it without a seed, so its result
            differs from run to run.
    """

    mode: str = "sfsa"
    selected_map: int = 1
    attention_threshold: float = 0.1
    image_size: int = 512
    timestep_index: int = 45
    layers: tuple[str, ...] = LAYERS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 <= self.attention_threshold < 1:
            raise ValueError(f"attention_threshold must be in [0, 1), got {self.attention_threshold}")
        if self.image_size < 8 or self.image_size % 8:
            raise ValueError(f"image_size must be a positive multiple of 8, got {self.image_size}")
        if not 0 <= self.timestep_index < 50:
            raise ValueError(f"timestep_index must be in 0..49, got {self.timestep_index}")


class _Recorder:
    """Attention processor that lets the wrapped one work and keeps what the map is made of."""

    def __init__(self, wrapped: Any):
        self.wrapped = wrapped
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads = attn.heads
        self.query = attn.to_q(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        self.key = attn.to_k(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        return self.wrapped(attn, hidden_states, *args, **kwargs)

    def map(self, head: int, scale: float) -> Tensor:
        """The softmaxed map of one head, (B, N, N) in float32."""
        assert self.query is not None and self.key is not None
        scores = self.query[:, head].float() @ self.key[:, head].float().transpose(-2, -1)
        return (scores * scale).softmax(dim=-1)


class StableDiffusionCompensation:
    """Stable Diffusion's self-attention as a post-step for the score map of any method, with or without ARM.

    Args:
        unet, vae, text_encoder, tokenizer, scheduler: Parts of a `StableDiffusionPipeline`; they are frozen.
        settings: See `CompensationSettings`.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        settings: CompensationSettings | None = None,
    ):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        for part in (unet, vae, text_encoder):
            part.eval().requires_grad_(False)
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.settings = settings or CompensationSettings()
        self._prompt: Tensor | None = None
        modules = dict(unet.named_modules())
        missing = [name for name in self.settings.layers if name not in modules]
        if missing:
            raise ValueError(f"the UNet has no block {', '.join(missing)}; choose layers that exist in it")
        self._attentions = [
            transformer.attn1 for name in self.settings.layers for transformer in modules[name].transformer_blocks
        ]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        settings: CompensationSettings | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **hub_options: Any,
    ) -> "StableDiffusionCompensation":
        """Load the parts of a Stable Diffusion checkpoint, without the safety checker and other parts not used.

        Args:
            name_or_path: Hub id or folder in `StableDiffusionPipeline` layout, such as
                "stabilityai/stable-diffusion-2-1-base" (the one of the CLIPer code).
            settings: See `CompensationSettings`.
            device: Where to run; the CPU by default.
            dtype: By default float16 on a GPU and float32 on the CPU.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, `variant`.

        Raises:
            ImportError: diffusers is not installed.
            OSError: The checkpoint or a part of it cannot be found.
        """
        try:
            import diffusers
            from diffusers import AutoencoderKL, UNet2DConditionModel
        except ImportError as error:
            raise ImportError(f"Stable Diffusion compensation needs diffusers: {INSTALL}") from error
        from transformers import AutoTokenizer, CLIPTextModel

        device = torch.device(device or "cpu")
        dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        plain = {key: value for key, value in hub_options.items() if key != "variant"}
        options = {**hub_options, "use_safetensors": True}
        unet = UNet2DConditionModel.from_pretrained(name_or_path, subfolder="unet", torch_dtype=dtype, **options)
        # Some autoencoders overflow in half precision and say so in their config.
        vae = AutoencoderKL.from_pretrained(name_or_path, subfolder="vae", torch_dtype=dtype, **options)
        if vae.config.force_upcast:
            vae = vae.float()
        text_encoder = CLIPTextModel.from_pretrained(name_or_path, subfolder="text_encoder", dtype=dtype, **plain)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, subfolder="tokenizer", trust_remote_code=False, **plain)
        scheduler_config = diffusers.DDPMScheduler.load_config(name_or_path, subfolder="scheduler", **plain)
        scheduler_class: Any = getattr(diffusers, str(scheduler_config["_class_name"]), None)
        is_scheduler = isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)
        if not is_scheduler:
            raise ValueError(f"{name_or_path!r} names no scheduler of diffusers: {scheduler_config['_class_name']!r}")
        scheduler = scheduler_class.from_config(scheduler_config)
        return cls(unet.to(device), vae.to(device), text_encoder.to(device), tokenizer, scheduler, settings)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @torch.no_grad()
    def prompt_embeds(self) -> Tensor:
        """Embedding of the empty prompt, padded to the text encoder's length, (1, T, width); computed once."""
        if self._prompt is None:
            length = self.text_encoder.config.max_position_embeddings
            tokens = self.tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            self._prompt = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state
        return self._prompt.to(self.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Mean latent of images (B, 3, H, W) in [0, 1], stretched to the square by nearest neighbour: (B, 4, s, s)."""
        side = self.settings.image_size
        square = F.interpolate(images.float(), size=(side, side), mode="nearest")
        posterior = self.vae.encode((2 * square - 1).to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def record(self, images: Tensor, noise: Tensor | None = None) -> list[_Recorder]:
        """Run the UNet once on noisy latents of the images and keep q, k of the chosen layers.

        Args:
            images: (B, 3, H, W) in [0, 1].
            noise: Noise of the latents' shape; by default drawn from the seed, the same for every image.
        """
        latents = self.encode(images)
        if noise is None:
            generator = torch.Generator().manual_seed(self.settings.seed)
            noise = torch.randn(1, *latents.shape[1:], generator=generator).expand_as(latents)
        self.scheduler.set_timesteps(50)
        timestep = self.scheduler.timesteps[self.settings.timestep_index]
        noisy = self.scheduler.add_noise(latents, noise.to(latents), timestep.expand(latents.shape[0]))
        prompt = self.prompt_embeds().expand(latents.shape[0], -1, -1).to(self.unet.dtype)
        recorders, before = [], [attention.processor for attention in self._attentions]
        try:
            for attention in self._attentions:
                recorders.append(_Recorder(attention.processor))
                attention.processor = recorders[-1]
            self.unet(noisy.to(self.unet.dtype), timestep.to(self.device), encoder_hidden_states=prompt)
        finally:
            for attention, processor in zip(self._attentions, before, strict=True):
                attention.processor = processor
        return recorders

    def heads(self, recorders: list[_Recorder]) -> list[Callable[[], Tensor]]:
        """One function per map, layer after layer and head after head; a map (B, N, N) exists only when called."""
        return [
            partial(recorder.map, head, attention.scale)
            for recorder, attention in zip(recorders, self._attentions, strict=True)
            for head in range(attention.heads)
        ]

    def normalise(self, attention: Tensor) -> Tensor:
        """Divide by the column maximum, cut at the threshold, divide by the row sum: (B, N, N)."""
        attention = attention / (attention.amax(dim=-2, keepdim=True) + 1e-5)
        attention = attention.masked_fill(attention < self.settings.attention_threshold, 0)
        return attention / (attention.sum(dim=-1, keepdim=True) + 1e-5)

    @torch.no_grad()
    def apply(self, scores: Tensor, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sharpen score maps.

        Args:
            scores: Scores of whole images, (B, Q, h, w).
            images: The images themselves, unresized or not, (B, 3, H, W) in [0, 1].
            noise: See `record`.

        Returns:
            (B, Q, s, s) with s = image_size / 8, stretched like the image.
        """
        recorders = self.record(images, noise)
        positions = self._positions(recorders)
        side = int(positions**0.5)
        coarse = F.interpolate(scores.float(), size=(side, side), mode="bilinear", align_corners=False)
        coarse = coarse.flatten(2).transpose(1, 2).to(self.device)  # (B, N, Q)
        maps = self.heads(recorders)
        if self.settings.mode == "selection":
            if not 0 <= self.settings.selected_map < len(maps):
                raise ValueError(f"selected_map must be in 0..{len(maps) - 1}, got {self.settings.selected_map}")
            maps = [maps[self.settings.selected_map]]
        if self.settings.mode == "mean":
            refined = torch.zeros_like(coarse)
            for attention in maps:
                refined += self.normalise(attention()) @ coarse / len(maps)
        else:
            refined = coarse
            for attention in reversed(maps):  # A_1 A_2 ... A_n S from right to left
                refined = self.normalise(attention()) @ refined
        return refined.transpose(1, 2).unflatten(2, (side, side)).to(scores.device)

    @staticmethod
    def _positions(recorders: list[_Recorder]) -> int:
        sizes = {recorder.query.shape[2] for recorder in recorders if recorder.query is not None}
        if len(sizes) != 1:
            raise ValueError(f"the chosen layers have different resolutions ({sorted(sizes)} positions); choose others")
        return sizes.pop()

    def compensate(self, maps: QueryMaps, images: Tensor) -> QueryMaps:
        """The post-step itself: scores of whole images, refined.

        Args:
            maps: Scores of whole images (not of windows).
            images: The images, (B, 3, H, W) in [0, 1], the same batch.

        Returns:
            New maps on the UNet's grid, without padding; ARM's refinement is already inside.
        """
        scores = maps.chunk().float()
        padded = F.interpolate(scores, size=maps.padded_size, mode="bilinear", align_corners=False)
        unpadded = maps.padding.crop(padded)
        size = (unpadded.shape[-2], unpadded.shape[-1])
        whole = size == maps.padded_size
        refined = self.apply(scores if whole else unpadded, images)
        # The code weighs both maxima for its score gate.
        peaks = (refined.amax(dim=(2, 3)) + scores.amax(dim=(2, 3)).to(refined)) / 2
        return replace(maps, coarse=refined, refinement_features=None, padding=Padding(), padded_size=size, peaks=peaks)
