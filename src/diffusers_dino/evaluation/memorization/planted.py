"""Copies that were tampered with, to see which of them a search for copies finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from ...metrics.extractors.thumbnails import gaussian_blur

__all__ = ["PLANTED"]


def _blur(images: Tensor) -> Tensor:
    """Gaussian blur with a deviation of 1 % of the side."""
    return gaussian_blur(images, 0.01 * images.shape[-1], "replicate")


def _window(images: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """What a window of `scale` sides sees that is moved by `shift` sides to the right and down; edges go on."""
    matrix = torch.tensor([[scale, 0, 2 * shift], [0, scale, 2 * shift]], dtype=images.dtype)
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# Images `(N, C, H, H)` in [0, 1] to copies of them, by what was done.
PLANTED: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "exact": lambda images: images,
        "mirrored": lambda images: images.flip(-1),
        "slightly blurred (1 % of the side)": _blur,
        "mirrored and blurred": lambda images: _blur(images.flip(-1)),
        "gamma 1.3": lambda images: images**1.3,
        "contrast x 1.25": lambda images: (0.5 + 1.25 * (images - 0.5)).clamp(0, 1),
        "2 % cut off each side": lambda images: _window(images, scale=0.96),
        "5 % cut off each side": lambda images: _window(images, scale=0.9),
        "moved by 2 % of the side": lambda images: _window(images, shift=0.02),
        "moved by 4 % of the side": lambda images: _window(images, shift=0.04),
    }
)
