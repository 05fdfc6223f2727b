"""The training image that is nearest to each generated one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from ..data import ImageDataset
from ..metrics.copy_gate import CopyGate
from ..metrics.registration import pictures_of
from ..pixels import to_unit, with_channels

__all__ = ["Nearest", "TrainingImages"]

_SAME = 8  # levels of 255 that small pictures of the same images differ by at most, prepared at different sizes


class Nearest(NamedTuple):
    """The training image that is nearest to a picture.

    Attributes:
        picture: How it looks, mirrored if that is nearer; None if nothing is there to show.
        distance: Relative distance in [0, 1] that a gate decides by.
        is_copy: Whether the gate takes the picture for a copy.
    """

    picture: Image.Image | None
    distance: float
    is_copy: bool


class TrainingImages:
    """What a gate knows of training images, and those images themselves where they are at hand.

    A ValueError if the images are not those that the gate was calibrated on, in the same order.
    """

    def __init__(self, gate: CopyGate, images: ImageDataset | None = None) -> None:
        self.gate, self.images = gate, images
        if images is not None and not self._are_known(images):
            raise ValueError(
                f"The {len(images)} training images are not the {len(gate)} that the gate was calibrated on: give "
                "both of the same training, or only one of them."
            )

    def _are_known(self, images: ImageDataset) -> bool:
        if len(images) != len(self.gate) or self.gate.pictures is None:
            return len(images) == len(self.gate)
        probe = list(range(0, len(images), max(1, len(images) // 8)))
        here = torch.cat([pictures_of(images[number]["image"][None]) for number in probe])
        return bool((here.float() - self.gate.pictures[probe].float()).abs().mean() < _SAME)

    def nearest(self, pictures: Sequence[Image.Image]) -> list[Nearest]:
        """The nearest training image to each of some pictures of one size."""
        units = torch.stack(to_unit(list(pictures)))  # (N, 3, S, S)
        found = self.gate.search(with_channels(units, 1) if pictures[0].mode == "L" else units)
        distances = found.smallest.tolist()
        return [
            Nearest(self._show(number, mirrored), distance, distance < self.gate.threshold)
            for number, mirrored, distance in zip(*(part.tolist() for part in found.nearest), distances, strict=True)
        ]

    def _show(self, number: int, mirrored: bool) -> Image.Image | None:
        if self.images is not None:
            ((_, pixels),) = self.images.read_many([number])
        elif self.gate.pictures is not None:
            pixels = self.gate.pictures[number].numpy()
        else:
            return None
        picture = Image.fromarray(pixels)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
