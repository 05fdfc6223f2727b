"""Draw the picture of the README: variations, paths and segments of phantoms that the bundled model has not seen.

python examples/draw_overview.py --output docs/images/overview.png
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL.Image import Image, fromarray
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline
from diffusers_dino.cli.console import run
from diffusers_dino.demo.tasks import overlay
from diffusers_dino.pixels import unit_to_uint8
from diffusers_dino.sheets import contact_sheet
from quickstart import EXAMPLES, draw_paths, draw_variations, load_phantoms

ROWS, COLUMNS = 2, 8
SEGMENTATION = {"timestep": 50, "merge_threshold": 0.3, "relative_threshold": True}
LAYERS = ("up_blocks.1.attentions.1",)  # the last of the decoder


@dataclass
class Arguments:
    output: Path = field(metadata={"help": "The picture, a PNG."})
    model: str = field(
        default=str(EXAMPLES / "data/tiny-diffusion"), metadata={"help": "A pipeline for the phantoms."}
    )


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    images = load_phantoms(EXAMPLES / "data/phantom-cxr", "test", pipe.vae.config.sample_size).images
    panels = {
        "Variations: an unseen image (left), and what its tokens become": draw_variations(
            pipe, images[:ROWS], COLUMNS - 1
        ),
        "Paths: two unseen images (left and right), and images between them": draw_paths(
            pipe, images, ROWS, COLUMNS - 2
        ),
        "Segments from self-attention, without labels": draw_segments(pipe, images[: ROWS * COLUMNS // 2]),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    stack(panels).savefig(args.output, dpi=100, pil_kwargs={"optimize": True})


def draw_segments(pipe: DinoDiffusionPipeline, images: Tensor) -> Image:
    """Each image beside its segments."""
    segments = DiffSegPipeline.from_pipe(pipe)(images, layers=LAYERS, **SEGMENTATION).masks
    cells = []
    for pixels, labels in zip(unit_to_uint8(images)[:, 0].numpy(), segments, strict=True):
        picture = fromarray(pixels)
        cells += [picture.convert("RGB"), overlay(picture, labels.to(torch.uint8).numpy(), 0.4)]
    others = [cell for i, cell in enumerate(cells) if i % COLUMNS]
    return contact_sheet(cells[::COLUMNS], others)


def stack(panels: dict[str, Image]) -> Figure:
    """Pictures of equal width under each other, each with its heading."""
    height = sum(picture.height for picture in panels.values())
    width = max(picture.width for picture in panels.values())
    figure = Figure(figsize=(width / 100, (height + 40 * len(panels)) / 100), layout="constrained")
    for axes, (heading, picture) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        axes.imshow(picture)
        axes.set_title(heading, loc="left", fontsize=11)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    run(main)
