"""The device of each of several processes, how many processes to start, and how to compute the same bits again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["count_workers", "deterministic", "device_of", "send"]


def device_of(place: int, device: str | None) -> str:
    """The device of process number `place`: the one that was asked for, else the GPUs in turn, else the CPU."""
    if device is None and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
    return device or "cpu"


def count_workers(num_workers: int | None, device: str | None) -> int:
    """Processes at a time: as asked for, else one for each GPU, else one for each core."""
    if num_workers is not None:
        return num_workers
    if device_of(0, device) == "cpu":
        return os.cpu_count() or 1
    return 1 if device else torch.cuda.device_count()


def send(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor on a device; None leaves it where it is.

    The host does not wait for the copy to a GPU, which is made from memory pinned for it.
    """
    if device is None or torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Compute with this number of CPU threads, and by deterministic kernels where cuDNN has a choice."""
    others, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(others)
        cudnn.deterministic, cudnn.benchmark = before
