"""Coarse gray images: features that no network has shaped."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import FeatureExtractor, FeatureSpec

__all__ = [
    "THUMBNAILS",
    "gaussian_blur",
    "local_contrast",
    "local_contrast_features",
    "open_thumbnails",
    "pixel_features",
]

_SIDE = 16
_SIGMA = 2.0  # of the neighbourhood of local contrast, in pixels of the thumbnail
_FLOOR = 0.02  # added to the local deviation, so that noise in flat parts is not raised to a pattern


def pixel_features(images: Tensor, side: int = _SIDE) -> Tensor:
    """Coarse gray pixels as features: a space that no encoder of the model has shaped.

    Images `(N, C, H, W)` in [0, 1], C = 1 or 3 and H, W >= `side`, give `(N, side * side)` float32: the mean over
    channels, downsampled with antialiasing to `side` pixels.
    """
    if images.ndim != 4 or min(images.shape[-2:]) < side:
        raise ValueError(f"Expected images (N, C, H, W) of at least {side} x {side} px, got {tuple(images.shape)}.")
    return _thumbnails(images, side).flatten(1)


def local_contrast_features(images: Tensor, side: int = _SIDE) -> Tensor:
    """Gray thumbnails, each pixel in units of the contrast around it; made to find copies among look-alikes.

    Radiographs share their coarse brightness, so in plain pixels images of different people are near each other. What
    is left here is where an image is brighter or darker than its own surroundings. Shapes are those of
    `pixel_features`; features have norm 1, so that squared distances are `2 - 2 * correlation`, or 0 for a flat image.
    """
    return F.normalize(local_contrast(_thumbnails(images, side)).flatten(1), dim=1)


def local_contrast(gray: Tensor) -> Tensor:
    """Each pixel of `(N, 1, H, H)` less those around it, in units of their contrast."""
    residual = gray - gaussian_blur(gray, _SIGMA, "reflect")
    return residual / (gaussian_blur(residual.square(), _SIGMA, "reflect").sqrt() + _FLOOR)


_LOCAL_CONTRAST = f"gray values in units of local contrast, sigma {_SIGMA:g}, floor {_FLOOR:g}, norm 1"
THUMBNAILS = {"pixels": ("gray values", pixel_features), "local-contrast": (_LOCAL_CONTRAST, local_contrast_features)}


def open_thumbnails(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """One of `THUMBNAILS` as an extractor of 16 x 16 px."""
    layer, features = THUMBNAILS[name]
    spec = FeatureSpec(name, layer, _SIDE**2, _SIDE, "gray, [0, 1]", "bilinear, antialiased", None)
    return FeatureExtractor(spec, features, device)


def gaussian_blur(images: Tensor, sigma: float, padding_mode: str) -> Tensor:
    """Blur `(N, C, H, W)` with a Gaussian of `sigma` pixels; `padding_mode` is that of `torch.nn.functional.pad`."""
    radius, channels = max(1, round(3 * sigma)), images.shape[1]
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    padded = F.pad(images, 4 * (radius,), mode=padding_mode)
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)


def _thumbnails(images: Tensor, side: int) -> Tensor:
    """Gray `(N, 1, side, side)`."""
    gray = images.float().mean(dim=1, keepdim=True)
    return F.interpolate(gray, size=(side, side), mode="bilinear", antialias=True)
