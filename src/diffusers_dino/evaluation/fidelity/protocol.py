"""How far generated images are from real ones: the paper's Fig. 3, with the controls that give its numbers a scale.

Sources and reference are images of different patients. The rows that stand beside each other have one reference and
one number of images:

- *generated*: an image generated from each source, by a model or by each checkpoint of its training;
- *untrained*: the same by the model's UNet before training;
- *real*: the sources themselves, which is what a perfect model would reach.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ...data import ImageDataset
from ...metrics import FeatureExtractor, FeatureSet, FeatureSpec
from ...metrics.bootstrap import (
    Bootstrap,
    Estimate,
    estimate_frechet,
    estimate_kernel,
    estimate_manifolds,
    estimate_vendi,
)
from ...seeds import generator_for
from ..controls import embed_images
from ..results import JsonResult

if TYPE_CHECKING:
    from ...pipelines import DinoDiffusionPipeline

__all__ = [
    "REAL",
    "UNTRAINED",
    "FidelityResult",
    "FidelityScores",
    "Sampling",
    "encode_sources",
    "generate_features",
    "require_disjoint",
    "score_fidelity",
]

REAL, UNTRAINED = "real", "untrained"


@dataclass(frozen=True)
class Sampling:
    """How images were generated.

    Attributes:
        scheduler: Class of the noise schedule.
        num_inference_steps: Its steps.
        guidance_scale: 1 is none.
        seed: Of the noise, together with the key of the source.
        batch_size: Images generated at once; rounding depends on it.
        dtype: Of the weights.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    batch_size: int
    dtype: str = "float32"


@dataclass(frozen=True)
class FidelityScores(JsonResult):
    """All figures of one set of images against one reference, with all that they depend on.

    Attributes:
        images: What they are: the name of a model or checkpoint, `UNTRAINED` or `REAL`.
        step: Updates of the checkpoint; None for what is none.
        num_images: N.
        num_reference: M.
        features: Extractor, layer, pixel range, resize and hash of the weights.
        sampling: How they were generated; None for real images.
        neighbors: The neighbour that balls of precision, recall, density and coverage reach to.
        repeats: Draws of the bootstrap.
        bootstrap_seed: Of the draws.
        level: Probability mass of the intervals.
        by_patient: Whether patients were drawn, not images.
        frechet: Fréchet distance; lower is better.
        kernel: Kernel distance (KID), unbiased; lower is better.
        precision, recall, density, coverage: See `metrics.ManifoldFigures`; higher is better.
        vendi: Vendi score of the N images.
    """

    images: str
    step: int | None
    num_images: int
    num_reference: int
    features: FeatureSpec
    sampling: Sampling | None
    neighbors: int
    repeats: int
    bootstrap_seed: int
    level: float
    by_patient: bool
    frechet: Estimate
    kernel: Estimate
    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate
    vendi: Estimate

    @property
    def is_singular(self) -> bool:
        """Whether a set is too small for the covariance that the Fréchet distance asks for."""
        return min(self.num_images, self.num_reference) <= self.features.dim


@dataclass(frozen=True)
class FidelityResult(JsonResult):
    """The rows of a table; all have one reference, one extractor and as many images.

    Attributes:
        rows: Of models or checkpoints, then of the controls.
    """

    rows: tuple[FidelityScores, ...]

    def row(self, images: str) -> FidelityScores | None:
        """The row of this name, None if there is none."""
        return next((row for row in self.rows if row.images == images), None)

    @property
    def checkpoints(self) -> tuple[FidelityScores, ...]:
        """The rows of checkpoints, by their number of updates."""
        return tuple(sorted((row for row in self.rows if row.step is not None), key=lambda row: row.step))

    def best_checkpoint(self, metric: Literal["frechet", "kernel"] = "frechet") -> FidelityScores:
        """The checkpoint with the lowest distance.

        Raises:
            ValueError: If there is no checkpoint.
        """
        if not self.checkpoints:
            raise ValueError("The result holds no checkpoint to choose from.")
        return min(self.checkpoints, key=lambda row: getattr(row, metric).value)


def require_disjoint(sources: FeatureSet, reference: FeatureSet) -> None:
    """Refuse sources that are in the reference: a model would be rewarded for copying them.

    Raises:
        ValueError: If an image of one key has the same features in both sets.
    """
    shared = sorted(set(sources.keys) & set(reference.keys))
    if shared and (sources.select(shared).features == reference.select(shared).features).all(dim=1).any():
        raise ValueError(
            f"Images are in the reference and among the sources, such as {shared[0]!r} ({len(shared)} keys are in "
            "both): give other sources."
        )


def encode_sources(pipe: DinoDiffusionPipeline, images: ImageDataset, batch_size: int = 64) -> Tensor:
    """Condition tokens `(N, S, D)` of all images, float32 on the CPU; they serve all checkpoints."""
    chunks = (range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size))
    tokens = [embed_images(pipe, torch.stack([images[i]["image"] for i in chunk]), batch_size) for chunk in chunks]
    return torch.cat(tokens)


def generate_features(
    pipe: DinoDiffusionPipeline,
    tokens: Tensor,
    keys: Sequence[str],
    extractor: FeatureExtractor,
    sampling: Sampling,
    progress: bool = True,
) -> FeatureSet:
    """Generate an image from each source and keep its features; the images pass through memory a batch at a time.

    Args:
        pipe: The pipeline; its scheduler is the one that `sampling` names.
        tokens: `(N, S, D)`, condition tokens of the sources.
        keys: Of the sources. Noise depends on (seed, key) alone.
        extractor: What computes features.
        sampling: How to generate.
        progress: Whether to show a bar.

    Raises:
        ValueError: If there is not one key for each source, or the pipeline's scheduler is another one.
        RuntimeError: If the model generates NaN.
    """
    if len(tokens) != len(keys):
        raise ValueError(f"Expected a key for each of {len(tokens)} sources, got {len(keys)}.")
    if type(pipe.scheduler).__name__ != sampling.scheduler:
        raise ValueError(
            f"The pipeline has a {type(pipe.scheduler).__name__}, not the {sampling.scheduler} asked for."
        )
    pipe.set_progress_bar_config(disable=True)
    features = []
    for start in tqdm(range(0, len(keys), sampling.batch_size), unit="batch", leave=False, disable=not progress):
        chunk = slice(start, start + sampling.batch_size)
        images = pipe(
            image_embeds=tokens[chunk],
            generator=[generator_for(sampling.seed, "fidelity", key) for key in keys[chunk]],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="pt",
        ).images
        features.append(extractor(images.float()))
    return FeatureSet(torch.cat([torch.empty(0, extractor.spec.dim), *features]), tuple(keys), extractor.spec)


def score_fidelity(
    images: str,
    features: FeatureSet,
    reference: FeatureSet,
    *,
    step: int | None = None,
    sampling: Sampling | None = None,
    neighbors: int = 5,
    bootstrap: Bootstrap | None = None,
) -> FidelityScores:
    """All figures of one set of images, with their intervals (see `metrics.bootstrap`).

    Args:
        images: What they are, for the table.
        features: Of the N images.
        reference: Of M real images of other patients.
        step: Updates of the checkpoint that generated them.
        sampling: How they were generated.
        neighbors: The neighbour that balls of precision, recall, density and coverage reach to.
        bootstrap: How to draw, with the patients of both sets.

    Raises:
        ValueError: If the sets are of different extractors, or too small.
    """
    features.require_same_spec(reference)
    bootstrap = bootstrap or Bootstrap()
    scores = FidelityScores(
        images,
        step,
        len(features),
        len(reference),
        features.spec,
        sampling,
        neighbors,
        bootstrap.repeats,
        bootstrap.seed,
        bootstrap.level,
        bootstrap.groups is not None,
        estimate_frechet(features, reference, bootstrap),
        estimate_kernel(features, reference, bootstrap),
        *estimate_manifolds(features, reference, neighbors, bootstrap),
        estimate_vendi(features, bootstrap),
    )
    if scores.is_singular:
        warnings.warn(
            f"{len(features)} images against {len(reference)} are too few for features of {features.spec.dim} "
            "dimensions: the Fréchet distance is biased upwards. Read the kernel distance beside it.",
            stacklevel=2,
        )
    return scores
