"""Real components of diffusers and transformers at the smallest size that still exercises every kind of layer.

Each factory seeds its own weights, so that two calls build the same model and no test depends on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import diffusers_dino
from diffusers_dino.data import Preprocessing
from diffusers_dino.latents import encode_to_moments
from diffusers_dino.pipelines.preparation import note_preparation
from diffusers_dino.pixels import unit_to_vae
from diffusers_dino.training.models import STABLE_DIFFUSION_SCHEDULE

diffusers.utils.logging.disable_progress_bar()

IMAGE_SIZE = 32
TOKEN_DIM = 32
LATENT_CHANNELS = 4
VAE_SCALE_FACTOR = 4
LATENT_SIZE = IMAGE_SIZE // VAE_SCALE_FACTOR


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix the weights that are drawn inside, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_unet(**overrides: Any) -> UNet2DConditionModel:
    """A UNet with self- and cross-attention on both levels, 8 x 8 latents of 4 channels."""
    config = {
        "sample_size": LATENT_SIZE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TOKEN_DIM,
    }
    with seeded(0):
        return UNet2DConditionModel(**{**config, **overrides}).eval()


# Half of that UNet, for what compiles it: seconds of a compiler go by layers.
ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}

_TRANSFORMERS = {  # two blocks, 8 x 8 latents of 4 channels in patches of 2
    "sd3": {
        "_class_name": "SD3Transformer2DModel",
        "joint_attention_dim": TOKEN_DIM,
        "pooled_projection_dim": TOKEN_DIM,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 6,
        "qk_norm": "rms_norm",
    },
    "pixart": {
        "_class_name": "PixArtTransformer2DModel",
        "caption_channels": TOKEN_DIM,
        "cross_attention_dim": 16,
        "use_additional_conditions": False,
    },
    "sana": {
        "_class_name": "SanaTransformer2DModel",
        "caption_channels": TOKEN_DIM,
        "cross_attention_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "timestep_scale": 0.5,
    },
}
FAMILIES = tuple(_TRANSFORMERS)


def tiny_transformer_config(family: str = "sd3", **overrides: Any) -> dict[str, Any]:
    """The config of a transformer of one of `FAMILIES`."""
    sizes = {"sample_size": LATENT_SIZE, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    blocks = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
    return {**sizes, **blocks, **_TRANSFORMERS[family], **overrides}


def tiny_transformer(family: str = "sd3", **overrides: Any) -> diffusers.ModelMixin:
    """A transformer of one of `FAMILIES`, with diffusers' own weights: no layer is zero."""
    config = tiny_transformer_config(family, **overrides)
    with seeded(0):
        return getattr(diffusers, config.pop("_class_name"))(**config).eval()


def tiny_unconditional_unet() -> UNet2DModel:
    """A UNet without a condition, on 16 px images of one channel, with self-attention on its 8 x 8 level."""
    with seeded(0):
        return UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        ).eval()


def tiny_vae(channels: int = 1, **overrides: Any) -> AutoencoderKL:
    """An autoencoder of 32 px images with 1 or 3 channels, 4 latent channels, 4 pixels a latent."""
    config = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 4,
        "sample_size": IMAGE_SIZE,
        "scaling_factor": 0.5,
    }
    with seeded(1):
        return AutoencoderKL(**{**config, **overrides}).eval()


def tiny_taesd(channels: int = 3, **overrides: Any) -> AutoencoderTiny:
    """An `AutoencoderTiny` of the same shapes as `tiny_vae`."""
    config = {
        "in_channels": channels,
        "out_channels": channels,
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": LATENT_CHANNELS,
    }
    with seeded(2):
        return AutoencoderTiny(**{**config, **overrides}).eval()


def tiny_scheduler(**overrides: Any) -> DDIMScheduler:
    """DDIM on Stable Diffusion's schedule; `OtherScheduler.from_config(tiny_scheduler().config)` makes the others."""
    return DDIMScheduler(**{**STABLE_DIFFUSION_SCHEDULE, **overrides})


def tiny_encoder(**overrides: Any) -> Dinov2WithRegistersModel:
    """A DINOv2 with 4 registers: 32 px, patches of 8, width 32."""
    config = {
        "hidden_size": TOKEN_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "num_register_tokens": 4,
    }
    with seeded(3):
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**config, **overrides})).eval()


def tiny_conditioner(**options: Any) -> diffusers_dino.DinoImageConditioner:
    """A conditioner on `tiny_encoder`: by default 5 global tokens of width 32."""
    return _build_conditioner(**options) if options else deepcopy(_plain_conditioner())


@cache
def _plain_conditioner() -> diffusers_dino.DinoImageConditioner:
    """What a thousand tests begin with: a copy takes an eighth of the time."""
    return _build_conditioner()


def _build_conditioner(**options: Any) -> diffusers_dino.DinoImageConditioner:
    preprocessing = {"size": IMAGE_SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return diffusers_dino.DinoImageConditioner.from_model(tiny_encoder(), **{**preprocessing, **options})


def tiny_pipeline(**components: Any) -> diffusers_dino.DinoDiffusionPipeline:
    """A whole pipeline; components given by name replace the tiny ones, or come beside them."""
    defaults = {"vae": tiny_vae, "conditioner": tiny_conditioner, "unet": tiny_unet, "scheduler": tiny_scheduler}
    built = {name: components[name] if name in components else make() for name, make in defaults.items()}
    pipe = diffusers_dino.DinoDiffusionPipeline(**{**components, **built})
    if pipe.denoiser is not None and pipe.vae is not None:  # as training does
        note_preparation(pipe.denoiser, Preprocessing(IMAGE_SIZE), pipe.vae.config["in_channels"])
    return pipe


def overfitted_pipeline(images: torch.Tensor, updates: int = 100) -> diffusers_dino.DinoDiffusionPipeline:
    """A pipeline whose UNet has learnt a few gray images `(N, 1, 32, 32)` by heart, at timesteps from 50 to 109."""
    pipe = tiny_pipeline()
    with torch.no_grad():
        latents = encode_to_moments(pipe.vae, unit_to_vae(images, 1))[0]
    tokens = pipe.encode_image(images)
    pipe.unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), 3e-3, weight_decay=0)
    random = torch.Generator().manual_seed(0)
    for _ in range(updates):
        timesteps = torch.randint(50, 110, (len(latents),), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        predicted = pipe.unet(noisy, timesteps, encoder_hidden_states=tokens).sample
        optimizer.zero_grad()
        (predicted - noise).square().mean().backward()
        optimizer.step()
    pipe.unet.eval().requires_grad_(False)
    return pipe


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if isinstance(output, torch.Tensor):
            self.nbytes = max(self.nbytes, output.untyped_storage().nbytes())
        return output


def random_images(count: int, channels: int = 3, size: int = IMAGE_SIZE, seed: int = 0) -> torch.Tensor:
    """Smooth random images `(count, channels, size, size)` in [0, 1]."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Features from a normal distribution; drawn in float64 whatever the type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def generators(*seeds: int) -> list[torch.Generator]:
    """One CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipe: diffusers_dino.DinoDiffusionPipeline, image: Any = None, **options: Any) -> Any:
    """`pipe(...).images` in three steps, from a fixed seed, as an array unless something else is asked for."""
    defaults = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe(image, **{**defaults, **options}).images
