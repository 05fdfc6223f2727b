"""What a run says while it runs: a progress bar or plain lines, and one JSON line for each update."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import is_wandb_available
from tqdm.auto import tqdm

from ..extras import require
from ..files import atomic_write

__all__ = ["Progress", "check_tracker", "peak_memory"]


class Progress:
    """Shows and records the progress of training. Only the main process shows and records.

    On a terminal there is a bar; otherwise (a batch system's log) a line every so many updates. `train_log.jsonl` gets
    `{"step", "loss", "lr"}` for every update, whole also when the process is killed; on resuming from update `start`,
    lines of updates that will be done again are taken out.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        log_file: str | Path,
        total: int,
        start: int = 0,
        images_per_step: int = 1,
        every: int = 50,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.step, self.every = total, start, every
        self.images_per_step = images_per_step
        self.device = accelerator.device
        self.stream = stream or sys.stderr
        self.quiet = not accelerator.is_main_process
        self._log = None if self.quiet else _open_log(Path(log_file), start)
        self._first, self._start_time = start, time.perf_counter()
        on_terminal = self.stream.isatty() and not self.quiet
        self._bar = tqdm(total=total, initial=start, unit="step", file=self.stream) if on_terminal else None

    def update(self, loss: float, lr: float) -> None:
        """Count one update."""
        self.step += 1
        if self._log is not None:
            self._log.write(json.dumps({"step": self.step, "loss": loss, "lr": lr}) + "\n")
            self._log.flush()
        if self._bar is not None:
            self._bar.set_postfix(self._status(loss, lr), refresh=False)
            self._bar.update()
        elif not self.quiet and (self.step % self.every == 0 or self.step in (self._first + 1, self.total)):
            described = ", ".join(f"{name} {value}" for name, value in self._status(loss, lr).items())
            print(f"step {self.step}/{self.total}: {described}", file=self.stream, flush=True)

    def _status(self, loss: float, lr: float) -> dict[str, str]:
        status = {"loss": f"{loss:.4f}", "lr": f"{lr:.2e}", "images/s": f"{self.rate:.1f}"}
        return {**status, "memory": f"{peak_memory(self.device):.1f} GiB"}

    @property
    def rate(self) -> float:
        """Images per second since the start, the time of validation and checkpoints included."""
        elapsed = time.perf_counter() - self._start_time
        return (self.step - self._first) * self.images_per_step / max(elapsed, 1e-9)

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self.stream)
        elif not self.quiet:
            print(message, file=self.stream, flush=True)

    def close(self) -> None:
        """End the bar and the file."""
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()


def peak_memory(device: torch.device) -> float:
    """Largest memory in GiB so far: what tensors took on an accelerator, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**10 if sys.platform != "darwin" else 1  # ru_maxrss counts KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_tracker(name: str | None) -> str | None:
    """A tracker's name, or ImportError if it is not installed: accelerate would leave it out without a word."""
    if name == "tensorboard":
        require("tensorboard", "train", "This tracker needs tensorboard")
    elif name == "wandb" and not is_wandb_available():
        raise ImportError("wandb is not installed: pip install wandb")
    return name


def _open_log(path: Path, start: int) -> TextIO:
    kept = []
    if start and path.is_file():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except ValueError:  # a line that a killed process left unfinished
                continue
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:  # a run that is killed here keeps its log
        file.write("".join(kept).encode())
    return open(path, "a")
