"""The paper's augmentation: random sharpening and an affine map, each draw a function of (seed, epoch, sample).

Source: DiNO-Diffusion (arXiv 2407.11594), section 2.5: sharpening, 5 % shear, 5 % translation, 90-140 % scale. No flip
by default: it would put the heart on the wrong side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ...seeds import generator_for

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Random views of images, the same for the same (seed, epoch, key) whatever else is in the batch.

    Args:
        sharpness: Largest weight of the unsharp mask; each image draws uniformly from [0, sharpness].
        shear: Largest horizontal and vertical shear, as a fraction of the image's side.
        translation: Largest shift along each axis, as a fraction of the image's side.
        scale: Range of magnification. Below 1 the image shrinks and its surroundings are black.
        flip: Probability of a left-right flip.
    """

    sharpness: float = 1.0
    shear: float = 0.05
    translation: float = 0.05
    scale: tuple[float, float] = (0.9, 1.4)
    flip: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # a YAML file gives a list
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "scale" and value < 0:
                raise ValueError(f"{field.name} must not be negative, got {value}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two positive factors (smallest, largest), got {self.scale}")
        if self.flip > 1:
            raise ValueError(f"flip is a probability, got {self.flip}")

    def __call__(self, images: Tensor, keys: Sequence[str], seed: int, epochs: Sequence[int]) -> Tensor:
        """Augment `(B, C, H, W)` floats in [0, 1] with these B keys, each shown in one of B epochs of a run."""
        return self.apply(images, self.draw(keys, seed, epochs))

    def draw(self, keys: Sequence[str], seed: int, epochs: Sequence[int]) -> Tensor:
        """The draws `(B, 7)` that `apply` needs for these samples in these epochs."""
        return torch.stack(
            [
                torch.rand(7, generator=generator_for(seed, "augmentation", epoch, key))
                for key, epoch in zip(keys, epochs, strict=True)
            ]
        )

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Augment images `(B, C, H, W)` with given draws `(B, 7)` from the uniform distribution on [0, 1)."""
        amount, scale, shear_x, shear_y, shift_x, shift_y, flip = uniform.to(images).unbind(1)
        if self.sharpness:
            images = sharpen(images, amount * self.sharpness)
        low, high = self.scale
        scale = low + (high - low) * scale
        mirror = torch.where(flip < self.flip, -1.0, 1.0)
        shear_x, shear_y = ((2 * s - 1) * self.shear for s in (shear_x, shear_y))
        # affine_grid's coordinates span [-1, 1]: a shift by the whole side is 2.
        shift_x, shift_y = ((2 * s - 1) * 2 * self.translation for s in (shift_x, shift_y))
        # theta maps positions in the result to positions in the source, hence the division by the magnification.
        rows = [mirror / scale, shear_x / scale, shift_x, shear_y / scale, 1 / scale, shift_y]
        theta = torch.stack(rows, dim=1).view(-1, 2, 3)  # (B, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)


def sharpen(images: Tensor, amount: Tensor) -> Tensor:
    """Unsharp mask with a 3 x 3 mean: `x + amount * (x - mean(x))` for `(B, C, H, W)` in [0, 1] and `(B,)`."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    detail = images - F.avg_pool2d(padded, kernel_size=3, stride=1)
    return (images + amount.view(-1, 1, 1, 1) * detail).clamp(0, 1)
