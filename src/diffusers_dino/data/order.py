"""The order in which samples are shown: one for any number of processes, and resumable anywhere.

Nothing here remembers what was shown: the sample at a position is computed from the seed and the position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..seeds import generator_for

__all__ = ["GlobalBatchSampler", "Slot", "WindowedOrder"]


class Slot(NamedTuple):
    """One place in the global order.

    Attributes:
        position: Number of the place in the run, counted over all processes from 0; the key of all random draws.
        epoch: How many times every sample was shown before.
        index: Which sample of the data set is shown.
    """

    position: int
    epoch: int
    index: int


class WindowedOrder:
    """A shuffle that reads few shards at a time: for sets that are remote, or larger than the memory's page cache.

    In each epoch the shards are permuted and cut into windows of `window_shards`; the samples of a window are shuffled
    among themselves. Every epoch shows every sample once, and any position is found without those before it, in memory
    of the order of a window. A wider window mixes better; a window over all shards is a full shuffle.

    Args:
        shard_sizes: Samples in each shard; shards follow each other in the data set.
        window_shards: Shards in a window.
    """

    def __init__(self, shard_sizes: Sequence[int], window_shards: int) -> None:
        if window_shards < 1 or min(shard_sizes, default=0) < 0 or sum(shard_sizes) < 1:
            raise ValueError(
                f"A windowed shuffle needs samples and windows of at least 1 shard, got {window_shards} shards of "
                f"{sum(shard_sizes)} samples in all"
            )
        self.sizes = tuple(shard_sizes)
        self.window_shards = window_shards
        self._starts = tuple(accumulate(self.sizes, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def index(self, seed: int, epoch: int, rank: int) -> int:
        """Which sample is the `rank`-th of an epoch."""
        shards, ends = _shard_order(self.sizes, self.window_shards, seed, epoch)
        window = int(np.searchsorted(ends, rank, side="right"))
        chosen = shards[window * self.window_shards : (window + 1) * self.window_shards]
        place = rank - (int(ends[window - 1]) if window else 0)
        place = int(_permutation(sum(self.sizes[shard] for shard in chosen), seed, epoch, window)[place])
        for shard in chosen:
            if place < self.sizes[shard]:
                return self._starts[shard] + place
            place -= self.sizes[shard]
        raise IndexError(f"rank {rank} is out of range for {len(self)} samples")


@dataclass(eq=False)
class GlobalBatchSampler(Sampler[list[Slot]]):
    """An endless batch sampler over shuffled epochs.

    Position `p` of the global order holds sample `permutation(seed, p // n)[p % n]`, or what `order` puts there.
    Batches follow each other without regard to the ends of epochs, so every sample is shown equally often. Of each run
    of `batch_size * num_processes` positions a process takes its own consecutive share: the union over processes is
    the same for every way to split the same global batch.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per batch of one process.
        seed: Seed of the order.
        num_processes, process_index: How many processes there are, and which this is.
        start: Global position to start from, for resuming.
        shuffle: Whether to permute each epoch.
        order: How to permute it, in place of a full shuffle: see `ImageDataset.order`.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    num_processes: int = 1
    process_index: int = 0
    start: int = 0
    shuffle: bool = True
    order: WindowedOrder | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1 or self.start < 0:
            raise ValueError(
                f"num_samples and batch_size must be positive and start not negative, got {self.num_samples}, "
                f"{self.batch_size} and {self.start}"
            )
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index must be in [0, {self.num_processes}), got {self.process_index}")
        if self.order is not None and len(self.order) != self.num_samples:
            raise ValueError(f"order is of {len(self.order)} samples, but num_samples is {self.num_samples}")

    @property
    def global_batch_size(self) -> int:
        """Samples of one batch over all processes."""
        return self.batch_size * self.num_processes

    def __iter__(self) -> Iterator[list[Slot]]:
        first = self.start + self.process_index * self.batch_size
        while True:
            yield [self.slot(position) for position in range(first, first + self.batch_size)]
            first += self.global_batch_size

    def slot(self, position: int) -> Slot:
        """The slot at a position of the global order."""
        epoch, rank = divmod(position, self.num_samples)
        if not self.shuffle:
            index = rank
        elif self.order is not None:
            index = self.order.index(self.seed, epoch, rank)
        else:
            index = int(_permutation(self.num_samples, self.seed, epoch)[rank])
        return Slot(position, epoch, index)


@lru_cache(maxsize=2)  # batches cross the border of two epochs, or of two windows
def _permutation(num_samples: int, seed: int, epoch: int, *window: int) -> Tensor:
    return torch.randperm(num_samples, generator=generator_for(seed, "order", epoch, *window))


@lru_cache(maxsize=2)
def _shard_order(sizes: tuple[int, ...], window_shards: int, seed: int, epoch: int) -> tuple[list[int], np.ndarray]:
    """The shards of an epoch in their order, and at which rank each window of them ends."""
    shards = torch.randperm(len(sizes), generator=generator_for(seed, "shards", epoch)).tolist()
    windows = range(0, len(shards), window_shards)
    counts = [sum(sizes[shard] for shard in shards[first : first + window_shards]) for first in windows]
    return shards, np.cumsum(counts)
