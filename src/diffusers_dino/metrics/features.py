"""From images to feature vectors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["pixel_features"]


def pixel_features(images: Tensor, side: int = 16) -> Tensor:
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
