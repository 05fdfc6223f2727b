"""What training is fed with: images in the views of an epoch, a batch at a time."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .datasets import ImageDataset
from .images.augmentation import Augmentation
from .order import Slot

__all__ = ["BatchMemory", "TrainingViews"]


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
        self._floats = _FloatMemory()

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

    def load(self, slots: Sequence[Slot], memory: BatchMemory | None = None) -> dict[str, Any]:
        """Read a batch: `image` uint8 `(B, C, size, size)`, `key`, `position` and what `finish` needs to know.

        Args:
            slots: What to read.
            memory: Where the images go, and stay until it is used again; fresh memory by default.
        """
        memory = memory or BatchMemory(len(slots), self.images.preprocessing.size)
        keys, images = memory.read(self.images, [slot.index for slot in slots])
        batch = {"key": keys, "position": [slot.position for slot in slots], "image": torch.from_numpy(images)}
        if self.augmentation:
            batch["draws"] = self.augmentation.draw(keys, self.seed, [slot.epoch for slot in slots])
        return batch

    def finish(self, batch: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Move a loaded batch to a device and make the views there."""
        images = batch["image"].to(device)
        images = self._floats.to_unit(images) if images.device.type == "cpu" else images / 255
        if self.augmentation:
            images = self.augmentation.apply(images, batch["draws"])
        return {"key": batch["key"], "position": batch["position"], "image": images}


class _FloatMemory:
    """Float32 memory that is used again as soon as no tensor shows it.

    Batches are large enough for an allocator to give their pages back each time. To get them anew costs more than to
    fill them, and slows down the processes that load.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=2)

    def to_unit(self, images: Tensor) -> Tensor:
        """Bytes 0..255 to floats in [0, 1], in one pass."""
        block = self._free.pop() if self._free else np.empty(images.numel(), np.float32)
        if block.size != images.numel():
            block = np.empty(images.numel(), np.float32)
        lent = block.reshape(images.shape)  # a view, which lives as long as any tensor that shows the block
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(np.divide(images.numpy(), np.float32(255), out=lent))


class BatchMemory:
    """Room for the images of a batch, to which they are decoded.

    Grayscale and colour lie side by side, so that neither overwrites the other where a batch turns out to hold both.
    Pages that are never written take no memory.

    Args:
        count: Largest number of images.
        size: Their height and width in pixels.
        shared: Whether processes that are forked later write to the same memory.

    Attributes:
        gray: uint8 `(count, 1, size, size)`.
        color: uint8 `(count, 3, size, size)`.
    """

    def __init__(self, count: int, size: int, shared: bool = False) -> None:
        pixels = count * size**2
        memory = np.frombuffer(mmap.mmap(-1, 4 * pixels), np.uint8) if shared else np.empty(4 * pixels, np.uint8)
        self.gray = memory[:pixels].reshape(count, 1, size, size)
        self.color = memory[pixels:].reshape(count, 3, size, size)

    def read(self, images: ImageDataset, indices: Sequence[int]) -> tuple[list[str], np.ndarray]:
        """Read samples, each to its place as soon as it is there.

        Returns:
            Their keys, and the images `(B, C, size, size)`; C is 3 if any of them is colour.
        """
        keys, batch, rows = [], self.gray, list(self.gray[: len(indices), 0])
        for row, (key, array) in enumerate(images.read_many(indices, rows)):
            keys.append(key)
            if array.ndim == 3 and batch is self.gray:
                batch = self.color
                batch[:row] = self.gray[:row]
            if batch is self.color or array is not rows[row]:  # not decoded right to where it belongs
                batch[row] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        return keys, batch[: len(indices)]
