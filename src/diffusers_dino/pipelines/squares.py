"""Between images of any shape and the squares that a model sees: nothing is cut off."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["common_size", "resized", "stretched"]


def common_size(images: list[Tensor]) -> tuple[int, int]:
    """Height and width of images `(3, H, W)` that share them.

    Raises:
        ValueError: If they do not.
    """
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"The images have different sizes, {sizes}, and masks of one batch have one: give `output_size`, or call "
            "once for each size."
        )
    return sizes[0]


def stretched(image: Tensor) -> Tensor:
    """`(3, H, W)` to a square of its longer side."""
    return resized(image, max(image.shape[-2:]))[0]


def resized(image: Tensor, size: int) -> Tensor:
    """`(3, H, W)` in [0, 1] to `(1, 3, size, size)`, antialiased; bicubic's overshoot is clipped."""
    if image.shape[-2:] == (size, size):
        return image[None]
    return F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
