"""How `gpu.py` measures: in turns, on an idle device, until the time is up or the memory full."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

__all__ = ["SideBySide", "TimeUp", "free_memory", "largest_batch", "peak_gb", "stop_after"]


class TimeUp(BaseException):
    """A part's time is over. No `Exception`, so that nothing on the way takes it for an error of its own."""


@contextmanager
def stop_after(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` inside after so many seconds, between two steps of Python.

    And again every five seconds: Python drops what is raised while it destroys an object.
    """

    def stop(signum: int, frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class SideBySide:
    """Ways to do the same that are timed in turns, so that what else the machine does falls on all of them.

    Attributes:
        device: Where they compute.
        images: Images in a run.
        reference: The way that the others are compared with.
        seconds: Of each run of each way, in order, without the warm-up.
    """

    device: torch.device
    images: int
    reference: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, ways: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> None:
        """Time each way in turn; what was timed before an interruption is kept."""
        for number in range(warmup + repeats):
            for name, way in ways.items():
                synchronize(self.device)
                start = time.perf_counter()
                way()
                synchronize(self.device)
                if number >= warmup:
                    self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def figures(self) -> dict[str, Any]:
        """Medians over the repeats: rates, and ratios of runs that were neighbours in time."""
        figures: dict[str, Any] = {
            "images": self.images,
            "repeats": {name: len(taken) for name, taken in self.seconds.items()},
            "images_per_s": {n: round(self.images / statistics.median(taken), 4) for n, taken in self.seconds.items()},
            "seconds": {name: [round(value, 5) for value in taken] for name, taken in self.seconds.items()},
        }
        if self.reference in self.seconds:
            base = self.seconds[self.reference]
            figures[f"speed_over_{self.reference}"] = {
                name: round(statistics.median(b / t for b, t in zip(base, taken, strict=False)), 4)
                for name, taken in self.seconds.items()
                if name != self.reference
            }
        return figures


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give unused memory back, and start the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Largest memory of tensors since `free_memory`, in GB of 1e9 bytes; None where there is no GPU."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None


def largest_batch(candidates: Sequence[int], attempt: Callable[[int], Any], device: torch.device) -> int:
    """The first of the batch sizes, the largest first, for which an attempt has enough memory.

    Raises:
        RuntimeError: If none has.
    """
    for size in candidates:
        fits = _fits(attempt, size)
        free_memory(device)  # outside the handler, whose traceback would hold on to the tensors
        if fits:
            return size
    raise RuntimeError(f"There is not enough memory for a batch of {candidates[-1]}.")


def _fits(attempt: Callable[[int], Any], size: int) -> bool:
    try:
        attempt(size)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True
