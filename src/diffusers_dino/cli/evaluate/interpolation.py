"""Measure how a model's images change on the way from one image to another.

    diffusers-dino evaluate interpolation --model my-model --data_dir /data/cxr --training_keys training_keys.txt

Paths go between images that the model has not seen: those of `--data_dir` that `--training_keys` does not list, or
`--held_out_keys`. Writes `interpolation.json`, a figure of it, and the first paths as a picture.
Needs the extra `eval`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import DinoInterpolationPipeline
from ...data.keys import read_keys
from ...evaluation import evaluate_interpolation
from ...evaluation.generation import stack_images
from ...evaluation.interpolation.plot import draw_paths, plot_path
from ...evaluation.interpolation.table import format_interpolation_table
from ...pipelines.checks import image_size
from ...pipelines.preparation import open_images_for
from ..arguments import flag
from ..console import hold_output
from ..image_flags import BORDERS


@dataclass
class Arguments:
    model: str = flag("outputs/quickstart/model", "Pipeline: a folder or a repository of the Hub.")
    data_dir: str = flag("examples/data/phantom-cxr", "Images: a folder, or webdataset tars.")
    training_keys: str | None = flag(None, "Text file of the keys that the model was trained on, one a line.")
    held_out_keys: str | None = flag(None, "Text file of the keys to draw paths between; by default all others.")
    num_images: int = flag(64, "Take the first held-out images; each begins one path and ends another.")
    num_points: int = flag(7, "Images along a path, both ends included.")
    method: str = flag("lerp", "lerp or slerp.")
    seeds: list[int] = flag([0], "Seeds of the noise.")
    num_inference_steps: int = flag(20, "Sampling steps.")
    guidance_scale: float = flag(2.0, "Guidance.")
    num_drawn: int = flag(6, "Paths in the picture.")
    remove_borders: bool | None = flag(None, BORDERS)
    device: str = flag("cpu", "Where to compute, such as cuda.")
    output_dir: str = flag("outputs/interpolation", "Where figures and pictures go.")


def main(args: Arguments) -> None:
    if not args.training_keys:
        raise ValueError("Give --training_keys: what is not listed there counts as unseen.")
    if args.num_points < 2 or args.num_images < 2 or args.num_drawn < 1:
        raise ValueError("A path needs --num_points 2 or more, --num_images 2 or more, and --num_drawn 1 or more.")
    with hold_output(args.output_dir) as output_dir:
        pipe = DinoInterpolationPipeline.from_pretrained(args.model).to(args.device)
        images = open_images_for(pipe, args.data_dir, image_size(pipe), args.remove_borders)
        training = images.select(read_keys(args.training_keys))
        others = sorted(set(images.keys) - set(training.keys))
        held_out_keys = images.select(read_keys(args.held_out_keys)).keys if args.held_out_keys else others
        if both := sorted(set(held_out_keys) & set(training.keys)):
            raise ValueError(
                f"{len(both)} keys of --held_out_keys are also in --training_keys, such as {both[0]}: they "
                "are not unseen."
            )
        held_out = stack_images(images.select(held_out_keys[: args.num_images]))
        path = {
            "fractions": [i / (args.num_points - 1) for i in range(args.num_points)],
            "method": args.method,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
        }
        result = evaluate_interpolation(pipe, held_out, training, seeds=args.seeds, **path)
        result.save(output_dir / "interpolation.json")
        plot_path(result).savefig(output_dir / "interpolation.png", dpi=150, bbox_inches="tight")
        generator = torch.Generator().manual_seed(args.seeds[0])
        draw_paths(pipe, held_out, args.num_drawn, generator=generator, **path).save(output_dir / "paths.png")
        print(format_interpolation_table(result))
