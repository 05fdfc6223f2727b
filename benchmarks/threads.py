"""What waiting threads cost: images a second of one process under several policies, on idle and on busy cores.

    python benchmarks/threads.py --output outputs/threads.json

OpenMP's threads wait for each other many times in every pass of a network. GNU's OpenMP, which PyTorch brings along,
lets them spin; where another process has the core, the one that is waited for gets no turn, and all stand still.
`OMP_WAIT_POLICY=PASSIVE` lets them sleep. PyTorch reads it when it is loaded, so each way is a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from diffusers_dino.cli.arguments import flag, parse_arguments

MODEL = Path(__file__).resolve().parents[1] / "examples/data/tiny-diffusion"


@dataclass
class Arguments:
    model: str = flag(str(MODEL), "Pipeline that generates.")
    num_images: int = flag(8, "Images in a batch.")
    num_inference_steps: int = flag(10, "Steps of each.")
    repeats: int = flag(3, "Processes of each way, in turn.")
    output: str | None = flag(None, "JSON file of the figures.")
    measure: bool = flag(False, "Measure in this process, and print images a second.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.measure:
        print(images_per_second(args))
        return
    cores = os.cpu_count() or 1
    ways = {"1 thread": {"OMP_NUM_THREADS": "1"}, f"{cores} threads": {"OMP_NUM_THREADS": str(cores)}}
    ways[f"{cores} threads, passive"] = ways[f"{cores} threads"] | {"OMP_WAIT_POLICY": "PASSIVE"}
    figures = {}
    for load in (0, cores):
        busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(load)]
        for process in busy:
            process.start()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, settings in ways.items():
                rates[name].append(run(args, settings))
        for process in busy:
            process.kill()
        for name, values in rates.items():
            figures[f"{name}, {load} busy processes"] = statistics.median(values)
            print(f"{load} busy processes, {name:24} {statistics.median(values):8.2f} images/s", flush=True)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(figures, indent=1))


def run(args: Arguments, settings: dict[str, str]) -> float:
    """Images a second of a fresh process under these settings of OpenMP."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    flags = [f"--{name}={getattr(args, name)}" for name in ("model", "num_images", "num_inference_steps")]
    command = [sys.executable, __file__, "--measure", *flags]
    done = subprocess.run(command, env=kept | settings, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def images_per_second(args: Arguments) -> float:
    import torch

    from diffusers_dino import DinoDiffusionPipeline

    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(args.num_images, pipe.conditioner.num_tokens, pipe.conditioner.token_dim)
    pipe(image_embeds=embeds, num_inference_steps=1, output_type="latent")
    start = time.perf_counter()
    pipe(image_embeds=embeds, num_inference_steps=args.num_inference_steps, output_type="latent")
    return args.num_images / (time.perf_counter() - start)


def spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    main()
