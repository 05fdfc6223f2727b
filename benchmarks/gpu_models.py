"""Random models of the shapes that `gpu.py` measures: Stable Diffusion 1.5 with DINO ViT-B/16, or tiny ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from diffusers_dino.training.models import make_scheduler

__all__ = ["SIZES", "SMALL", "Size", "make_pipeline", "make_text_encoder", "random_images"]

PROMPT_TOKENS = 77
SHARPNESS = 3.0  # of attention: with random weights as they are it is uniform, and DiffSeg would see nothing


@dataclass(frozen=True)
class Size:
    """What there is to build, and how much work it is put to.

    Attributes:
        unet: Arguments of `UNet2DConditionModel`.
        vae: Arguments of `AutoencoderKL`.
        encoder: Arguments of `ViTConfig`.
        text: Arguments of `CLIPTextConfig`.
        resolutions: The larger and the smaller side of images in pixels.
        batches: Batch sizes to try for training at each of them, the largest first.
        sampling_batch: Images sampled together, or trained on in the small model.
        larger_batch: Images sampled together where there is room.
        steps: Steps of DDIM, of few-step sampling, and of sampling where models travel.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    encoder: dict[str, Any]
    text: dict[str, Any]
    resolutions: tuple[int, int]
    batches: tuple[tuple[int, ...], tuple[int, ...]]
    sampling_batch: int
    larger_batch: int
    steps: tuple[int, int, int]


SIZES = {
    "sd15": Size(
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},  # the rest is the default
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 512,
            "scaling_factor": 0.18215,
        },
        encoder={"image_size": 224, "patch_size": 16},  # the rest of ViTConfig's defaults is ViT-B
        text={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        resolutions=(512, 256),
        batches=((64, 48, 32, 24, 16, 8, 4, 2, 1), (256, 192, 128, 96, 64, 32, 16, 8, 4, 2, 1)),
        sampling_batch=8,
        larger_batch=32,
        steps=(50, 10, 10),
    ),
    "tiny": Size(
        unet={
            "sample_size": 16,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 64,
            "scaling_factor": 0.5,
        },
        encoder={
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 32,
        },
        resolutions=(64, 32),
        batches=((4, 2), (4, 2)),
        sampling_batch=2,
        larger_batch=4,
        steps=(4, 2, 2),
    ),
}

# The UNet of examples/configs/tiny_unet.json on the latents of its VAE, at 64 px.
SMALL = replace(
    SIZES["tiny"],
    unet={
        "sample_size": 16,
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    encoder={**SIZES["tiny"].encoder, "hidden_size": 64},
    text={**SIZES["tiny"].text, "hidden_size": 64},
    resolutions=(64, 64),
    sampling_batch=16,
)


def make_pipeline(size: Size) -> DinoDiffusionPipeline:
    """The whole pipeline in float32 on the CPU, weights drawn from seed 0; images have 3 channels."""
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(**size.encoder), add_pooling_layer=False)
    unet = UNet2DConditionModel(**size.unet).eval()
    with torch.no_grad():
        for layer in [module for module in unet.modules() if isinstance(module, Attention)]:
            layer.to_q.weight.mul_(SHARPNESS)
            layer.to_k.weight.mul_(SHARPNESS)
    normal = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of ImageNet, as DINO
    pipe = DinoDiffusionPipeline(
        vae=AutoencoderKL(**size.vae).eval(),
        conditioner=DinoImageConditioner.from_model(encoder, size=size.encoder["image_size"], **normal),
        unet=unet,
        scheduler=make_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_text_encoder(size: Size) -> CLIPTextModel:
    """The text encoder of diffusers' step, of CLIP ViT-L/14's shape, frozen."""
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**size.text)).requires_grad_(False).eval()


def random_images(count: int, side: int) -> torch.Tensor:
    """Smooth random images `(count, 3, side, side)` in [0, 1] on the CPU; what they show does not matter here."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)
