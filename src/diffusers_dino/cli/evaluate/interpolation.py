"""Measure how a model's images change on the way from one image to another.

    diffusers-dino evaluate interpolation --model my-model --data_dir /data/cxr --training_keys training_keys.txt

Paths go between images that the model has not seen: those of `--data_dir` that `--training_keys` does not list, or
`--held_out_keys`. Writes `interpolation.json`, a figure of it, and the first paths as a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ... import DinoInterpolationPipeline
from ...data import ImageDataset, Preprocessing, open_images
from ...evaluation import InterpolationResult, evaluate_interpolation
from ...evaluation.curves import plot_path
from ...sheets import contact_sheet
from ..arguments import flag


@dataclass
class Arguments:
    model: str = flag("outputs/quickstart/model", "Pipeline: a folder or a repository of the Hub.")
    data_dir: str = flag("examples/data/phantom-cxr", "Images: a folder, or webdataset tars.")
    training_keys: str | None = flag(None, "Text file of the keys that the model was trained on, one a line.")
    held_out_keys: str | None = flag(None, "Text file of the keys to draw paths between; by default all others.")
    num_images: int = flag(64, "Take the first held-out images; each begins one path and ends another.")
    num_points: int = flag(7, "Images along a path, both ends included.")
    method: str = flag("lerp", "lerp or slerp.")
    seeds: list[int] = flag([0], "Seeds of the noise.")  # noqa: RUF009
    num_inference_steps: int = flag(20, "Sampling steps.")
    guidance_scale: float = flag(2.0, "Guidance.")
    num_drawn: int = flag(6, "Paths in the picture.")
    remove_borders: bool = flag(False, "Cut uniform borders off, if it was done in training.")
    device: str = flag("cpu", "Where to compute, such as cuda.")
    output_dir: str = flag("outputs/interpolation", "Where figures and pictures go.")


def main(args: Arguments) -> None:
    if not args.training_keys:
        raise ValueError("Give --training_keys: what is not listed there counts as unseen.")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pipe = DinoInterpolationPipeline.from_pretrained(args.model).to(args.device)
    size = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    images = open_images(args.data_dir, Preprocessing(size, remove_borders=args.remove_borders))
    training_keys = read_keys(args.training_keys)
    others = sorted(set(images.keys) - set(training_keys))
    held_out = stack(images, (read_keys(args.held_out_keys) if args.held_out_keys else others)[: args.num_images])
    result = evaluate_interpolation(
        pipe,
        held_out,
        stack(images, training_keys),
        fractions=[i / (args.num_points - 1) for i in range(args.num_points)],
        method=args.method,
        seeds=args.seeds,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )
    result.save(output_dir / "interpolation.json")
    plot_path(result).savefig(output_dir / "interpolation.png", dpi=150, bbox_inches="tight")
    draw_paths(args, pipe, held_out).save(output_dir / "paths.png")
    print_result(result)


def read_keys(path: str) -> list[str]:
    return Path(path).read_text().split()


def stack(images: ImageDataset, keys: list[str]) -> Tensor:
    """`(N, C, size, size)` in [0, 1]."""
    chosen = images.select(keys)
    return torch.stack([chosen[i]["image"] for i in range(len(chosen))])


def draw_paths(args: Arguments, pipe: DinoInterpolationPipeline, images: Tensor):
    """Rows of source | path | target, from each image to the next."""
    sources, targets = images[: args.num_drawn], images.roll(-1, 0)[: args.num_drawn]
    paths = pipe(
        sources,
        targets,
        fractions=[i / (args.num_points - 1) for i in range(args.num_points)],
        method=args.method,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seeds[0]),
    ).images
    return contact_sheet(sources, paths, targets)


def print_result(result: InterpolationResult) -> None:
    points = " ".join(f"{fraction:6.2f}" for fraction in result.fractions)
    for space in ("by_encoder", "by_pixels"):
        print(f"\nmean cosine {space.replace('_', ' '):25}{points}   falls and rises, paths, steps the right way")
        for name in ("generated", "untrained", "nearest_training_image", "pixel_blend"):
            figures = getattr(getattr(result, space), name)
            ends = {"source": figures.to_source, "target": figures.to_target}
            for end, values in ends.items():
                cells = " ".join(f"{value:6.2f}" for value in values)
                print(f"{name.replace('_', ' '):28} {end}  {cells}", end="\n" if end == "source" else "")
            print(f"   {figures.falls_and_rises!s:5} {figures.monotone_paths:.2f} {figures.monotone_steps:.2f}")
