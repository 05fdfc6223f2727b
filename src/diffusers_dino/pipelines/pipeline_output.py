"""What the pipelines return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..diffseg.merging import suppress
from .checks import check_choice

__all__ = [
    "DiffSegPipelineOutput",
    "DinoDiffusionPipelineOutput",
    "DinoInterpolationPipelineOutput",
    "DinoPriorPipelineOutput",
]


@dataclass
class DinoDiffusionPipelineOutput(BaseOutput):
    """Generated images, those of one source together: source 0's first, then source 1's.

    Attributes:
        images: By `output_type`: a list of PIL images (mode L or RGB); an array `(B, H, W, C)` or a tensor
            `(B, C, H, W)`, both float32 in [0, 1]; or standardised latents `(B, L, h, w)`.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor


@dataclass
class DiffSegPipelineOutput(BaseOutput):
    """Segments of B images.

    Attributes:
        masks: `(B, H, W)` int64, by `output_type` a tensor or an array: the segment that each pixel belongs to, an
            index into the image's `maps`.
        maps: One tensor an image, `(K, s, s)` float32: merged attention maps, each of sum 1; of features,
            cosines with each segment's mean; of clusters, their probabilities.
        num_segments: Of each image, how many segments have a pixel: K at most, as a map that is largest nowhere has
            none.
    """

    masks: np.ndarray | Tensor
    maps: list[Tensor]
    num_segments: list[int]

    @classmethod
    def of(cls, maps: list[Tensor], size: tuple[int, int], output_type: str) -> DiffSegPipelineOutput:
        """Masks of a height and width from the maps of candidates, `(K, s, s)` for each image."""
        check_choice(("pt", "np"), output_type=output_type)
        masks = [suppress(candidates, size) for candidates in maps]
        masks = torch.stack(masks) if len(masks) > 1 else masks[0][None]  # a copy of a large one takes a gigabyte
        return cls(
            masks=masks.cpu().numpy() if output_type == "np" else masks,
            maps=maps,
            num_segments=[int(mask.flatten().bincount().count_nonzero()) for mask in masks],
        )


@dataclass
class DinoInterpolationPipelineOutput(DinoDiffusionPipelineOutput):
    """Generated images, path after path: F images from the first fraction to the last belong together."""


@dataclass
class DinoPriorPipelineOutput(BaseOutput):
    """Condition tokens, those of one condition together.

    Attributes:
        image_embeds: `(B, S, D)` float32 by `output_type`, for the `image_embeds` of a `DinoDiffusionPipeline`.
    """

    image_embeds: np.ndarray | Tensor
