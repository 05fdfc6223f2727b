"""Scripts and commands as processes that are forks of one, which has imported what they need.

Imports are most of what a start costs.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffusers_dino.cli import COMMANDS

__all__ = ["FORKING", "Forks"]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FORKING = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    FORKING.set_forkserver_preload([f"diffusers_dino.cli.{command.module}" for command in COMMANDS.values()])


class Forks:
    """A script, by its path or its name in `examples/`, or a command, in as many processes as a launcher would start.

    It has the methods of `subprocess.Popen`; `returncode` is the first that is not 0. If one process fails, the others
    are ended, as a launcher does.
    """

    def __init__(self, program: str, arguments: Sequence[str], environment: Mapping[str, str], processes: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / str(rank) for rank in range(processes)]
        told = [
            (str(program), arguments, {**environment, **place}, os.getcwd(), output)
            for place, output in zip(_places(processes), self._outputs, strict=True)
        ]
        self.members = [FORKING.Process(target=_run, args=each, daemon=False) for each in told]
        for member in self.members:
            member.start()

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self.members[0].pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        codes = [member.exitcode for member in self.members]
        if any(codes):
            self.kill()
            return next(filter(None, codes))
        return None if None in codes else 0

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.members[0].name, timeout)
            self.members[-1].join(0.02)
        for member in self.members:
            member.join()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return "".join(output.read_text() for output in self._outputs if output.is_file()), None


def _places(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each of its processes."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(program: str, arguments: Sequence[str], environment: dict[str, str], folder: str, output: Path) -> None:
    """What a process does: what `python examples/SCRIPT.py` or `python -m diffusers_dino COMMAND` would do."""
    with open(output, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    multiprocessing.set_start_method(None, force=True)  # Python's own, as in a process that nothing has started
    if program.endswith(".py"):
        sys.argv = [str(EXAMPLES / program), *arguments]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = ["diffusers-dino", *program.split(), *arguments]
        runpy.run_module("diffusers_dino", run_name="__main__", alter_sys=True)
