"""Between pixels and the standardised latents that a denoiser is trained on, for any autoencoder of diffusers."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from .devices import send

__all__ = ["VAE", "decode_latents", "encode_to_moments", "shift_and_scale", "standardize", "vae_scale_factor"]

VAE = AutoencoderKL | AutoencoderTiny


def vae_scale_factor(vae: VAE) -> int:
    """Pixels per latent along each side, for example 8 for Stable Diffusion's autoencoder."""
    return 2 ** (len(vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]) - 1)


def encode_to_moments(vae: VAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pixels to the mean and standard deviation of their *standardised* latent distribution.

    Args:
        vae: Of an `AutoencoderTiny`, the distribution is a point (standard deviation 0).
        pixels: `(B, C, H, W)` in [-1, 1], C being the autoencoder's number of input channels.

    Returns:
        Mean and standard deviation, each `(B, L, H / f, W / f)`, in the units the denoiser sees.
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latents"):
        return standardize(vae, encoded.latents), torch.zeros_like(encoded.latents)
    _, scale = shift_and_scale(vae, encoded.latent_dist.mean)
    return standardize(vae, encoded.latent_dist.mean), encoded.latent_dist.std * scale


def standardize(vae: VAE, latents: Tensor) -> Tensor:
    """Bring an autoencoder's raw latents `(B, L, h, w)` to the denoiser's units: `(latents - shift) * scale`."""
    shift, scale = shift_and_scale(vae, latents)
    return (latents - shift) * scale


def decode_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Decode standardised latents `(B, L, h, w)` to pixels `(B, C, H, W)` of nominal range [-1, 1] (not clipped)."""
    shift, scale = shift_and_scale(vae, latents)
    return vae.decode(latents / scale + shift, return_dict=False)[0]


def shift_and_scale(vae: VAE, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The affine map of raw latents to unit variance, under diffusers' two conventions; `like` has type and device.

    Per channel (`latents_mean`, `latents_std`, as Stable Diffusion XL's pipeline reads them):
    `(z - mean) * scaling_factor / std`. Otherwise `(z - shift_factor) * scaling_factor`.
    """
    config = vae.config
    scaling_factor = config["scaling_factor"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, scaling_factor
    shift, spread = (send(torch.tensor(v, dtype=like.dtype), like.device).view(1, -1, 1, 1) for v in (mean, std))
    return shift, scaling_factor / spread
