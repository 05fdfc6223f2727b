"""Where processes that work side by side compute, and how many of them there are."""

from __future__ import annotations

import os

import torch

__all__ = ["count_workers", "device_of"]


def device_of(place: int, device: str | None) -> str:
    """Where the process at a place computes: on the device that was asked for, or on the GPUs in turn."""
    if device is None and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
    return device or "cpu"


def count_workers(num_workers: int | None, device: str | None) -> int:
    """Processes at a time: what was asked for, or one for each device, or for each core where there is none."""
    if num_workers is not None:
        return num_workers
    if device_of(0, device) == "cpu":
        return os.cpu_count() or 1
    return 1 if device else torch.cuda.device_count()
