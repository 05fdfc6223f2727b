r"""Put patches of one image into another one's condition, and see where they come out (DiNO-Diffusion, appendix A.1).

    python examples/train_dino.py examples/configs/quickstart.yaml --tokens all --normalize_tokens 512 \
        --train_data_dir "examples/data/phantom-cxr/phantom-cxr-train-*.tar" --output_dir outputs/all-tokens
    diffusers-dino splice --model outputs/all-tokens

The model must have been trained on all tokens, or on patches. Writes two pictures, after the paper's Figs 6 and 7:
`reconstructions.png`, images beside what all of their tokens give from several noises, and `splices.png`, with
`splices.json`, which says how much of the other image came along.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from .. import DinoDiffusionPipeline, DinoImageConditioner
from ..data.sources.masks import MaskedImage, MaskedImages, open_masked_images
from ..embeddings import splice_patch_tokens
from ..metrics.dice import dice
from ..seeds import generator_for
from ..sheets import contact_sheet
from .arguments import flag


@dataclass
class Arguments:
    model: str = flag("outputs/all-tokens", "Pipeline trained with --tokens all.")
    data_dir: str = flag("examples/data/phantom-cxr/phantom-cxr-test-*.tar", "Images with lung masks.")
    source: str | None = flag(None, "Key of the image that is changed; by default the first.")
    other: str | None = flag(
        None, "Key of the image whose patches are taken; by default that whose lungs differ most."
    )
    num_noises: int = flag(4, "Images from each condition.")
    num_reconstructions: int = flag(4, "Images in reconstructions.png.")
    num_inference_steps: int = flag(20, "Sampling steps.")
    guidance_scale: float = flag(2.0, "Guidance.")
    seed: int = flag(0, "Seed of the noise.")
    output_dir: str = flag("outputs/patch-tokens", "Where the pictures go.")


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    side = patch_grid(pipe.conditioner)
    size = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    samples = open_masked_images(args.data_dir, size, mask_size=size)
    first = [samples[i] for i in range(min(args.num_reconstructions, len(samples)))]
    picture = draw_reconstructions(args, pipe, torch.stack([sample.image for sample in first]))
    picture.save(output_dir / "reconstructions.png")
    source = samples[samples.keys.index(args.source) if args.source else 0]
    other = samples[samples.keys.index(args.other)] if args.other else most_different(samples, source)
    masks = make_masks(side, source.mask | other.mask)
    picture, figures = splice(args, pipe, source.image, other.image, masks)
    picture.save(output_dir / "splices.png")
    (output_dir / "splices.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{'went to the other image':24}{'inside the mask':>16}{'outside':>16}")
    for name, values in figures.items():
        print(f"{name:24}" + "".join(f"{value:16.2f}" for value in values.values()))


def patch_grid(conditioner: DinoImageConditioner) -> int:
    """Patches along a side of the image."""
    patches, tokens = [head.num_patches for head in conditioner.heads], conditioner.config["tokens"]
    if len(patches) != 1 or not patches[0]:
        raise ValueError(
            f"Splicing needs a model on the patch tokens of one encoder, but this one is on tokens={tokens!r} of "
            f"{len(patches)}. Train it with --tokens all."
        )
    return math.isqrt(patches[0])


def make_masks(side: int, lungs: Tensor) -> dict[str, Tensor]:
    """Where the other image's patches go: `(side, side)` bool each. `lungs` `(H, W)` bool has the size of an image."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    half = side // 2
    covered = F.adaptive_avg_pool2d(lungs[None].float(), side)[0] > 0.5
    return {
        "left half": columns < half,
        "lower half": rows >= half,
        "quadrant": (columns >= half) & (rows < half),
        "lungs": covered,
        "all but lungs": ~covered,
        "all patches": torch.ones(side, side, dtype=torch.bool),
    }


def most_different(samples: MaskedImages, source: MaskedImage) -> MaskedImage:
    """The sample whose lungs overlap least with the source's."""
    overlaps = [dice(samples.mask(i), source.mask).item() for i in range(len(samples))]
    return samples[overlaps.index(min(overlaps))]


def generate(args: Arguments, pipe: DinoDiffusionPipeline, tokens: Tensor) -> Tensor:
    """Images `(B, num_noises, C, H, W)` in [0, 1] from tokens `(B, S, D)`; the noises are the same for every row."""
    noises = [generator_for(args.seed, "patches", n) for _ in tokens for n in range(args.num_noises)]
    images = pipe(
        image_embeds=tokens,
        num_images_per_prompt=args.num_noises,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=noises,
        output_type="pt",
    ).images
    return images.unflatten(0, (len(tokens), -1))


def draw_reconstructions(args: Arguments, pipe: DinoDiffusionPipeline, images: Tensor) -> Image:
    """Rows of an image | what its tokens give from each noise."""
    return contact_sheet(images, generate(args, pipe, pipe.encode_image(images)).flatten(0, 1))


def splice(
    args: Arguments, pipe: DinoDiffusionPipeline, source: Tensor, other: Tensor, masks: dict[str, Tensor]
) -> tuple[Image, dict[str, dict[str, float]]]:
    """Rows of source | other | mask | results from each noise, and how far the results went, see `travelled`."""
    source_tokens, other_tokens = pipe.encode_image(torch.stack([source, other]))[:, None]  # (1, S, D) each
    spliced = [splice_patch_tokens(source_tokens, other_tokens, mask) for mask in masks.values()]
    from_source, from_other, *results = generate(args, pipe, torch.cat([source_tokens, other_tokens, *spliced]))
    regions = [F.interpolate(mask[None, None].float(), size=source.shape[-2:])[0, 0] > 0 for mask in masks.values()]
    figures = {
        name: {
            place: travelled(result, from_source, from_other, part)
            for place, part in {"inside": region, "outside": ~region}.items()
            if part.any()
        }
        for name, region, result in zip(masks, regions, results, strict=True)
    }
    rows = len(masks)
    picture = contact_sheet([source] * rows, [other] * rows, torch.stack(regions)[:, None], torch.cat(results))
    return picture, figures


def travelled(result: Tensor, source: Tensor, other: Tensor, region: Tensor) -> float:
    """How far a region went from the source's reconstruction (0) to the other's (1) from the same noises.

    Args:
        result: `(N, C, H, W)`.
        source: The same shape.
        other: The same shape.
        region: `(H, W)` bool, not empty.
    """
    way, gone = (other - source)[..., region], (result - source)[..., region]
    return (way * gone).sum().item() / way.square().sum().item()
