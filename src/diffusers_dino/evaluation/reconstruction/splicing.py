"""Patches of one image in the condition of another, and where they come out (DiNO-Diffusion, appendix A.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from ...embeddings import splice_patch_tokens
from ...seeds import generator_for
from ...sheets import contact_sheet

if TYPE_CHECKING:
    from ...conditioner import DinoImageConditioner
    from ...pipelines import DinoDiffusionPipeline

__all__ = [
    "Splices",
    "draw_splices",
    "generate_from_noises",
    "patch_grid",
    "splice_images",
    "splice_masks",
    "travelled",
]


class Splices(NamedTuple):
    """What spliced conditions give.

    Attributes:
        images: `(K, noises, C, H, W)` in [0, 1], from each of K masks.
        regions: `(K, H, W)` bool, the masks at the size of the images.
        shares: For each mask how far its inside and its outside went to the other image: see `travelled`.
    """

    images: Tensor
    regions: Tensor
    shares: dict[str, dict[str, float]]


def patch_grid(conditioner: DinoImageConditioner) -> int:
    """Patches along a side of the image; ValueError unless the condition holds patch tokens of one encoder."""
    patches, tokens = [head.num_patches for head in conditioner.heads], conditioner.config["tokens"]
    if len(patches) != 1 or not patches[0]:
        raise ValueError(
            f"Splicing needs a model on the patch tokens of one encoder, but this one is on tokens={tokens!r} of "
            f'{len(patches)}. Train it with tokens="all".'
        )
    return math.isqrt(patches[0])


def splice_masks(side: int, lungs: Tensor) -> dict[str, Tensor]:
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


def generate_from_noises(
    pipe: DinoDiffusionPipeline, tokens: Tensor, num_noises: int = 4, seed: int = 0, **call: Any
) -> Tensor:
    """Images `(B, num_noises, C, H, W)` in [0, 1] from tokens `(B, S, D)`; the noises are the same for every row.

    `call` are further arguments of the pipeline.
    """
    noises = [generator_for(seed, "patches", n) for _ in tokens for n in range(num_noises)]
    options = {"num_images_per_prompt": num_noises, "generator": noises, "output_type": "pt", **call}
    return pipe(image_embeds=tokens, **options).images.unflatten(0, (len(tokens), -1))


def splice_images(
    pipe: DinoDiffusionPipeline,
    source: Tensor,
    other: Tensor,
    masks: Mapping[str, Tensor],
    num_noises: int = 4,
    seed: int = 0,
    **call: Any,
) -> Splices:
    """Put patches of another image into the condition of a source, and measure how much of it came along.

    Args:
        pipe: A pipeline on all tokens, or on patches.
        source, other: `(C, H, W)` in [0, 1].
        masks: Where the other's patches go: `(side, side)` bool by name, see `splice_masks`.
        num_noises, seed, call: As of `generate_from_noises`.
    """
    source_tokens, other_tokens = pipe.encode_image(torch.stack([source, other]))[:, None]  # (1, S, D) each
    spliced = [splice_patch_tokens(source_tokens, other_tokens, mask) for mask in masks.values()]
    tokens = torch.cat([source_tokens, other_tokens, *spliced])
    from_source, from_other, *images = generate_from_noises(pipe, tokens, num_noises, seed, **call)
    regions = [F.interpolate(mask[None, None].float(), size=source.shape[-2:])[0, 0] > 0 for mask in masks.values()]
    shares = {
        name: {
            place: travelled(result, from_source, from_other, part)
            for place, part in {"inside": region, "outside": ~region}.items()
            if part.any()
        }
        for name, region, result in zip(masks, regions, images, strict=True)
    }
    return Splices(torch.stack(images), torch.stack(regions), shares)


def travelled(result: Tensor, source: Tensor, other: Tensor, region: Tensor) -> float:
    """How far a region went from the source's reconstruction (0) to the other's (1) from the same noises.

    Images are `(N, C, H, W)`, the region is `(H, W)` bool and not empty. NaN where both reconstructions are the same.
    """
    way, gone = (other - source)[..., region], (result - source)[..., region]
    length = way.square().sum().item()
    return (way * gone).sum().item() / length if length else math.nan


def draw_splices(splices: Splices, source: Tensor, other: Tensor) -> Image:
    """Rows of source | other | mask | result from each noise."""
    rows = len(splices.images)
    return contact_sheet([source] * rows, [other] * rows, splices.regions[:, None], splices.images.flatten(0, 1))
