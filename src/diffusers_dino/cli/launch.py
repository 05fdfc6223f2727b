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
    """`accelerate launch` a script in one process, with all threads and in float32 unless its flags say otherwise.

    The paths of its config start in `folder`. A CalledProcessError if it fails.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += [f"--num_cpu_threads_per_process={torch.get_num_threads()}"]  # accelerate's default on a CPU is one
    command += ["--mixed_precision=no", "--dynamo_backend=no", str(script), *arguments]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # threads that spin stand still on busy cores
    subprocess.run(command, check=True, cwd=folder, env=environment)
