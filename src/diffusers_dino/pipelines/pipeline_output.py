"""What the pipelines return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
from diffusers.utils import BaseOutput
from torch import Tensor

__all__ = ["DinoDiffusionPipelineOutput"]


@dataclass
class DinoDiffusionPipelineOutput(BaseOutput):
    """Generated images, those of one source together: source 0's first, then source 1's.

    Attributes:
        images: By `output_type`: a list of PIL images (mode L or RGB); an array `(B, H, W, C)` or a tensor
            `(B, C, H, W)`, both float32 in [0, 1]; or standardised latents `(B, L, h, w)`.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
