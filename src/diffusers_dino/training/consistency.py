"""Consistency distillation: few steps in place of many, in phases (arXiv 2405.18407) or in one (arXiv 2310.04378).

A consistency function maps a noisy latent of any timestep to the one where the teacher's path leaves the phase that
the timestep is in; the last phase ends at the data. The student learns it by agreeing with itself at two neighbouring
points of a path that the guided teacher takes by one DDIM step. With as many phases as steps (Wang et al., phased
consistency models) sampling is deterministic, by diffusers' `TCDScheduler`. With one phase it is latent consistency
distillation (Luo et al., algorithm 1): `LCMScheduler` jumps to the data, and adds new noise for each further step.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, LCMScheduler, SchedulerMixin, TCDScheduler
from torch import Tensor

from .objective import split_prediction

__all__ = ["ConsistencySchedule", "pseudo_huber"]


class ConsistencySchedule:
    """The timesteps of a distillation, and arithmetic at them.

    Args:
        scheduler: The teacher's noise schedule, with its prediction type.
        num_steps: DDIM steps of the teacher from noise to image.
        num_phases: How many of the student's steps lead there.

    Attributes:
        timesteps: `(num_steps,)`, ascending, as `LCMScheduler` and `TCDScheduler` space them.
        edges: `(num_phases,)`, ascending: where a phase ends; -1 is the data.
    """

    def __init__(self, scheduler: DDIMScheduler, num_steps: int = 8, num_phases: int = 4) -> None:
        total = scheduler.config["num_train_timesteps"]
        if not 1 <= num_steps <= total:
            raise ValueError(
                f"The teacher's steps must be between 1 and the {total} of its schedule, got {num_steps}."
            )
        if num_phases < 1:
            raise ValueError(f"There must be 1 or more phases, got {num_phases}.")
        self.config, self.num_steps, self.num_phases = scheduler.config, num_steps, num_phases
        self.alphas_cumprod = scheduler.alphas_cumprod.clone()
        self.timesteps = torch.arange(1, num_steps + 1) * (total // num_steps) - 1
        self.edges = torch.arange(num_phases) * (total // num_phases) - 1
        if not torch.isin(self.edges[1:], self.timesteps).all():
            raise ValueError(
                f"The teacher's {num_steps} steps do not fill {num_phases} phases of {total // num_phases} timesteps: "
                f"give a multiple of {num_phases} that divides {total}."
            )

    def to(self, device: torch.device | str) -> ConsistencySchedule:
        """Move the tensors to a device, in place."""
        for name in ("alphas_cumprod", "timesteps", "edges"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def sampler(self) -> SchedulerMixin:
        """What samples the student."""
        kind = LCMScheduler if self.num_phases == 1 else TCDScheduler
        return kind.from_config(self.config, original_inference_steps=self.num_steps)

    def neighbours(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps `(B,)`, each moved up to one of `timesteps`; where the teacher's step, and the phase, end."""
        index = torch.searchsorted(self.timesteps, timesteps).clamp(max=len(self.timesteps) - 1)
        start = self.timesteps[index]
        end = torch.where(index > 0, self.timesteps[index - 1], -1)
        return start, end, self.edges[torch.searchsorted(self.edges, start) - 1]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents `(B, L, h, w)` at timesteps `(B,)`; at -1 the latents themselves."""
        a = self._share_of_signal(timesteps)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def split(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What a model's prediction says of clean latents and of noise, each `(B, L, h, w)`."""
        return split_prediction(prediction, noisy, self._share_of_signal(timesteps), self.config["prediction_type"])

    def jump(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor, ends: Tensor) -> Tensor:
        """DDIM's step from `timesteps` to `ends`, both `(B,)`: the teacher's, and the consistency function of a phase.

        Where both are the same, it is the identity.
        """
        jumped = self.add_noise(*self.split(prediction, noisy, timesteps), ends)
        return torch.where((timesteps == ends).view(-1, 1, 1, 1), noisy, jumped)

    def _share_of_signal(self, timesteps: Tensor) -> Tensor:
        """`(B, 1, 1, 1)`; 1 at the data."""
        return torch.where(timesteps < 0, 1.0, self.alphas_cumprod[timesteps.clamp(min=0)]).view(-1, 1, 1, 1)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """`sqrt(d^2 + c^2) - c` (Song & Dhariwal, arXiv 2310.14189, eq. 11, for each latent), mean over all: a scalar."""
    return ((prediction.float() - target.float()).square() + c**2).sqrt().mean() - c
