"""Scripts and commands as processes that are forks of one, which has imported what they need.

Imports are most of what a start costs. What a test says of the start itself, of a launcher, or of an environment that
is read on import needs `scripts.start_script`.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffusers_dino.cli import COMMANDS
from scripts import EXAMPLES, command_line

PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    PROCESSES.set_forkserver_preload([f"diffusers_dino.cli.{command.module}" for command in COMMANDS.values()])


class Fork:
    """A process with the methods of `subprocess.Popen`."""

    def __init__(self, script: str, arguments: list[str], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "output"
        self._process = PROCESSES.Process(
            target=_run, args=(script, arguments, environment, os.getcwd(), self._output), daemon=False
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._output.read_text(), None


def start_script(
    script: str,
    config: Path | None = None,
    *,
    threads: int | None = None,
    environment: dict[str, str] | None = None,
    **flags: Any,
) -> Fork:
    """Start a script, by its path or its name in `examples/`, or a command, with as many threads as this process."""
    threads = str(threads or torch.get_num_threads())
    own = {"OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true", **(environment or {})}
    return Fork(script, command_line(config, flags), {**os.environ, **own})


def run_script(
    script: str, config: Path | None = None, *, processes: int = 1, threads: int | None = None, **flags: Any
) -> str:
    """Run a script as one or several processes, as a launcher would start them. Returns what they printed.

    Sums depend on how many threads share them: give `threads` where runs of other numbers of processes are compared.
    """
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        threads = threads or 1
    started = [start_script(script, config, threads=threads, environment=each, **flags) for each in environments]
    try:
        output = "".join(process.communicate(timeout=300)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), output
    return output


def _run(script: str, arguments: list[str], environment: dict[str, str], folder: str, output: Path) -> None:
    """What the process does: what `python examples/SCRIPT.py` or `python -m diffusers_dino COMMAND` would do."""
    with open(output, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    multiprocessing.set_start_method(None, force=True)  # Python's own, as in a process that nothing has started
    if script.endswith(".py"):
        sys.argv = [str(EXAMPLES / script), *arguments]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = ["diffusers-dino", *script.split(), *arguments]
        runpy.run_module("diffusers_dino", run_name="__main__", alter_sys=True)
