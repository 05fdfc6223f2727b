"""Run commands and the scripts of `examples/` on folders of made-up images: as processes, or in this one."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import tiny
from diffusers_dino.cli import COMMANDS
from diffusers_dino.cli.arguments import parse_arguments
from forks import Forks

EXAMPLES = Path(__file__).parents[1] / "examples"

# Flags of the scripts that train classifiers, at toy size
TOY_CLASSIFIER = {
    "classifier_options": ["growth_rate=4", "block_config=[1]"],
    "size": 32,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "validation_steps": 1,
    "bootstrap_repeats": 20,
    "num_workers": 0,
}


def image_folder(folder: Path, count: int, size: int, seed: int = 0) -> Path:
    """Fill a folder with smooth gray images `000.png`, `001.png`, ..."""
    folder.mkdir(exist_ok=True)
    pixels = (tiny.random_images(count, channels=1, size=size, seed=seed)[:, 0] * 255).byte().numpy()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def masked_folder(folder: Path, count: int) -> Path:
    """Fill `images/` and `masks/` of a folder: two dark lungs on a bright, noisy ground, at 40 px."""
    y, x = np.mgrid[:40, :40]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        mask = ((abs(x - 20) - 8) ** 2 / 30 + (y - 17 - i) ** 2 / 90) < 1
        noise = np.random.default_rng(i).normal(0, 10, mask.shape)
        Image.fromarray((180 - 120 * mask + noise).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    return folder


def tiny_training(folder: Path, count: int = 24) -> dict[str, Any]:
    """Write tiny frozen models, a UNet's config and images; gives the flags of `train_dino.py` that name them."""
    tiny.tiny_vae().save_pretrained(folder / "vae")
    tiny.tiny_conditioner().save_pretrained(folder / "conditioner")
    tiny.tiny_unet().save_config(folder / "unet_config")
    return {
        "train_data_dir": image_folder(folder / "images", count, size=40),
        **{name: folder / name for name in ("vae", "conditioner", "unet_config")},
        "resolution": 32,
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "output_dir": folder / "out",
    }


def command_line(config: Path | None, flags: dict[str, Any]) -> list[str]:
    """Spell flags as a user does; None leaves a flag out."""
    parts = [] if config is None else [str(config)]
    for name, value in flags.items():
        if value is not None:
            parts += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return parts


def start_script(
    script: str,
    config: Path | None = None,
    *,
    processes: int = 1,
    threads: int | None = None,
    fresh: bool = False,
    environment: dict[str, str] | None = None,
    **flags: Any,
) -> Forks | subprocess.Popen[str]:
    """Start a script, by its path or its name in `examples/`, or a command, as one or several processes.

    They are forks of one that has imported what they need. A `fresh` one is for what a test says of the start itself,
    or of an environment that is read on import.

    Sums depend on how many threads share them: one process has as many as this one, several have one each. Give
    `threads` where a run is compared with one of another number of processes.
    """
    threads = threads or (torch.get_num_threads() if processes == 1 else 1)
    own = {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true", **(environment or {})}
    environment, arguments = {**os.environ, **own}, command_line(config, flags)
    if not fresh:
        return Forks(script, arguments, environment, processes)
    program = [str(EXAMPLES / script)] if script.endswith(".py") else ["-m", "diffusers_dino", *script.split()]
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_script(script: str, config: Path | None = None, **options: Any) -> str:
    """Run a script as `start_script` does. Returns what it printed; fails if it does."""
    process = start_script(script, config, **options)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def wait_until(happened: Callable[[], object], process: Forks | subprocess.Popen[str]) -> None:
    """Wait until something is so; fails with what the process printed if it ends before, or needs five minutes."""
    deadline = time.monotonic() + 300
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)


def address_of(process: subprocess.Popen[str]) -> str:
    """Where a demo that was started afresh shows its page, once it says so."""
    printed = ""
    while "Open http" not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return printed.split("Open ")[1].split()[0]


def losses(folder: Path) -> list[float]:
    """The loss of each update that the log of a run tells of."""
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold a model of the same weights, to the bit."""
    ours, theirs = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def call_script(script: str, config: Path | None = None, **flags: Any) -> None:
    """Run a script's `main`, or a command, in this process; errors are raised, not printed."""
    call_argv(script, command_line(config, flags))


def call_argv(script: str, arguments: list[str]) -> None:
    """As `call_script`, with the words of a command line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        if script in COMMANDS:
            module = COMMANDS[script].load()
            shares_config = COMMANDS[script].shares_config
            module.main(parse_arguments(module.Arguments, arguments, skip_foreign_keys=shares_config))
        else:
            with patch.object(sys, "argv", [script, *arguments]):
                importlib.import_module(Path(script).stem).main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
