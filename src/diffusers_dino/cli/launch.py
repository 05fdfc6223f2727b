"""Run a training script from another one, in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["launch_training"]


def launch_training(script: Path, arguments: Sequence[str], folder: Path, finished: Path) -> None:
    """Run a script in one process, with all threads and in float32 unless its flags say otherwise.

    It is what `accelerate launch` starts for one process, without the seconds in which that imports PyTorch itself.
    The paths of its config start in `folder`. `finished` is the file that it writes last.

    Raises:
        SystemExit: With its exit code if it fails, and with 1 if it was stopped, so that `finished` is not there or
            is an earlier run's.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
    }
    before = _written(finished)
    code = subprocess.run([sys.executable, str(script), *arguments], cwd=folder, env=environment).returncode
    if code:
        print(f"{script.name} failed: {f'exit code {code}' if code > 0 else f'signal {-code}'}.", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # as a shell has it
    if _written(finished) in (None, before):
        sys.exit(f"{script.name} was stopped before its end. Start the same command again.")


def _written(file: Path) -> int | None:
    """When a file was written, or None if it is not there."""
    return file.stat().st_mtime_ns if file.exists() else None
