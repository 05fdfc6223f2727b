"""Coarse relief of an image: what it shows, whatever its brightness and contrast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import FeatureExtractor, FeatureSpec

__all__ = ["local_contrast_features", "open_local_contrast"]

_SIDE = 16
_SIGMA = 2.0  # of the neighbourhood, in pixels of the thumbnail
_FLOOR = 0.02  # added to the local deviation, so that noise in flat parts is not raised to a pattern


def local_contrast_features(images: Tensor, side: int = _SIDE) -> Tensor:
    """Gray thumbnails, each pixel in units of the contrast around it; made to find copies among look-alikes.

    Radiographs share their coarse brightness, so in plain pixels strangers are near each other. What is left here is
    where an image is brighter or darker than its own surroundings.

    Args:
        images: `(N, C, H, W)` in [0, 1], with C = 1 or 3.
        side: Side of the thumbnail in pixels.

    Returns:
        `(N, side * side)` float32 of norm 1, so that squared distances are `2 - 2 * correlation`; 0 for a flat image.
    """
    gray = images.float().mean(dim=1, keepdim=True)  # (N, 1, H, W)
    gray = F.interpolate(gray, size=(side, side), mode="bilinear", antialias=True)
    residual = gray - _blur(gray)
    relief = residual / (_blur(residual.square()).sqrt() + _FLOOR)
    return F.normalize(relief.flatten(1), dim=1)


def open_local_contrast(device: torch.device | str = "cpu") -> FeatureExtractor:
    """`local_contrast_features` of 16 x 16 px as an extractor."""
    layer = f"gray values in units of local contrast, sigma {_SIGMA:g}, floor {_FLOOR:g}, norm 1"
    spec = FeatureSpec("local-contrast", layer, _SIDE**2, _SIDE, "gray, [0, 1]", "bilinear, antialiased", None)
    return FeatureExtractor(spec, local_contrast_features, device)


def _blur(images: Tensor) -> Tensor:
    """Gaussian mean around each pixel of `(N, 1, H, W)`, mirrored at the edges."""
    radius = int(3 * _SIGMA)
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-steps.square() / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images, 4 * (radius,), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
