"""Run a training script from another one, in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["launch_training"]


def launch_training(script: Path, arguments: Sequence[str], folder: Path) -> None:
    """Run a script in one process, with all threads and in float32 unless its flags say otherwise.

    It is what `accelerate launch` starts for one process, without the seconds in which that imports PyTorch itself.
    The paths of its config start in `folder`. A CalledProcessError if it fails.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
    }
    subprocess.run([sys.executable, str(script), *arguments], check=True, cwd=folder, env=environment)
