"""How a script samples images: the flags that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .arguments import flag

__all__ = ["SamplingArguments"]


@dataclass
class SamplingArguments:
    scheduler: str | None = flag(
        None, "Scheduler of diffusers, such as DPMSolverMultistepScheduler; else the model's.", group="Sampling"
    )
    num_inference_steps: int = flag(50, "Sampling steps.")
    guidance_scale: float = flag(2.0, "Guidance; 1 is none, at half the cost.")
    guidance_rescale: float = flag(0.0, "Against over-exposure by guidance.")
    eta: float = flag(0.0, "Stochasticity of DDIM.")
    restore_norm: bool = flag(False, "Give interpolated tokens the norm back that mixing takes from them.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the generator's weights.")
