r"""Try to tell from a model which images it was trained on, by how well it denoises them.

    diffusers-dino evaluate membership --model my-model --training /data/cxr --training_keys training_keys.txt \
        --held_out /data/cxr --patients /data/cxr.csv --output_dir outputs/membership

Held-out images come from the same source as the training images and are of other patients. Beside the attack stands a
blind guess that never asks the model: where it tells the sets apart, they differ by themselves. Writes
`membership.json` and tables. docs/memorization.md says what the figures mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...data import ImageDataset
from ...devices import device_of
from ...evaluation import evaluate_membership
from ...evaluation.membership.table import format_membership_table
from ...evaluation.table_text import write_tables
from ...metrics.neighbours import evenly_spread
from ...pipelines.checks import image_size
from ...training.models import load_trained_pipeline
from ..arguments import flag
from ..console import hold_output
from ..image_flags import HeldOutArguments, check_arguments, open_training_and_held_out, read_patients


@dataclass
class Arguments(HeldOutArguments):
    model: str | None = flag(None, "The model: a pipeline, or a checkpoint of a training.", group="Attack")
    timesteps: list[int] = flag([50, 100, 200, 400], "Timesteps of the noise, ascending.")
    num_noises: int = flag(4, "Draws of noise at each of them.")
    num_images: int | None = flag(None, "Take only so many images of either set, evenly spread.")
    bootstrap_repeats: int = flag(1000, "Draws of the intervals.")
    batch_size: int = flag(64, "Images at once.")
    seed: int = flag(0, "Of noise and bootstrap.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    output_dir: str = flag("outputs/membership", "Where figures and tables go.", group="Output")


def main(args: Arguments) -> None:
    if not args.model:
        raise ValueError("Give --model: the pipeline that is attacked.")
    if not args.held_out:
        raise ValueError("Give --held_out: images of the same source that the model was not trained on.")
    check_arguments(args)
    with hold_output(args.output_dir) as output_dir:
        dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
        pipe = load_trained_pipeline(args.model, dtype).to(device_of(0, args.device))
        opened = open_training_and_held_out(args, image_size(pipe), pipe)
        sets = [evenly_chosen(images, args.num_images) for images in opened]
        result = evaluate_membership(
            pipe,
            *sets,
            timesteps=args.timesteps,
            num_noises=args.num_noises,
            training_groups=read_patients(args, sets[0]),
            held_out_groups=read_patients(args, sets[1]),
            bootstrap_repeats=args.bootstrap_repeats,
            batch_size=args.batch_size,
            seed=args.seed,
        )
        result.save(output_dir / "membership.json")
        print(write_tables(output_dir, lambda style: format_membership_table(result, style)))


def evenly_chosen(images: ImageDataset, count: int | None) -> ImageDataset:
    """So many images, evenly spread over their order; all of them for None."""
    places = evenly_spread(len(images), len(images) if count is None else count)
    return images.select([images.keys[place] for place in places.tolist()])
