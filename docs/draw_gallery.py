"""Draw the gallery: what the bundled model makes of radiographs that it has not seen, one WebP file for each picture.

python docs/draw_gallery.py --output_dir docs/images/gallery
python docs/draw_gallery.py --output_dir docs/images/gallery --names paths guidance
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline, DinoPriorPipeline
from diffusers_dino.data import Preprocessing, collate, open_images
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.demo.segments import overlay
from diffusers_dino.pixels import unit_to_uint8
from diffusers_dino.sheets import contact_sheet

DATA = Path(__file__).parents[1] / "examples/data"
TEST = DATA / "phantom-cxr/phantom-cxr-test-*.tar"
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the pictures.")
    parser.add_argument("--model", default=DATA / "showcase", help="A pipeline for radiographs.")
    parser.add_argument("--prior", default=DATA / "showcase-prior", help="Its prior, with labels.")
    parser.add_argument("--names", nargs="+", choices=PICTURES, default=list(PICTURES), help="Pictures to draw.")
    args = parser.parse_args()
    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.prior = DinoPriorPipeline.from_pretrained(args.prior)
    pipe.prior.set_progress_bar_config(disable=True)
    images = open_radiographs(pipe)[:3]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        PICTURES[name](pipe, images).save(args.output_dir / f"{name}.webp", quality=80, method=6)


def open_radiographs(pipe: DinoDiffusionPipeline) -> Tensor:
    """The bundled ones, which no part of the model has seen: `(N, 1, S, S)` in [0, 1]."""
    images = open_images(DATA / "kermany", Preprocessing(pipe.vae.config.sample_size, remove_borders=False))
    return collate([images[number] for number in range(len(images))])["image"]


def seeded(count: int) -> list[torch.Generator]:
    """One generator for each image, so that each column of a picture has one noise."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def draw_variations(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image (left) and seven variations."""
    return contact_sheet(images, pipe(images, num_images_per_prompt=7, generator=seeded(7) * 3, **SAMPLING).images)


def draw_paths(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Pairs of images (left and right) and six images between them, each row from one noise."""
    between = DinoInterpolationPipeline.from_pipe(pipe)
    between.set_progress_bar_config(disable=True)
    targets = images.roll(-1, dims=0)
    path = between(images, targets, torch.linspace(0, 1, 6), generator=seeded(3), **SAMPLING).images
    return contact_sheet(images, path, targets)


def draw_mixtures(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Three images (left), and what mixtures of their tokens become: the weight of the first grows to the right."""
    between = DinoInterpolationPipeline.from_pipe(pipe)
    embeds = pipe.encode_image(images)
    weights = [[first, (1 - first) / 2, (1 - first) / 2] for first in torch.linspace(0, 1, 5).tolist()]
    mixed = pipe(image_embeds=between.mix(embeds, weights), generator=seeded(1) * 5, **SAMPLING).images
    return contact_sheet(images[:1], images[1:], mixed)


def draw_guidance(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """The image (left), and rows of guidance 1, 2, 4 and 8; a column has one noise."""
    tokens = pipe.encode_image(images[:1])
    rows = [
        pipe(
            image_embeds=tokens, num_images_per_prompt=6, generator=seeded(6), **{**SAMPLING, "guidance_scale": scale}
        )
        for scale in (1.0, 2.0, 4.0, 8.0)
    ]
    return contact_sheet(images[:1].expand(4, -1, -1, -1), [image for row in rows for image in row.images])


def draw_steps(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """The image (left), then 2, 4, 8, 16 and 32 DDIM steps from one noise; three images."""
    columns = [
        pipe(images, generator=seeded(3), **{**SAMPLING, "num_inference_steps": steps}).images
        for steps in (2, 4, 8, 16, 32)
    ]
    return contact_sheet(images, *columns)


def draw_spread(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image, the mean of eight variations, and their standard deviation times four: bright is left to chance."""
    drawn = pipe(images, num_images_per_prompt=8, generator=seeded(8) * 3, output_type="pt", **SAMPLING).images
    drawn = drawn.unflatten(0, (3, 8))
    spread = (4 * drawn.std(1)).clamp(0, 1)
    cells = torch.stack([images.expand_as(spread), drawn.mean(1), spread], dim=1).flatten(0, 1)  # 9 cells in one row
    return contact_sheet(cells[:1], cells[1:])


def draw_segments(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image, and its segments at thresholds of 0.2, 0.3, 0.4 and 0.5 of the mean divergence."""
    diffseg = DiffSegPipeline.from_pipe(pipe)
    maps = diffseg.attention_maps(images)
    columns = [
        diffseg.segment(maps, threshold, relative_threshold=True, output_size=images.shape[-1]).masks
        for threshold in (0.2, 0.3, 0.4, 0.5)
    ]
    return _rows(images, columns)


def draw_timesteps(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image, and its segments at timesteps 1, 100, 300 and 700."""
    diffseg = DiffSegPipeline.from_pipe(pipe)
    return _rows(images, [diffseg(images, timestep=timestep).masks for timestep in (1, 100, 300, 700)])


def draw_attention(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Each image, and where six positions attend: a lung, the spine, the heart, the other lung, shoulder, air."""
    maps = DiffSegPipeline.from_pipe(pipe).attention_maps(images)  # (B, s * s, s, s)
    side = maps.shape[-1]
    points = [(0.4, 0.3), (0.5, 0.5), (0.65, 0.6), (0.4, 0.7), (0.15, 0.2), (0.05, 0.05)]
    rows = []
    for image, own in zip(images, maps, strict=True):
        cells = [image]
        for row, column in points:
            seen = own[int(row * side) * side + int(column * side)]
            seen = torch.nn.functional.interpolate((seen / seen.max())[None, None], image.shape[-2:], mode="bilinear")[
                0
            ]
            cells.append(0.4 * image + 0.6 * seen)
        rows.append(torch.stack(cells))
    return contact_sheet(torch.stack([row[0] for row in rows]), torch.cat([row[1:] for row in rows]))


def draw_labels(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Images of no image: rows of No Finding, Bacterial Pneumonia, Viral Pneumonia; a column has one noise."""
    labels = [["No Finding"], ["Bacterial Pneumonia"], ["Viral Pneumonia"]]
    tokens = pipe.prior(
        labels=labels, num_images_per_prompt=8, guidance_scale=2.0, generator=seeded(8) * 3
    ).image_embeds
    drawn = pipe(image_embeds=tokens, generator=seeded(8) * 3, **SAMPLING).images
    return contact_sheet(drawn[::8], [drawn[8 * row + column] for row in range(3) for column in range(1, 8)])


def draw_strength(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Images (left), and their tokens taken 0, 0.2, 0.4, 0.6, 0.8 and 1 of the way to an unrelated image."""
    given = pipe.encode_image(images)
    columns = []
    for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        tokens = pipe.prior.renoise(given, strength=strength, generator=seeded(3))
        columns.append(pipe(image_embeds=tokens, generator=seeded(3), **SAMPLING).images)
    return contact_sheet(images, *columns)


def draw_masks(pipe: DinoDiffusionPipeline, images: Tensor) -> Image.Image:
    """Phantoms (top) and their exact lung masks."""
    phantoms = open_masked_images(TEST, 128, 128, max_samples=8)
    samples = [phantoms[number] for number in range(8)]
    pictures = torch.stack([sample.image for sample in samples])
    cells = painted_rows(pictures, [torch.stack([sample.mask for sample in samples])])
    return contact_sheet([cells[0], cells[1]], [*cells[2::2], *cells[3::2]])


def painted_rows(images: Tensor, columns: list[Tensor]) -> list[Image.Image]:
    """Each image, and the image under its masks `(B, H, W)` of each column, row by row."""
    cells = []
    for number, pixels in enumerate(unit_to_uint8(images)[:, 0].numpy()):
        picture = Image.fromarray(pixels).convert("RGB")
        cells += [picture, *(overlay(picture, masks[number].to(torch.uint8).numpy(), 0.4) for masks in columns)]
    return cells


def _rows(images: Tensor, columns: list[Tensor]) -> Image.Image:
    cells, width = painted_rows(images, columns), len(columns) + 1
    return contact_sheet(cells[::width], [cell for place, cell in enumerate(cells) if place % width])


PICTURES = {name.removeprefix("draw_"): draw for name, draw in list(globals().items()) if name.startswith("draw_")}

if __name__ == "__main__":
    main()
