"""Clusters of the features of many images: a segment keeps its identity from image to image.

Clustering a vision transformer's patch tokens over all images is how Amir et al. ("Deep ViT Features as Dense Visual
Descriptors", arXiv 2112.05814) find parts that images share. Here each image's features are first centred, and the
principal directions are scaled halfway to equal variance, so that the others count besides the few largest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from ..seeds import derive_seed, generator_for
from ..tensor_files import read_tensors, refusing, write_tensors
from .features import centered

__all__ = ["FeatureClusters", "fit_clusters"]

_KIND = "a file of clusters"
_FORMAT = 1
_DIRECTIONS = 64
_HALF_WHITENED = 0.25  # variance to this power divides each direction: 0 leaves it as it is, 0.5 whitens
_FEATURES_AN_IMAGE = 128
_FEATURES_AT_MOST = 50_000
_SOFTNESS = 6  # probabilities fall by e for each sixth of the mean squared distance to the own center
_REPEATS = 4  # of the split in halves that the number of clusters is chosen by


@dataclass(frozen=True, eq=False)
class FeatureClusters:
    """K clusters in a space of R directions of features of width D.

    Attributes:
        mean: `(D,)`, of centred features.
        directions: `(R, D)`, scaled.
        centers: `(K, R)`.
        spread: Mean squared distance of a feature to its center.
        settings: What the features are: the keyword arguments of `DiffSegPipeline.patch_features`.
        names: Numbers of the clusters that are one structure, such as `{"lungs": (0, 3)}`.
        stability: Of each number of clusters that was tried, how well clusters of two halves of the images agree: the
            mean adjusted Rand index, 1 for the same clusters and 0 for chance. Empty if one number was given.
    """

    mean: Tensor
    directions: Tensor
    centers: Tensor
    spread: float
    settings: Mapping[str, Any]
    names: Mapping[str, tuple[int, ...]]
    stability: Mapping[int, float]

    def __len__(self) -> int:
        return len(self.centers)

    def assign(self, features: Tensor) -> Tensor:
        """How likely each patch belongs to each cluster: `(B, K, h, w)` of sum 1 for features `(B, D, h, w)`."""
        if features.ndim != 4 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"The clusters are of features (B, {len(self.mean)}, h, w), got {tuple(features.shape)}: they were "
                "fitted with another model."
            )
        points = _project(features.float(), self.mean.to(features.device), self.directions.to(features.device))
        distances = torch.cdist(points, self.centers.to(points)[None].expand(len(points), -1, -1)).square()
        likely = (-distances * (_SOFTNESS / self.spread)).softmax(dim=-1)  # (B, h * w, K)
        return likely.transpose(1, 2).unflatten(2, features.shape[-2:])

    def named(self, name: str, numbers: Sequence[int]) -> FeatureClusters:
        """The same clusters, some of which have a name; a ValueError if a number is not of a cluster."""
        if not numbers or not all(0 <= number < len(self) for number in numbers):
            raise ValueError(f"The clusters are 0 to {len(self) - 1}, got {list(numbers)} for {name!r}.")
        return replace(self, names={**self.names, name: tuple(int(number) for number in numbers)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file: averages over many images, and neither an image nor its features."""
        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "directions", "centers")}
        described = {name: getattr(self, name) for name in ("spread", "settings", "names", "stability")}
        write_tensors(path, tensors, {"clusters": {"format": _FORMAT, **described}})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureClusters:
        """Read what `save` wrote; FileNotFoundError if it is not there, a ValueError if it is something else."""
        tensors, metadata = read_tensors(path, _KIND, "mean", "directions", "centers")
        with refusing(path, _KIND):
            described = metadata["clusters"]
            if described["format"] != _FORMAT:
                raise ValueError(f"its format is {described['format']}, and {_FORMAT} is read")
            return cls(
                **tensors,
                spread=float(described["spread"]),
                settings=dict(described["settings"]),
                names={name: tuple(numbers) for name, numbers in described["names"].items()},
                stability={int(number): float(value) for number, value in described["stability"].items()},
            )


def fit_clusters(
    features: Iterable[Tensor],
    num_clusters: int | Sequence[int] = range(4, 13),
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> FeatureClusters:
    """Cluster the features of many images by k-means; needs scikit-learn (extra `eval`).

    Args:
        features: Batch by batch, `(B, D, h, w)`; at most 128 positions of each image are kept.
        num_clusters: How many clusters, or several numbers, of which the most stable one is taken: that of which the
            clusters of a random half of the images agree best with those of the other half. No mask is looked at.
        settings: See `FeatureClusters`.
        seed: Of positions, halves and starts.

    Raises:
        ValueError: If there are fewer than two images, or fewer than four features a cluster, or one is not finite.
    """
    numbers = [num_clusters] if isinstance(num_clusters, int) else list(num_clusters)
    if not numbers or min(numbers) < 2:
        raise ValueError(f"There must be two clusters or more, got {num_clusters!r}.")
    kept: list[Tensor] = []
    for batch in features:
        for image in centered(batch.float()).flatten(2).transpose(1, 2).cpu():  # (h * w, D)
            order = torch.randperm(len(image), generator=generator_for(seed, "cluster positions", len(kept)))
            kept.append(image[order[:_FEATURES_AN_IMAGE]])
    if len(kept) < 2:
        raise ValueError(f"Clusters over a data set need two images or more, got {len(kept)}.")
    kept = kept[:: 1 + sum(map(len, kept)) // _FEATURES_AT_MOST]
    stacked = torch.cat(kept)
    if not stacked.isfinite().all():
        raise ValueError("The features are not finite: check the model's weights, or use float32 or bfloat16.")
    if len(stacked) < 4 * max(numbers):
        raise ValueError(f"{len(stacked)} features of {len(kept)} images are too few for {max(numbers)} clusters.")
    mean = stacked.mean(dim=0)
    variances, axes = torch.linalg.eigh((stacked - mean).double().T.cov())
    rank = int((variances > 1e-6 * variances[-1]).sum())
    used = min(_DIRECTIONS, max(1, rank))
    variances, axes = variances[-used:].flip(0), axes[:, -used:].flip(1)
    directions = (axes / variances.clamp(min=1e-12) ** _HALF_WHITENED).T.float()
    points = [((image - mean) @ directions.T).numpy() for image in kept]
    stability = {} if len(numbers) == 1 else {number: _stability(points, number, seed) for number in numbers}
    best = max(numbers, key=lambda number: stability.get(number, 0.0))
    fitted = _kmeans(np.concatenate(points), best, seed)
    spread = max(float(fitted.inertia_) / sum(map(len, points)), 1e-12)
    centers = torch.from_numpy(fitted.cluster_centers_).float()
    return FeatureClusters(mean, directions, centers, spread, dict(settings or {}), {}, stability)


def _stability(points: list[np.ndarray], number: int, seed: int) -> float:
    """Mean adjusted Rand index (Hubert and Arabie 1985) between the clusters of two halves of the images."""
    metrics = require("sklearn.metrics", "eval", "Choosing the number of clusters needs scikit-learn")
    everything, scores = np.concatenate(points), []
    for repeat in range(_REPEATS):
        order = torch.randperm(len(points), generator=generator_for(seed, "cluster halves", repeat)).tolist()
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        fitted = [_kmeans(np.concatenate([points[i] for i in half]), number, seed) for half in halves]
        scores.append(metrics.adjusted_rand_score(*(each.predict(everything) for each in fitted)))
    return float(np.mean(scores))


def _kmeans(points: np.ndarray, number: int, seed: int) -> Any:
    cluster = require("sklearn.cluster", "eval", "Clusters over a data set need scikit-learn")
    start = derive_seed(seed, "clusters") % 2**32
    return cluster.KMeans(number, n_init=2, random_state=start).fit(points)


def _project(features: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """`(B, h * w, R)`."""
    return (centered(features).flatten(2).transpose(1, 2) - mean) @ directions.T
