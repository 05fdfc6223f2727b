"""What diffusers' switches for speed gain on two cores, and what they do to the images.

    OMP_NUM_THREADS=2 python benchmarks/speed.py --output outputs/speed.json

The bundled pipeline (phantom radiographs, 128 px) makes variations of bundled images. Each way is timed in turn with
the plain pipeline (DDIM, guidance, float32); two neighbours in time give a ratio, and the median of these is reported.
Beside it, how far its images are from those of the plain pipeline from the same noise, and the Fréchet distance of
16 x 16 pixels to the sources. `benchmarks/gpu.py` has the ways that need a GPU. About 20 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.metrics.distances import frechet_of_samples
from diffusers_dino.metrics.extractors.thumbnails import pixel_features
from diffusers_dino.pipelines import deep_cache

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

Pipe = DinoDiffusionPipeline


@dataclass
class Arguments:
    model: str = flag(str(EXAMPLES / "data/tiny-diffusion"), "Folder of a pipeline.")
    data_dir: str = flag(str(EXAMPLES / "data/phantom-cxr"), "Source images.")
    ways: list[str] | None = flag(None, "What to measure; by default all.")
    num_images: int = flag(32, "Images to compare.")
    batch_size: int = flag(8, "Images sampled together, and in each timing.")
    num_inference_steps: int = flag(50, "Steps of the plain pipeline.")
    guidance_scale: float = flag(2.0, "Of all ways but one.")
    repeats: int = flag(3, "Timings of each way.")
    output: str | None = flag(None, "JSON file of the figures.")


@dataclass(frozen=True)
class Way:
    """A way to sample: what is done to a fresh pipeline, and the arguments of the call that differ."""

    prepare: Callable[[Pipe], Any] = lambda pipe: None
    steps: int | None = None
    guidance_scale: float | None = None
    guided: tuple[float, float] = (0.0, 1.0)  # shares of the steps (Kynkäänniemi et al., NeurIPS 2024)
    dtype: torch.dtype = torch.float32


def scheduler(name: str, steps: int, **options: Any) -> Way:
    """Another solver of the same noise schedule."""

    def prepare(pipe: Pipe) -> None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)

    return Way(prepare, steps)


PYRAMID = diffusers.PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4
)
WAYS = {
    "plain": Way(),
    "DDIM, 20 steps": Way(steps=20),
    "DDIM, 10 steps": Way(steps=10),
    "DPM-Solver++, 20 steps": scheduler("DPMSolverMultistepScheduler", 20),
    "DPM-Solver++, 10 steps": scheduler("DPMSolverMultistepScheduler", 10),
    "UniPC, 10 steps": scheduler("UniPCMultistepScheduler", 10),
    "DEIS, 10 steps": scheduler("DEISMultistepScheduler", 10),
    "Euler, 10 steps": scheduler("EulerDiscreteScheduler", 10, timestep_spacing="trailing"),
    "no guidance": Way(guidance_scale=1.0),
    "guidance on the middle steps": Way(guided=(0.2, 0.8)),
    "deep_cache, every 2": Way(lambda pipe: pipe.enable_cache(deep_cache(pipe.unet, every=2))),
    "deep_cache, every 3": Way(lambda pipe: pipe.enable_cache(deep_cache(pipe.unet, every=3))),
    "deep_cache, every 3, order 1": Way(lambda pipe: pipe.enable_cache(deep_cache(pipe.unet, every=3, order=1))),
    "pyramid attention broadcast": Way(lambda pipe: pipe.enable_cache(PYRAMID)),
    "FasterCache": Way(lambda pipe: pipe.enable_cache(diffusers.FasterCacheConfig())),
    "channels last": Way(lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
    "fused projections": Way(lambda pipe: pipe.fuse_qkv_projections()),
    "AttnProcessor (no SDPA)": Way(lambda pipe: pipe.unet.set_attn_processor(AttnProcessor())),
    "SlicedAttnProcessor(1)": Way(lambda pipe: pipe.unet.set_attn_processor(SlicedAttnProcessor(1))),
    "bfloat16": Way(dtype=torch.bfloat16),
    "blocks compiled": Way(lambda pipe: pipe.unet.compile_repeated_blocks(fullgraph=True)),
    "UNet compiled": Way(lambda pipe: pipe.unet.compile(fullgraph=True)),
}


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    names = args.ways or list(WAYS)
    if unknown := set(names) - set(WAYS):
        sys.exit(f"--ways are among {', '.join(WAYS)}, got {', '.join(sorted(unknown))}.")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    plain = load(args.model)
    side = plain.unet.config["sample_size"] * plain.vae_scale_factor
    images = open_images(args.data_dir, Preprocessing(side))
    sources = torch.stack([images[i]["image"] for i in range(args.num_images)])  # (N, C, H, W)
    with torch.no_grad():
        embeds = plain.encode_image(sources)
    expected = generate(plain, Way(), embeds, args)
    rows = {}
    for name in names:
        rows[name] = measure(WAYS[name], plain, load(args.model, WAYS[name].dtype), embeds, expected, sources, args)
        print(line(name, rows[name]), flush=True)
    figures = {
        "arguments": asdict(args),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ways": rows,
    }
    print("\n".join(["", *table(rows)]))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")


def load(model: str, dtype: torch.dtype = torch.float32) -> Pipe:
    pipe = DinoDiffusionPipeline.from_pretrained(model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(
    way: Way,
    plain: Pipe,
    pipe: Pipe,
    embeds: torch.Tensor,
    expected: torch.Tensor,
    sources: torch.Tensor,
    args: Arguments,
) -> dict[str, Any]:
    """Time a way beside the plain one, and compare what it makes."""
    embeds = embeds.to(pipe.dtype)
    batch = embeds[: args.batch_size]
    way.prepare(pipe)
    first = seconds_of(pipe, way, batch, args)  # compiles, where that is asked for
    seconds: dict[str, list[float]] = {"plain": [], "way": []}
    for _ in range(args.repeats):
        seconds["plain"].append(seconds_of(plain, Way(), batch.to(plain.dtype), args))
        seconds["way"].append(seconds_of(pipe, way, batch, args))
    made = generate(pipe, way, embeds, args)
    torch.compiler.reset()
    return {
        "speed": statistics.median(p / w for p, w in zip(seconds["plain"], seconds["way"], strict=True)),
        "images_per_s": len(batch) / statistics.median(seconds["way"]),
        "first_call_s": first,
        "mean_difference": 255 * (made - expected).abs().mean().item(),
        "frechet_pixels": frechet_of_samples(pixel_features(made).double(), pixel_features(sources).double()),
        "num_images": len(made),
        "seconds": seconds,
    }


def seconds_of(pipe: Pipe, way: Way, embeds: torch.Tensor, args: Arguments) -> float:
    start = time.perf_counter()
    generate(pipe, way, embeds, args)
    return time.perf_counter() - start


def generate(pipe: Pipe, way: Way, embeds: torch.Tensor, args: Arguments) -> torch.Tensor:
    """`(N, C, H, W)` in [0, 1], in batches; image i has the noise of seed i, whatever the way."""
    parts = []
    for start in range(0, len(embeds), args.batch_size):
        chunk = embeds[start : start + args.batch_size]
        parts.append(
            pipe(
                image_embeds=chunk,
                num_inference_steps=way.steps or args.num_inference_steps,
                guidance_scale=way.guidance_scale or args.guidance_scale,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
                guidance_start=way.guided[0],
                guidance_end=way.guided[1],
                output_type="pt",
            ).images
        )
    return torch.cat(parts)


def line(name: str, row: dict[str, Any]) -> str:
    return (
        f"| {name} | {row['speed']:.2f} | {row['images_per_s']:.2f} | {row['mean_difference']:.2f} | "
        f"{row['frechet_pixels']:.2f} |"
    )


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    head = "| | times as fast | images/s | mean difference, of 255 | Fréchet distance of pixels to the sources |"
    return [head, "| --- | --- | --- | --- | --- |", *(line(name, row) for name, row in rows.items())]


if __name__ == "__main__":
    main()
