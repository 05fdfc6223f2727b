"""Draw the picture of the README: variations, paths and segments of radiographs that the bundled model has not seen.

python docs/draw_overview.py --output docs/images/overview.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from draw_gallery import DATA, SAMPLING, open_radiographs, painted_rows
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.sheets import contact_sheet

COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="The picture, a PNG.")
    parser.add_argument("--model", default=DATA / "showcase", help="A pipeline for radiographs.")
    args = parser.parse_args()
    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    images = open_radiographs(pipe)
    panels = {
        "Variations: an unseen image (left), and what its tokens become": draw_variations(pipe, images),
        "Paths: two unseen images (left and right), and images between them": draw_paths(pipe, images),
        "Segments from self-attention, without labels": draw_segments(pipe, images),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    stack(panels).savefig(args.output, dpi=100, pil_kwargs={"optimize": True})


def draw_variations(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image and its variations in a row."""
    generator = torch.Generator().manual_seed(0)
    return contact_sheet(
        images, pipe(images, num_images_per_prompt=COLUMNS - 1, generator=generator, **SAMPLING).images
    )


def draw_paths(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """The first image and each other one in a row, with images between them."""
    between = DinoInterpolationPipeline.from_pipe(pipe)
    between.set_progress_bar_config(disable=True)
    targets, fractions = images[1:], torch.linspace(0, 1, COLUMNS - 2)
    sources = images[:1].expand_as(targets)
    path = between(sources, targets, fractions, generator=torch.Generator().manual_seed(0), **SAMPLING).images
    return contact_sheet(sources, path, targets)


def draw_segments(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image beside its segments, in one row."""
    cells = painted_rows(images, [DiffSegPipeline.from_pipe(pipe)(images).masks])
    return contact_sheet(cells[:1], cells[1:])


def stack(panels: dict[str, Image.Image]) -> Figure:
    """Pictures under each other in one width, each with its heading."""
    width = max(picture.width for picture in panels.values())
    heights = [picture.height * width / picture.width for picture in panels.values()]
    figure = Figure(figsize=(width / 100, (sum(heights) + 40 * len(panels)) / 100), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (heading, picture) in zip(rows, panels.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(heading, loc="left", fontsize=11)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
