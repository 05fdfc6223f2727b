"""The speed of the synthesis engine against a plain loop over `DinoDiffusionPipeline`, same batches and threads.

    python benchmarks/synthesis.py --repeats 5 --output synthesis.json

The loop samples the same images from the same sources and leaves them in memory; the engine also encodes its sources
once, names, compresses, writes and hashes. Both run in turn in one process; the figure is the median of the ratios of
their rates, and must be at least 0.95. The engine's rate is that of a whole call, start and end of a set included.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bundled import untrained_pipeline
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import ImageDataset, Preprocessing, open_images
from diffusers_dino.seeds import generator_for
from diffusers_dino.synthesis import Plan, SynthesisSettings, plan_reconstruction, synthesise

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

UNET = {  # of a size that does some work
    "sample_size": 16,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
BAR = 0.95


@dataclass
class Arguments:
    model: str | None = flag(None, "Folder of a pipeline; by default the bundled encoder and an untrained UNet.")
    data_dir: str = flag(str(EXAMPLES / "data/phantom-cxr"), "Source images.")
    num_images: int = flag(128, "Images of each timing.")
    num_sources: int = flag(64, "Sources that they vary.")
    batch_size: int = flag(16, "Images sampled together.")
    shard_size: int = flag(64, "Images in a shard.")
    num_inference_steps: int = flag(20, "Sampling steps.")
    threads: int = flag(torch.get_num_threads(), "Threads on the CPU.")
    repeats: int = flag(5, "Timings of each.")
    device: str = flag("cpu", "Where to compute.")
    output: str | None = flag(None, "JSON file of the figures.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    torch.set_num_threads(args.threads)
    pipe = (DinoDiffusionPipeline.from_pretrained(args.model) if args.model else untrained_pipeline(**UNET)).to(
        args.device
    )
    pipe.set_progress_bar_config(disable=True)
    images = open_images(args.data_dir, Preprocessing(pipe.unet.config["sample_size"] * pipe.vae_scale_factor))
    images = images.select(images.keys[: args.num_sources])
    settings = SynthesisSettings(
        num_inference_steps=args.num_inference_steps,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        threads=args.threads,
    )
    plan = plan_reconstruction(images.keys, num_images=args.num_images, settings=settings)
    run_loop(plan, pipe, images, args.batch_size)  # some work is slow only the first time
    loops, engines = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            started = time.perf_counter()
            run_loop(plan, pipe, images)
            loops.append(len(plan) / (time.perf_counter() - started))
            started = time.perf_counter()
            made = synthesise(plan, pipe, images, Path(folder) / str(repeat), progress=False)
            engines.append(len(made) / (time.perf_counter() - started))
            print(f"loop {loops[-1]:.2f} images/s, engine {engines[-1]:.2f} images/s", flush=True)
    figures = describe(args, loops, engines)
    print(json.dumps(figures, indent=1))
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")
    if figures["ratio"] < BAR:
        sys.exit(f"the engine reaches {figures['ratio']:.3f} of the loop's rate, which is below {BAR}")


def run_loop(plan: Plan, pipe: DinoDiffusionPipeline, images: ImageDataset, limit: int | None = None) -> int:
    """What one would write without the engine: read a batch of sources, generate a batch, keep it."""
    place = {key: number for number, key in enumerate(images.keys)}
    settings, kept = plan.settings, 0
    numbers = range(len(plan) if limit is None else min(limit, len(plan)))
    for start in range(0, len(numbers), settings.batch_size):
        planned = [plan[number] for number in numbers[start : start + settings.batch_size]]
        batch = pipe(
            torch.stack([images[place[one.sources[0]]]["image"] for one in planned]),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[generator_for(plan.seed, "loop", one.index) for one in planned],
            output_type="pil",
        ).images
        kept += len(batch)
    return kept


def describe(args: Arguments, loops: list[float], engines: list[float]) -> dict[str, Any]:
    ratios = [engine / loop for engine, loop in zip(engines, loops, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "images_per_s": {"loop": [round(r, 2) for r in loops], "engine": [round(r, 2) for r in engines]},
        "images": args.num_images,
        "batch_size": args.batch_size,
        "steps": args.num_inference_steps,
        "threads": args.threads,
        "device": args.device,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
