"""Batches from loading processes, in the same order and with the same content for any number of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .order import GlobalBatchSampler, Slot
from .views import BatchMemory, TrainingViews

__all__ = ["load_batches"]

# Batches that each worker is ahead of training.
_PREFETCH = 2


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

    A `DataLoader` opens new shared memory for each batch. Its fresh pages and the passing of its handle cost a worker
    as much as a quarter of the decoding, and a container's `/dev/shm` is often too small for it. Here each forked
    worker writes to a few blocks in turn that exist from the start, and only the number of the block travels.

    A worker starts on a batch when the main process has taken the one `_PREFETCH` before it, and that is copied before
    the next is taken: no more than `_PREFETCH + 1` blocks are in use at once.

    Args:
        views: The views.
        batches: The batches that will be asked for.
        num_workers: Number of workers; without any, and where workers are not forked, batches travel as they are.
    """

    def __init__(
        self, views: TrainingViews, batches: GlobalBatchSampler | Sequence[list[Slot]], num_workers: int
    ) -> None:
        self.views = views
        largest = batches.batch_size if isinstance(batches, GlobalBatchSampler) else max(map(len, batches), default=0)
        forked = num_workers and torch.multiprocessing.get_start_method() == "fork"
        count = num_workers * (_PREFETCH + 1) if forked and largest else 0
        size = views.images.preprocessing.size
        self._blocks = [BatchMemory(largest, size, shared=True) for _ in range(count)]
        self._turn = 0

    def __getitems__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        worker, images = get_worker_info(), self.views.images
        if worker is None:
            return self.views.load(slots)
        known = len(images.unreadable)
        memory = None
        if self._blocks:
            number = worker.id * (_PREFETCH + 1) + self._turn
            self._turn = (self._turn + 1) % (_PREFETCH + 1)
            memory = self._blocks[number]
        batch = self.views.load(slots, memory)
        batch["unreadable"] = dict(list(images.unreadable.items())[known:])
        return batch if memory is None else {**batch, "image": (number, batch["image"].shape[1])}

    def receive(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of a worker with its images, which stay what they are until the next batch is taken."""
        self.views.images.note_unreadable(batch.get("unreadable", {}))
        if isinstance(batch["image"], Tensor):
            return batch
        number, channels = batch["image"]
        images = self._blocks[number].gray if channels == 1 else self._blocks[number].color
        return {**batch, "image": torch.from_numpy(images[: len(batch["key"])])}


def _settle(_: int) -> None:
    """Keep the garbage collector of a worker off what it was forked with: touching a page copies it."""
    gc.freeze()


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """`__getitems__` gives whole batches already. A lambda would not travel to spawned workers."""
    return batch
