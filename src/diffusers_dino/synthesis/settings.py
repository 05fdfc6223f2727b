"""How synthetic images are computed and stored: all that decides over their bytes beside the plan's rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..data.images.encoding import Encoding

__all__ = ["SynthesisError", "SynthesisSettings"]


class SynthesisError(ValueError):
    """Images cannot be made as planned. The message says what is in the way and what to do."""


@dataclass(frozen=True)
class SynthesisSettings:
    """How the images of a plan are sampled, checked and stored.

    Sums of floating-point numbers depend on how many images are computed together and on how many threads share the
    work, so both belong here: with them the same plan gives the same bytes, whoever computes it on such a machine.

    Args:
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none, at half the cost.
        guidance_rescale: In [0, 1], against over-exposure by guidance.
        eta: Stochasticity of DDIM in [0, 1]; other schedulers ignore it.
        restore_norm: Whether interpolated tokens get the norm back that linear mixing takes from them.
        batch_size: Images sampled together, and sources encoded together.
        threads: Threads of each process for the work on the CPU; by default what PyTorch uses now.
        shard_size: Images in a shard, rounded down to whole batches. A shard is what a kill loses, for each process.
        format: `"png"`, or `"jpg"`, which takes a third of the room and loses a little.
        quality: Of JPEG, in 1..100.
        grayscale: Whether a model of colour images stores the mean of the three channels.
        max_attempts: How often an image is drawn before the gate's refusal is final.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    guidance_rescale: float = 0.0
    eta: float = 0.0
    restore_norm: bool = False
    batch_size: int = 16
    threads: int = field(default_factory=torch.get_num_threads)
    shard_size: int = 1000
    format: Literal["png", "jpg"] = "png"
    quality: int = 95
    grayscale: bool = False
    max_attempts: int = 5

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size", "threads", "shard_size", "max_attempts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0, got {self.guidance_scale}.")
        Encoding(format=self.format, quality=self.quality)  # checks both

    @property
    def images_per_shard(self) -> int:
        """`shard_size` in whole batches, at least one."""
        return max(1, self.shard_size // self.batch_size) * self.batch_size
