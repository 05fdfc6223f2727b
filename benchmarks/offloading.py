"""What offloading costs and saves where there is no GPU: seconds an image and memory, at Stable Diffusion 1.5's size.

    OMP_NUM_THREADS=2 python benchmarks/offloading.py --output outputs/offloading.json

On a CPU, `enable_model_cpu_offload` has nowhere to move a model to: its line is the price of its hooks. Groups of
layers that wait on a disk, however, run a model in less memory than its weights take. Each way runs in a process of
its own, all of them in turn, with random weights (`gpu_models.py`); ratios are medians of neighbours in time, peaks
are resident memory, mapped files included, above that of the process before it built anything. Linux only. `gpu.py`
measures offloading from a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from gpu_models import SIZES, make_pipeline, random_images
from resident import peak, start_peak

CPU = torch.device("cpu")


@dataclass
class Arguments:
    size: Literal["sd15", "tiny"] = flag("sd15", "Of the models.")
    num_inference_steps: int = flag(4, "Denoising steps of the image.")
    repeats: int = flag(3, "Processes of each way.")
    folder: str | None = flag(None, "Where layers wait on a disk; a temporary folder if none is named.")
    output: str | None = flag(None, "JSON file of the figures.")


def on_disk(pipe: DinoDiffusionPipeline, folder: str, **options: Any) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_to_disk_path=folder, **options)


WAYS: dict[str, Callable[[DinoDiffusionPipeline, str], None]] = {
    "in memory": lambda pipe, folder: None,
    "enable_model_cpu_offload": lambda pipe, folder: pipe.enable_model_cpu_offload(device=CPU),
    "enable_group_offload, blocks on disk": lambda pipe, folder: on_disk(
        pipe, folder, offload_type="block_level", num_blocks_per_group=1
    ),
    "enable_group_offload, layers on disk": lambda pipe, folder: on_disk(pipe, folder, offload_type="leaf_level"),
}


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    fresh = multiprocessing.get_context("spawn")
    for _ in range(args.repeats):
        for name in WAYS:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder, ProcessPoolExecutor(1, fresh) as process:
                runs[name].append(process.submit(measure, name, args, folder).result())
            print(name, json.dumps(runs[name][-1]), flush=True)
    rows = {name: summary(found, runs["in memory"]) for name, found in runs.items()}
    print("\n".join(table(rows)))
    if args.output:
        figures = {"arguments": asdict(args), "threads": torch.get_num_threads(), "ways": rows, "runs": runs}
        figures |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")


def measure(name: str, args: Arguments, folder: str) -> dict[str, float]:
    """Seconds of one image after another that warmed up, and the peak of memory of both."""
    diffusers.utils.logging.set_verbosity_error()
    before = start_peak()
    size = SIZES[args.size]
    pipe = make_pipeline(size)
    WAYS[name](pipe, folder)
    start_peak()  # not of building
    image = random_images(1, size.resolutions[0])
    for _ in range(2):
        start = time.perf_counter()
        pipe(image, num_inference_steps=args.num_inference_steps, guidance_scale=1.0, output_type="pt")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gb": (peak() - before) / 1000}


def summary(found: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    ratios = [run["seconds"] / base["seconds"] for run, base in zip(found, plain, strict=True)]
    return {
        "times_the_seconds": round(statistics.median(ratios), 3),
        "seconds": round(statistics.median(run["seconds"] for run in found), 2),
        "peak_gb": round(max(run["peak_gb"] for run in found), 2),
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    head = "| | times the seconds | s an image | peak memory, GB |"
    lines = [f"| {name} | {' | '.join(str(value) for value in row.values())} |" for name, row in rows.items()]
    return ["", head, "| --- | --- | --- | --- |", *lines]


if __name__ == "__main__":
    main()
