"""When a run has to save or to leave before its end: signals of a batch system, and a clock."""

from __future__ import annotations

import os
import signal
import time

__all__ = ["Interruption"]


class Interruption:
    """Notes SIGTERM and SIGUSR1, and how long ago the last checkpoint was.

    Batch systems send SIGTERM before they take a machine away; SLURM can be asked for SIGUSR1 some minutes earlier.
    Each process has its own wishes: exchange them before acting, so that all processes save and leave at the same
    update. Give `minutes`, after which a checkpoint is due (0: never), to only one process: its clock decides for all.
    While it is `starting`, until the first `saved`, there is nothing to save, and a signal ends the process at once.
    """

    def __init__(self, minutes: float = 0.0, starting: bool = False) -> None:
        if minutes < 0:
            raise ValueError(f"The minutes between checkpoints must not be negative, got {minutes}.")
        self._seconds = 60 * minutes
        self._stop = False
        self._starting = starting
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        self._saved_at = time.monotonic()

    def wishes(self) -> tuple[float, float]:
        """Whether to leave, and whether to save: 1 or 0, to be averaged over the processes."""
        due = self._seconds > 0 and time.monotonic() - self._saved_at >= self._seconds
        return float(self._stop), float(due)

    def saved(self) -> None:
        """Start the clock anew, when training begins and after a checkpoint."""
        self._starting = False
        self._saved_at = time.monotonic()

    def _note(self, number: int, frame: object) -> None:
        self._stop = True
        if self._starting:
            os.write(2, b"Stopped before training began: no update is lost. Start it again as before.\n")
            # An exception would come out of an import as whatever that makes of it. Of several processes, one that
            # leaves makes the launcher stop the others, which would wait for it, only if it fails.
            os._exit(0 if os.environ.get("WORLD_SIZE", "1") == "1" else 1)
