"""Run the scripts of `examples/` on folders of made-up images: as processes, or in this one, which is faster."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from PIL import Image

import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


def image_folder(folder: Path, count: int, size: int) -> Path:
    """Fill a folder with smooth gray images `000.png`, `001.png`, ..."""
    pixels = (tiny.random_images(count, channels=1, size=size)[:, 0] * 255).byte().numpy()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def command_line(config: Path | None, flags: dict[str, Any]) -> list[str]:
    """Spell flags as a user does; None leaves a flag out."""
    parts = [] if config is None else [str(config)]
    for name, value in flags.items():
        if value is not None:
            parts += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return parts


def run_script(script: str, config: Path | None = None, *, processes: int = 1, **flags: Any) -> str:
    """Run a script as one or several processes of its own. Returns what it printed; fails if it does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(EXAMPLES / script)]
    threads = str(torch.get_num_threads()) if processes == 1 else "1"  # sums depend on how they are shared out
    result = subprocess.run(
        [*command, *command_line(config, flags)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def call_script(script: str, config: Path | None = None, **flags: Any) -> None:
    """Run a script's `main` in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    argv = [script, *command_line(config, flags)]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with patch.object(sys, "argv", argv), patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
            importlib.import_module(Path(script).stem).main()
    finally:
        signal.signal(signal.SIGTERM, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
