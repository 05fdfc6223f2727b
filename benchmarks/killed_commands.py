"""What benchmarks that kill a command share: to start it, to see that nothing of it goes on, to compare folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check", "contents", "differing", "start_command", "wait_for_orphans"]


def start_command(
    root: Path, command: Sequence[str], options: Mapping[str, Any], **environment: str
) -> subprocess.Popen:
    """Start `python COMMAND --option value ...`, whose output goes to the file `log`."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    log = open(root / "log", "w")  # noqa: SIM115
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *command, *flags], stdout=log, stderr=log, env=environ)


def check(process: subprocess.Popen, root: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"it ended with {process.returncode}:\n{(root / 'log').read_text()}")


def wait_for_orphans(path: Path) -> None:
    """Processes of killed runs, which name this path, must end by themselves."""
    for _ in range(600):
        if str(path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
            return
        time.sleep(0.1)
    sys.exit("processes of a killed run are still there")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(whole: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    return sorted(name for name in whole.keys() | other.keys() if whole.get(name) != other.get(name))
