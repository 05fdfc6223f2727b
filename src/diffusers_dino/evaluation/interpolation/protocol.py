"""Do the images along a path leave one image and approach the other? Similarity to both ends, with controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data import ImageDataset
from ...metrics import pixel_features
from ...metrics.neighbours import nearest_by_cosine
from ...pipelines import DinoInterpolationPipeline
from ..controls import derangement, warn_of_training_images, with_fresh_unet
from ..generation import embed_images, generate_batches, stack_images
from ..results import JsonResult

if TYPE_CHECKING:
    from ...pipelines import DinoDiffusionPipeline

__all__ = ["InterpolationResult", "PathFigures", "PathSpace", "evaluate_interpolation", "path_figures"]


@dataclass(frozen=True)
class PathFigures:
    """How paths leave their source and approach their target within one feature space.

    Attributes:
        to_source, to_target: Mean cosine to either end at each fraction.
        monotone_paths: Share of paths in [0, 1] on which each step leaves the source and approaches the target.
        monotone_steps: Share of single steps that do both.
    """

    to_source: tuple[float, ...]
    to_target: tuple[float, ...]
    monotone_paths: float
    monotone_steps: float

    @property
    def falls_and_rises(self) -> bool:
        """Whether the mean cosine to the source falls with each fraction, and that to the target rises."""
        return all(a > b for a, b in pairwise(self.to_source)) and all(a < b for a, b in pairwise(self.to_target))


@dataclass(frozen=True)
class PathSpace:
    """The paths of the model and of its controls within one feature space."""

    generated: PathFigures
    untrained: PathFigures
    nearest_training_image: PathFigures
    pixel_blend: PathFigures


@dataclass(frozen=True)
class InterpolationResult(JsonResult):
    """Figures of the paths between N pairs of images that the pipeline has not seen, over all pairs and seeds.

    Cosines are of features less their mean over the N images. `by_encoder` takes the pipeline's own condition tokens,
    `by_pixels` 16 x 16 gray pixels, a space that the encoder did not shape.
    """

    num_pairs: int
    num_training_images: int
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    method: str
    by_encoder: PathSpace
    by_pixels: PathSpace


def evaluate_interpolation(
    pipe: DinoDiffusionPipeline,
    images: ImageDataset | Tensor,
    training_images: ImageDataset | Tensor,
    *,
    fractions: Sequence[float] = tuple(i / 6 for i in range(7)),
    method: Literal["lerp", "slerp"] = "lerp",
    seeds: Sequence[int] = (0,),
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 64,
    progress: bool = True,
) -> InterpolationResult:
    """Generate a path from each image to another one, and measure how it leaves the first and approaches the second.

    The pairs are a cycle through the images in random order: each is a source once and a target once. All images of a
    path start from the same noise.

    Controls: *untrained*, the same UNet with fresh weights; *nearest training image*, a lookup of the interpolated
    tokens in the training set, which leaps; *pixel blend*, the two images on top of each other, which is smooth but
    not a radiograph.

    Args:
        pipe, images, training_images, seeds, num_inference_steps: As of `evaluate_reconstruction`.
        fractions: Points of a path, ascending in [0, 1].
        method: How tokens are interpolated.
        guidance_scale: Of the generated images; the untrained UNet goes without.
        batch_size: Paths generated at once.

    ValueError if there are fewer than two images, or the fractions do not ascend.
    """
    images, training_images = stack_images(images), stack_images(training_images)
    if not seeds:
        raise ValueError("Give one seed or more.")
    if len(images) < 2 or not all(a < b for a, b in pairwise(fractions)):
        raise ValueError(f"Expected two images or more and ascending fractions, got {len(images)} and {fractions}.")
    warn_of_training_images(images, training_images)
    between = DinoInterpolationPipeline.from_pipe(pipe)
    fresh = with_fresh_unet(between)
    tokens = embed_images(pipe, images, batch_size)  # (N, S, D)
    targets = derangement(len(images), seed=0)
    points = between.interpolate(tokens, tokens[targets], fractions, method)  # (N, F, S, D)
    training_tokens = embed_images(pipe, training_images, batch_size).flatten(1)
    lookup = torch.stack([nearest_by_cosine(point.flatten(1), training_tokens) for point in points.unbind(1)], dim=1)
    weights = torch.tensor(fractions)[:, None, None, None]  # (F, 1, 1, 1)

    ends, rows = {"source_embeds": tokens, "target_embeds": tokens[targets]}, range(len(images))
    call = {"fractions": fractions, "method": method, "num_inference_steps": num_inference_steps}
    call |= {"batch_size": batch_size, "progress": progress}

    def draw(pipe: DinoInterpolationPipeline, guidance_scale: float) -> Tensor:
        options = {"guidance_scale": guidance_scale, **call}
        drawn = [batch.cpu() for s in seeds for batch in generate_batches(pipe, ends, rows, (s, "path"), **options)]
        return torch.cat(drawn).unflatten(0, (-1, len(fractions)))

    paths = {  # (seeds * N, F, C, H, W), and (N, F, C, H, W) of what is not drawn
        "generated": draw(between, guidance_scale),
        "untrained": draw(fresh, 1.0),
        "nearest_training_image": training_images[lookup],
        "pixel_blend": torch.lerp(images[:, None], images[targets][:, None], weights),
    }
    spaces: dict[str, Callable[[Tensor], Tensor]] = {
        "by_encoder": lambda x: embed_images(pipe, x, batch_size).flatten(1),
        "by_pixels": pixel_features,
    }
    figures = {}
    for space, embed in spaces.items():
        ends = embed(images)  # (N, D)
        embedded = {name: embed(path.flatten(0, 1)).unflatten(0, path.shape[:2]) for name, path in paths.items()}
        figures[space] = PathSpace(**{name: _against(path, ends, targets) for name, path in embedded.items()})
    return InterpolationResult(
        num_pairs=len(images),
        num_training_images=len(training_images),
        fractions=tuple(fractions),
        seeds=tuple(seeds),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        method=method,
        **figures,
    )


def path_figures(paths: Tensor, sources: Tensor, targets: Tensor) -> PathFigures:
    """Similarity of the F >= 2 points of P paths, `(P, F, D)`, to their ends, `(P, D)` each."""
    if paths.ndim != 3 or paths.shape[1] < 2 or not sources.shape == targets.shape == paths[:, 0].shape:
        raise ValueError(
            f"Expected paths (P, F, D) with F >= 2 and their ends (P, D), got {tuple(paths.shape)}, "
            f"{tuple(sources.shape)} and {tuple(targets.shape)}."
        )
    to_source, to_target = (F.cosine_similarity(paths, ends[:, None], dim=-1) for ends in (sources, targets))  # (P, F)
    right_way = (to_source.diff(dim=1) < 0) & (to_target.diff(dim=1) > 0)  # (P, F - 1)
    return PathFigures(
        to_source=tuple(to_source.mean(0).tolist()),
        to_target=tuple(to_target.mean(0).tolist()),
        monotone_paths=right_way.all(1).float().mean().item(),
        monotone_steps=right_way.float().mean().item(),
    )


def _against(paths: Tensor, ends: Tensor, targets: Tensor) -> PathFigures:
    """Figures of `(K * N, F, D)` for the ends `(N, D)`, centred on their mean."""
    center, repeats = ends.mean(0), len(paths) // len(ends)
    ends = ends - center
    return path_figures(paths - center, ends.repeat(repeats, 1), ends[targets].repeat(repeats, 1))
