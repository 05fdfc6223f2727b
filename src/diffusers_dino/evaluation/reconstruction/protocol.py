"""Does the model follow its condition? Retrieval of the source from its generated variation, with controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data import ImageDataset
from ...metrics import pixel_features, retrieval_accuracy
from ...metrics.distances import frechet_of_samples  # it does not warn of few samples: the result says how many
from ...metrics.neighbours import nearest_by_cosine
from ..controls import derangement, warn_of_training_images, with_fresh_unet
from ..generation import embed_images, generate_variations, stack_images
from ..results import JsonResult

if TYPE_CHECKING:
    from ...pipelines import DinoDiffusionPipeline

__all__ = ["ReconstructionResult", "RetrievalFigures", "evaluate_reconstruction"]


@dataclass(frozen=True)
class RetrievalFigures:
    """Top-1 retrieval accuracies in [0, 1] within one feature space; chance is 1 / N."""

    generated: float
    shuffled: float
    untrained: float
    nearest_training_image: float


@dataclass(frozen=True)
class ReconstructionResult(JsonResult):
    """Figures of one pipeline on N images that it has not seen, averaged over the seeds.

    `by_encoder` embeds the images with the pipeline's own conditioner, which flatters a lookup in the training set;
    `by_pixels` with 16 x 16 gray pixels. Fréchet distances are of 16 x 16 pixels, without guidance, N against N.
    """

    num_images: int
    num_training_images: int
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    by_encoder: RetrievalFigures
    by_pixels: RetrievalFigures
    frechet_generated: float
    frechet_untrained: float
    frechet_training_images: float
    guidance_rescale: float = 0.0


def evaluate_reconstruction(
    pipe: DinoDiffusionPipeline,
    images: ImageDataset | Tensor,
    training_images: ImageDataset | Tensor,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    guidance_rescale: float = 0.0,
    batch_size: int = 64,
    progress: bool = True,
) -> ReconstructionResult:
    """Generate one variation of each image per seed and ask whether it finds its source among all of them.

    Controls: *shuffled*, each generated image is asked for the source of another one; *untrained*, the same UNet with
    fresh weights; *nearest training image*, what a lookup of the condition in the training set would answer.

    Args:
        pipe: The trained pipeline.
        images: Images kept out of all training, one per patient: a data set, or `(N, C, H, W)` in [0, 1].
        training_images: What the pipeline was trained on: a data set, or `(M, C, H, W)` in [0, 1].
        seeds: Seeds of the initial noise; the figures are means over them.
        num_inference_steps: Steps of the pipeline's scheduler.
        guidance_scale: For retrieval; the Fréchet distances are measured without guidance.
        guidance_rescale: In [0, 1], against over-exposure by guidance.
    """
    if not seeds:
        raise ValueError("Give one seed or more.")
    images, training_images = stack_images(images), stack_images(training_images)
    warn_of_training_images(images, training_images)
    sampling = {"num_inference_steps": num_inference_steps, "batch_size": batch_size, "progress": progress}
    guidance = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
    untrained_pipe = with_fresh_unet(pipe)
    tokens = embed_images(pipe, images, batch_size)  # (N, S, D)
    training_tokens = embed_images(pipe, training_images, batch_size)  # (M, S, D)
    lookup = nearest_by_cosine(tokens.flatten(1), training_tokens.flatten(1))  # (N,)
    thumbnails = pixel_features(images)

    encoder_figures, pixel_figures, frechet = [], [], []
    for seed in seeds:
        guided = generate_variations(pipe, tokens, seed, **guidance, **sampling)
        unguided = generate_variations(pipe, tokens, seed, guidance_scale=1.0, **sampling)
        untrained = generate_variations(untrained_pipe, tokens, seed, guidance_scale=1.0, **sampling)
        shuffle = derangement(len(images), seed)
        queries = {
            "generated": guided,
            "shuffled": guided[shuffle],
            "untrained": untrained,
            "nearest_training_image": training_images[lookup],
        }
        for figures, embed, gallery in (
            (encoder_figures, lambda x: embed_images(pipe, x, batch_size).flatten(1), tokens.flatten(1)),
            (pixel_figures, pixel_features, thumbnails),
        ):
            figures.append({name: retrieval_accuracy(embed(query), gallery) for name, query in queries.items()})
        subset = torch.randperm(len(training_images), generator=torch.Generator().manual_seed(seed))[: len(images)]
        compared = {"generated": unguided, "untrained": untrained, "training_images": training_images[subset]}
        frechet.append(
            {f"frechet_{name}": frechet_of_samples(pixel_features(x), thumbnails) for name, x in compared.items()}
        )
    return ReconstructionResult(
        num_images=len(images),
        num_training_images=len(training_images),
        seeds=tuple(seeds),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        by_encoder=RetrievalFigures(**_mean(encoder_figures)),
        by_pixels=RetrievalFigures(**_mean(pixel_figures)),
        **_mean(frechet),
        guidance_rescale=guidance_rescale,
    )


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
