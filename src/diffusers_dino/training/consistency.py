"""Latent consistency distillation (Luo et al., arXiv 2310.04378): few steps in place of many.

A consistency function maps a noisy latent of any timestep to the clean one where the teacher's path ends. The student
learns it by agreeing with itself at two neighbouring points of a path that the guided teacher takes by one DDIM step
(algorithm 1 there). What it learns is sampled by diffusers' `LCMScheduler`.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

__all__ = ["ConsistencySchedule", "pseudo_huber"]


class ConsistencySchedule:
    """The timesteps of a distillation, and arithmetic at them.

    Args:
        scheduler: The teacher's noise schedule, with its prediction type.
        num_steps: DDIM steps of the teacher from noise to image, `original_inference_steps` of `LCMScheduler`.

    Attributes:
        timesteps: `(num_steps,)`, ascending, as `LCMScheduler` spaces them.
    """

    sigma_data, timestep_scaling = 0.5, 10.0  # of `LCMScheduler`

    def __init__(self, scheduler: DDIMScheduler, num_steps: int = 50) -> None:
        total = scheduler.config["num_train_timesteps"]
        if not 1 <= num_steps <= total:
            raise ValueError(
                f"The teacher's steps must be between 1 and the {total} of its schedule, got {num_steps}."
            )
        self.prediction_type = scheduler.config["prediction_type"]
        self.alphas_cumprod = scheduler.alphas_cumprod.clone()
        self.timesteps = torch.arange(1, num_steps + 1) * (total // num_steps) - 1

    def to(self, device: torch.device | str) -> ConsistencySchedule:
        """Move the tensors to a device, in place."""
        self.alphas_cumprod, self.timesteps = self.alphas_cumprod.to(device), self.timesteps.to(device)
        return self

    def neighbours(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps `(B,)`, each moved up to one of `timesteps`, and where a step from there ends; -1 is the data."""
        index = torch.searchsorted(self.timesteps, timesteps).clamp(max=len(self.timesteps) - 1)
        before = torch.where(index > 0, self.timesteps[index - 1], -1)
        return self.timesteps[index], before

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents `(B, L, h, w)` at timesteps `(B,)`; at -1 the latents themselves."""
        signal, sigma = self._levels(timesteps)
        return signal * latents + sigma * noise

    def split(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What a model's prediction says of clean latents and of noise, each `(B, L, h, w)`."""
        signal, sigma = self._levels(timesteps)
        if self.prediction_type == "v_prediction":
            return signal * noisy - sigma * prediction, sigma * noisy + signal * prediction
        if self.prediction_type == "sample":
            return prediction, (noisy - signal * prediction) / sigma
        return (noisy - sigma * prediction) / signal, prediction

    def consistency(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The consistency function `c_skip z + c_out x`, which is the identity at the data (section 4.1)."""
        t = timesteps.clamp(min=0).view(-1, 1, 1, 1) * self.timestep_scaling
        spread = t**2 + self.sigma_data**2
        clean, _ = self.split(prediction, noisy, timesteps)
        function = self.sigma_data**2 / spread * noisy + t / spread.sqrt() * clean
        return torch.where((timesteps < 0).view(-1, 1, 1, 1), noisy, function)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise, each `(B, 1, 1, 1)`; 1 and 0 at the data."""
        a = torch.where(timesteps < 0, 1.0, self.alphas_cumprod[timesteps.clamp(min=0)]).view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """`sqrt(d^2 + c^2) - c` (Song & Dhariwal, arXiv 2310.14189, eq. 11, for each latent), mean over all: a scalar."""
    return ((prediction.float() - target.float()).square() + c**2).sqrt().mean() - c
