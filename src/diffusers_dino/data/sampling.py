"""Which sample is shown when: one global order, whatever the number of processes, and resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..seeds import generator_for

__all__ = ["GlobalBatchSampler", "Slot"]


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


class GlobalBatchSampler(Sampler[list[Slot]]):
    """An endless batch sampler over shuffled epochs.

    Position `p` of the global order holds sample `permutation(seed, p // n)[p % n]`. Batches follow each other without
    regard to the ends of epochs, so every sample is shown equally often. Of each run of `batch_size * num_processes`
    positions a process takes its own consecutive share: the union over processes is the same for every way to split
    the same global batch.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per batch of one process.
        seed: Seed of the order.
        num_processes: Number of processes.
        process_index: Which process this is.
        start: Global position to start from, for resuming.
        shuffle: Whether to permute each epoch.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        start: int = 0,
        shuffle: bool = True,
    ) -> None:
        if num_samples < 1 or batch_size < 1 or start < 0:
            raise ValueError(
                f"num_samples and batch_size must be positive and start not negative, got {num_samples}, {batch_size} "
                f"and {start}"
            )
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be in [0, {num_processes}), got {process_index}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.start = start
        self.shuffle = shuffle

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
        """What stands at a position of the global order."""
        epoch, rank = divmod(position, self.num_samples)
        index = int(_permutation(self.num_samples, self.seed, epoch)[rank]) if self.shuffle else rank
        return Slot(position, epoch, index)


@lru_cache(maxsize=2)  # batches cross the border of two epochs
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=generator_for(seed, "order", epoch))
