"""Coarse gray pixels: features that no network has shaped."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import FeatureExtractor, FeatureSpec

__all__ = ["open_pixels", "pixel_features"]

_SIDE = 16


def pixel_features(images: Tensor, side: int = _SIDE) -> Tensor:
    """Coarse gray pixels as features: a space that no encoder of the model has shaped.

    Args:
        images: `(N, C, H, W)` in [0, 1], with C = 1 or 3 and H, W >= `side`.
        side: Side of the thumbnail in pixels.

    Returns:
        `(N, side * side)` float32: the mean over channels, downsampled with antialiasing.

    Raises:
        ValueError: The images are not `(N, C, H, W)` or are smaller than the thumbnail.
    """
    if images.ndim != 4 or min(images.shape[-2:]) < side:
        raise ValueError(f"Expected images (N, C, H, W) of at least {side} x {side} px, got {tuple(images.shape)}.")
    gray = images.float().mean(dim=1, keepdim=True)  # (N, 1, H, W)
    return F.interpolate(gray, size=(side, side), mode="bilinear", antialias=True).flatten(1)


def open_pixels(device: torch.device | str = "cpu") -> FeatureExtractor:
    """`pixel_features` of 16 x 16 px as an extractor."""
    spec = FeatureSpec("pixels", "gray values", _SIDE**2, _SIDE, "gray, [0, 1]", "bilinear, antialiased", None)
    return FeatureExtractor(spec, pixel_features, device)
