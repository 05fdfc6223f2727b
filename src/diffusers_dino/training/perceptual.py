"""How images differ to a DINO encoder, which no pixelwise error says: losses through frozen models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..latents import decode_latents
from ..pixels import StoredImages, vae_to_unit
from .objective import clean_latents

if TYPE_CHECKING:
    from ..conditioner import DinoImageConditioner
    from ..pipelines import DinoDiffusionPipeline

__all__ = ["perceptual_distance", "token_loss"]


def perceptual_distance(conditioner: DinoImageConditioner, reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """One minus the cosine of a frozen encoder's tokens, the mean of its global ones plus that of its patches.

    A perceptual loss (Johnson et al. 2016, section 3.2) whose network has seen no label, in place of a VGG.

    Args:
        conditioner: One encoder, giving `"all"` tokens.
        reconstruction: `(B, C, H, W)` in [-1, 1], to be differentiated by.
        pixels: `(B, C, H, W)` in [-1, 1].

    Returns:
        A scalar in [0, 4].
    """
    made, real = (_tokens_of(conditioner, images) for images in (reconstruction, pixels))
    distance = 1 - F.cosine_similarity(made, real, dim=-1)  # (B, S)
    num_global = conditioner.heads[0].num_global
    return distance[:, :num_global].mean() + distance[:, num_global:].mean()


def token_loss(
    pipe: DinoDiffusionPipeline,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    prediction: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    tokens: Tensor,
    told: Tensor,
    guidance_scale: float = 2.0,
) -> Tensor:
    """Mean squared error of the tokens of the images that a denoiser predicts: a scalar.

    Diffusion's own loss asks for faithful latents, this one for images that the encoder takes for their source (Li et
    al., arXiv 2404.07987, section 3.2, of other conditions), under the guidance that they are to be made with. It
    counts the half of a batch that has the least noise, by its share of signal, as what is predicted from noise is
    blurred. Gradients pass through the encoder, the autoencoder and `prediction`.

    Args:
        pipe: The frozen autoencoder and encoder, and the noise schedule.
        predict: The denoiser, of noisy latents, timesteps and tokens.
        prediction: `(B, L, h, w)`, what it gave for `noisy` `(B, L, h, w)` at `timesteps` `(B,)`.
        tokens: `(B, S, D)`, those of the images.
        told: `(B,)` bool, False where the denoiser saw the null condition: that does not count.
        guidance_scale: 1 for no guidance.
    """
    half = timesteps.topk(math.ceil(len(timesteps) / 2), largest=False).indices
    noisy, timesteps, prediction = noisy[half], timesteps[half], prediction[half].float()
    if guidance_scale != 1:
        with torch.no_grad():
            null = predict(noisy, timesteps, pipe.conditioner.null_condition(len(noisy))).float()
        prediction = null + guidance_scale * (prediction - null)
    clean, signal = clean_latents(pipe.scheduler, prediction, noisy, timesteps)
    made = _tokens_of(pipe.conditioner, decode_latents(pipe.vae, clean.to(pipe.vae.dtype)))
    errors = (made - tokens[half].float()).square().mean(dim=(1, 2))
    return (errors * signal * told[half]).mean()


def _tokens_of(conditioner: DinoImageConditioner, images: Tensor) -> Tensor:
    """Tokens `(B, S, D)` in float32 of images `(B, C, H, W)` in [-1, 1]."""
    return conditioner.encode(StoredImages(vae_to_unit(images.float()))).float()
