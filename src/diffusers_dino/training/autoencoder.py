"""How an autoencoder is trained: the loss of its reconstructions, and the statistics that its latents leave with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ReconstructionLoss", "gradient_l1", "latent_statistics", "psnr"]


@dataclass(frozen=True)
class ReconstructionLoss:
    """`l1 |x - y| + mse (x - y)^2 + gradient |dx - dy| + kl KL(q || N(0, 1))`, each term a mean over its elements.

    The absolute term keeps edges sharp and the squared one weighs large errors; the gradient term, of finite
    differences, asks for the same edges without a pretrained perceptual network, which an offline machine does not
    have. The Kullback-Leibler term only keeps the latents from drifting: it is small, and the latents are
    standardised afterwards. ValueError if a weight is negative, or no error has a weight.
    """

    l1: float = 1.0
    mse: float = 2.0
    gradient: float = 0.5
    kl: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.l1, self.mse, self.gradient, self.kl) < 0:
            raise ValueError(f"Weights of the loss must not be negative, got {self}.")
        if not self.l1 + self.mse + self.gradient:
            raise ValueError("At least one of the weights l1, mse and gradient must be positive.")

    def __call__(self, reconstruction: Tensor, pixels: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        """A scalar in float32 from reconstructions and pixels `(B, C, H, W)` in [-1, 1].

        `mean` and `logvar` `(B, L, h, w)` are those of the latent distribution.
        """
        reconstruction, pixels, mean, logvar = (x.float() for x in (reconstruction, pixels, mean, logvar))
        error = self.l1 * F.l1_loss(reconstruction, pixels) + self.mse * F.mse_loss(reconstruction, pixels)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # Kingma & Welling 2014, appendix B
        return error + self.gradient * gradient_l1(reconstruction, pixels) + self.kl * divergence


def gradient_l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences of two batches `(B, C, H, W)`, summed over both axes."""
    difference = x - y
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, `(B,)`, of images `(B, C, H, W)` in [0, 1]. At most 100 dB."""
    error = (images.float() - references.float()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def latent_statistics(moments: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents drawn from their distributions.

    Args:
        moments: Batches of the raw (unscaled) mean and standard deviation, each `(B, L, h, w)`.

    Returns:
        Mean and standard deviation, L numbers each: an `AutoencoderKL`'s `latents_mean` and `latents_std`.

    Raises:
        ValueError: If there is no batch, a latent is not finite, or a channel does not vary.
    """
    count, total, total_square = 0, torch.zeros(()), torch.zeros(())
    for mean, std in moments:
        mean, std = mean.double(), std.double()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum(dim=(0, 2, 3)).cpu()  # (L,)
        total_square = total_square + (mean.square() + std.square()).sum(dim=(0, 2, 3)).cpu()  # E z^2 = mean^2 + var
    if not count:
        raise ValueError("Statistics of latents need at least one batch.")
    mean = total / count
    std = (total_square / count - mean.square()).clamp(min=0).sqrt()
    if not torch.isfinite(mean).all() or not torch.isfinite(std).all():
        raise ValueError("The latents are not finite: the autoencoder has diverged.")
    if (std < 1e-6).any():
        raise ValueError(f"A latent channel does not vary (standard deviations {std.tolist()}): train longer.")
    return mean.tolist(), std.tolist()
