"""Copies that were tampered with, to see which of them a search for copies finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from ...metrics.extractors.thumbnails import gaussian_blur
from ...metrics.registration import affine, warp

__all__ = ["PLANTED"]


def _blur(images: Tensor) -> Tensor:
    """Gaussian blur with a deviation of 1 % of the side."""
    return gaussian_blur(images, 0.01 * images.shape[-1], "replicate")


def _window(images: Tensor, scale: float = 1.0, shift: float = 0.0, degrees: float = 0.0) -> Tensor:
    """What a window of `scale` sides sees that is turned, and moved by `shift` sides to the right and down.

    Edges go on.
    """
    return warp(images, torch.tensor([affine(degrees, scale, shift, shift)], dtype=images.dtype))


def _frame(images: Tensor, width: float) -> Tensor:
    """A black border of `width` sides over each edge."""
    pixels = round(width * images.shape[-1])
    return F.pad(images[..., pixels:-pixels, pixels:-pixels], 4 * (pixels,)) if pixels else images


def _square(images: Tensor) -> Tensor:
    """A grey square of a quarter of the side, at another place in each image."""
    side, images = images.shape[-1] // 4, images.clone()
    for number, image in enumerate(images):
        top, left = (number // 4 % 4 * side, number % 4 * side)
        image[:, top : top + side, left : left + side] = 0.5
    return images


def _halved(images: Tensor) -> Tensor:
    """The right half of the image before, or the lower one in every other image."""
    middle, others, images = images.shape[-1] // 2, images.roll(1, dims=0), images.clone()
    images[::2, :, :, middle:] = others[::2, :, :, middle:]
    images[1::2, :, middle:] = others[1::2, :, middle:]
    return images


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
        "3 % cut off each side": lambda images: _window(images, scale=0.94),
        "5 % cut off each side": lambda images: _window(images, scale=0.9),
        "black border of 2 % of the side": lambda images: _frame(images, 0.02),
        "black border of 5 % of the side": lambda images: _frame(images, 0.05),
        "moved by 2 % of the side": lambda images: _window(images, shift=0.02),
        "moved by 4 % of the side": lambda images: _window(images, shift=0.04),
        "turned by 5 degrees": lambda images: _window(images, degrees=5),
        "turned by 10 degrees": lambda images: _window(images, degrees=10),
        "a grey square of a quarter of the side": _square,
        "half of another image": _halved,
    }
)
