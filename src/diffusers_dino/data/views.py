"""What training is fed with: images in the views of an epoch, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation
from .datasets import ImageDataset
from .sampling import Slot

__all__ = ["TrainingViews", "stack"]


class TrainingViews(Dataset[dict[str, Any]]):
    """What training shows at each slot of the global order: an image, augmented for its epoch.

    The work is in two parts: `load`, for the processes that load data, and `finish`, for the device of training, where
    random views cost little. What comes out depends on (seed, epoch, key) alone.

    Args:
        images: The data set.
        augmentation: Random views, or None for the images as they are.
        seed: Seed of the run.
    """

    def __init__(self, images: ImageDataset, augmentation: Augmentation | None, seed: int = 0) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slot: Slot) -> dict[str, Any]:
        return self.__getitems__([slot])

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """A whole batch at once.

        Returns:
            `image` float32 `(B, C, size, size)` in [0, 1], `key` and `position` (lists of B).
        """
        return self.finish(self.load(slots))

    def load(self, slots: Sequence[Slot], memory: Tensor | None = None) -> dict[str, Any]:
        """Read a batch: `image` uint8 `(B, C, size, size)`, `key`, `position` and what `finish` needs to know.

        Args:
            slots: What to read.
            memory: Bytes to put the images into, at least `B * 3 * size * size`.
        """
        keys, images = stack(self.images.read_many([slot.index for slot in slots]), len(slots), memory)
        batch = {"key": keys, "position": [slot.position for slot in slots], "image": images}
        if self.augmentation:
            batch["draws"] = self.augmentation.draw(keys, self.seed, [slot.epoch for slot in slots])
        return batch

    def finish(self, batch: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Move a loaded batch to a device and make the views there."""
        images = batch["image"].to(device) / 255  # one pass from bytes to floats
        if self.augmentation:
            images = self.augmentation.apply(images, batch["draws"])
        return {"key": batch["key"], "position": batch["position"], "image": images}


def stack(
    samples: Iterable[tuple[str, np.ndarray]], count: int, memory: Tensor | None = None
) -> tuple[list[str], Tensor]:
    """Put samples into one batch, each as soon as it is there.

    Args:
        samples: Keys and uint8 images `(H, W)` or `(H, W, 3)`.
        count: How many there are, B.
        memory: Bytes to use.

    Returns:
        The keys, and the images as uint8 `(B, C, H, W)`; C is 3 if any of them is colour.
    """
    keys: list[str] = []
    batch = torch.empty((0, 1, 1, 1))
    for row, (key, array) in enumerate(samples):
        shape = (count, 1 if array.ndim == 2 else 3, *array.shape[:2])
        if not keys or shape[1] > batch.shape[1]:
            before = batch.clone()
            batch = torch.empty(shape, dtype=torch.uint8) if memory is None else memory[: math.prod(shape)].view(shape)
            batch[:row] = before[:row]
            rows = batch.numpy()
        rows[row] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        keys.append(key)
    return keys, batch
