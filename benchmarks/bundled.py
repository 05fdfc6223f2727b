"""A pipeline of the bundled encoder and autoencoder, for benchmarks in which the images do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner

__all__ = ["untrained_pipeline"]

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"


def untrained_pipeline(**unet: Any) -> DinoDiffusionPipeline:
    """The pipeline, with random weights in a UNet of this configuration; equal for equal configurations."""
    torch.manual_seed(0)
    conditioner = DinoImageConditioner.from_pretrained(DATA / "tiny-diffusion/conditioner")
    vae = AutoencoderKL.from_pretrained(DATA / "tiny-diffusion/vae")
    channels = vae.config.latent_channels
    model = UNet2DConditionModel(
        in_channels=channels, out_channels=channels, cross_attention_dim=conditioner.token_dim, **unet
    )
    return DinoDiffusionPipeline(vae, conditioner, model, DDIMScheduler())
