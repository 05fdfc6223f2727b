"""What training is fed with: batches of views, the same for any number of loading processes."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..devices import send
from .datasets import ImageDataset
from .images.augmentation import Augmentation
from .order import GlobalBatchSampler, Slot

__all__ = ["TrainingViews", "load_batches"]

# Batches that each worker is ahead of training.
_PREFETCH = 2


class TrainingViews(Dataset[dict[str, Any]]):
    """What training shows at each slot of the global order: an image, augmented for its epoch.

    The work is in two parts: `load`, for the processes that load data, and `finish`, for the device of training, where
    random views cost little. What comes out depends only on (seed, epoch, key). Without augmentation, images stay as
    they are.
    """

    def __init__(self, images: ImageDataset, augmentation: Augmentation | None, seed: int = 0) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed
        self._floats = _FloatMemory()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """A whole batch: `image` float32 `(B, C, size, size)` in [0, 1], `key` and `position` (lists of B)."""
        return self.finish(self.load(slots))

    def load(self, slots: Sequence[Slot], memory: np.ndarray | None = None) -> dict[str, Any]:
        """Read a batch: `image` uint8 `(B, C, size, size)`, `key`, `position` and what `finish` needs to know.

        The images go to `memory`, at least `4 * B * size**2` bytes, and stay until it is used again.
        """
        size = self.images.preprocessing.size
        memory = np.empty(4 * len(slots) * size**2, np.uint8) if memory is None else memory
        gray, color = (_images_in(memory, channels, len(slots), size) for channels in (1, 3))
        keys, batch = [], gray
        for row, (key, array) in enumerate(self.images.read_many([slot.index for slot in slots])):
            keys.append(key)
            if array.ndim == 3 and batch is gray:
                batch = color
                batch[:row] = gray[:row]
            batch[row] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        loaded = {"key": keys, "position": [slot.position for slot in slots], "image": torch.from_numpy(batch)}
        if self.augmentation:
            loaded["draws"] = self.augmentation.draw(keys, self.seed, [slot.epoch for slot in slots])
        return loaded

    def finish(self, batch: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Move a loaded batch to a device and make the views there; what comes out is a copy."""
        images = send(batch["image"], device)
        images = self._floats.to_unit(images) if images.device.type == "cpu" else images / 255
        if self.augmentation:
            images = self.augmentation.apply(images, send(batch["draws"], device))
        return {"key": batch["key"], "position": batch["position"], "image": images}


class _FloatMemory:
    """Float32 memory that is used again as soon as no tensor shows it.

    Batches are large enough for an allocator to give their pages back each time. Getting them anew more than doubles
    the time to load 64 images of 512 px (`benchmarks/loader.py`).
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


def load_batches(
    views: Dataset[dict[str, Any]],
    batches: GlobalBatchSampler | Sequence[list[Slot]],
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Load batches, in the same order and with the same content for any number of workers.

    Args:
        views: `TrainingViews`, or another data set whose `__getitems__` gives whole batches.
        batches: Which slots make each batch: a sampler, without end, or a list.
        num_workers: Processes that load; 0 loads in this one.
        device: Where the views are finished. Batches of other data sets stay where they were made.
    """
    transport = _Transport(views, batches, num_workers) if isinstance(views, TrainingViews) else None
    loader = DataLoader(
        views if transport is None else transport,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        worker_init_fn=_settle,
        pin_memory=transport is None and torch.device(device).type == "cuda",
        generator=torch.Generator(),  # without it the global one is drawn from, and a resumed run would differ
    )
    loaded = iter(loader)
    if transport is None:
        return loaded
    return (views.finish(transport.receive(batch), device) for batch in loaded)


class _Transport(Dataset[dict[str, Any]]):
    """What workers load of `TrainingViews`, and how the main process gets at it.

    A plain `DataLoader` opens new shared memory for each batch: its fresh pages cost half as much as decoding 512 px
    JPEGs does (`benchmarks/loader.py`), and the `/dev/shm` of a container is often too small. Here each forked worker
    writes to a few blocks in turn that exist from the start, and only the number of the block travels. Without forked
    workers, batches travel as they are.

    A worker starts on a batch when the main process has taken the one `_PREFETCH` before it, and that is copied before
    the next is taken: no more than `_PREFETCH + 1` blocks are in use at once.
    """

    def __init__(
        self, views: TrainingViews, batches: GlobalBatchSampler | Sequence[list[Slot]], num_workers: int
    ) -> None:
        self.views = views
        largest = batches.batch_size if isinstance(batches, GlobalBatchSampler) else max(map(len, batches), default=0)
        self.size = views.images.preprocessing.size
        forked = torch.multiprocessing.get_start_method() == "fork"
        count = num_workers * (_PREFETCH + 1) if forked and largest else 0
        # Pages that are never written take no memory.
        self._blocks = [np.frombuffer(mmap.mmap(-1, 4 * largest * self.size**2), np.uint8) for _ in range(count)]
        self._turn = 0

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        worker, images = get_worker_info(), self.views.images
        if worker is None:
            return self.views.load(slots)
        known = len(images.unreadable)
        number = worker.id * (_PREFETCH + 1) + self._turn
        self._turn = (self._turn + 1) % (_PREFETCH + 1)
        batch = self.views.load(slots, self._blocks[number] if self._blocks else None)
        batch["unreadable"] = dict(list(images.unreadable.items())[known:])
        batch["not_images"] = images.not_images & batch["unreadable"].keys()
        return {**batch, "image": (number, batch["image"].shape[1])} if self._blocks else batch

    def receive(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of a worker with its images, which stay what they are until the next batch is taken."""
        self.views.images.note_unreadable(batch.get("unreadable", {}), batch.get("not_images", ()))
        if isinstance(batch["image"], Tensor):
            return batch
        number, channels = batch["image"]
        images = _images_in(self._blocks[number], channels, len(batch["key"]), self.size)
        return {**batch, "image": torch.from_numpy(images)}


def _images_in(memory: np.ndarray, channels: int, count: int, size: int) -> np.ndarray:
    """`(count, channels, size, size)` in memory where grayscale lies before colour: neither overwrites the other."""
    pixels = count * size**2
    part = memory[:pixels] if channels == 1 else memory[pixels : 4 * pixels]
    return part.reshape(count, channels, size, size)


def _settle(_: int) -> None:
    """Keep the garbage collector of a worker off what it was forked with: touching a page copies it."""
    gc.freeze()


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """`__getitems__` gives whole batches already. A lambda would not travel to spawned workers."""
    return batch
