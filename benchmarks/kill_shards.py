"""Kill `diffusers-dino shards` at random moments, go on each time, and compare with an uninterrupted run.

    python benchmarks/kill_shards.py --kills 10

SIGKILL reaches the command while it prepares images, looks for duplicates, or writes shards and reports; its workers
must notice. Prints where it was killed, and ends with an error unless all files of both folders are equal, byte for
byte.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_dino.cli.arguments import flag, parse_arguments


@dataclass
class Arguments:
    kills: int = flag(10, "How often the command is killed.")
    num_images: int = flag(600, "Images to make and to write.")
    image_size: int = flag(256, "Side of the images in pixels.")
    num_workers: int = flag(2, "Processes of the command.")
    seed: int = flag(0, "Seed of the moments and of the images.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images", args)
        process = start(root, "whole", args)
        steps = most_files(process, root / "whole")
        check(process, root)
        print(f"uninterrupted: {steps} files at once, with those in .work")
        stages = Counter(
            kill_once(root, args, rng.randrange(2 * steps // (args.kills + 1)), rng.uniform(0, 0.2))
            for _ in range(args.kills)
        )
        process = start(root, "killed", args)
        check(process, root)
        wait_for_orphans(root)
        whole, killed = contents(root / "whole"), contents(root / "killed")
    print(f"killed while: {', '.join(f'{stage} ({count})' for stage, count in sorted(stages.items()))}")
    if different := differing(whole, killed):
        sys.exit(f"after {args.kills} kills {len(different)} files differ, such as {', '.join(different[:5])}")
    tars = sum(name.endswith(".tar") for name in whole)
    print(f"{args.kills} kills: all {len(whole)} files are equal, among them {tars} shards")


def make_images(folder: Path, args: Arguments) -> None:
    """Smooth pictures with a little noise, some of them twice."""
    folder.mkdir()
    rng = np.random.default_rng(args.seed)
    for number in range(args.num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((args.image_size, args.image_size), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.png")
        if number % 20 == 0:
            Image.fromarray(noisy).save(folder / f"{number:05d}-again.bmp")


def start(root: Path, name: str, args: Arguments) -> subprocess.Popen:
    """Start the command, whose output goes to the file `log`, and wait until it has listed the images."""
    options = {"output_dir": root / name, "source": root / "images", "salt_file": root / "salt", "size": 128}
    options |= {"shard_size": 10, "part_size": 8, "num_workers": args.num_workers, "test_fraction": 0.2}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    log = open(root / "log", "w")  # noqa: SIM115
    command = [sys.executable, "-m", "diffusers_dino", "shards", *flags]
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and "Preparing" not in (root / "log").read_text():
        time.sleep(0.02)
    return process


def most_files(process: subprocess.Popen, output: Path) -> int:
    """How many files there are at once while the command runs to its end: how far it can get."""
    most = 0
    while process.poll() is None:
        most = max(most, count_files(output))
        time.sleep(0.01)
    return most


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def kill_once(root: Path, args: Arguments, steps: int, delay: float) -> str:
    """Kill a run some files later, and say in which stage; a run that has ended before is begun again from nothing.

    Files are counted, not seconds: most of the time goes into the start of the workers, where there is little to lose.
    """
    output = root / "killed"
    while True:
        process = start(root, "killed", args)
        goal = count_files(output) + steps
        while process.poll() is None and count_files(output) < goal:
            time.sleep(0.005)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return stage_of(output)
        check(process, root)
        shutil.rmtree(output)


def stage_of(output: Path) -> str:
    work = output / ".work"
    if (output / "manifest.json").exists():
        return "cleaning up"
    if (work / "plan.json").exists():
        return "writing shards"
    return "preparing" if any((work / "parts").glob("*")) else "starting"


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


if __name__ == "__main__":
    main()
