"""Where generated features lie: among the real ones, everywhere among them, and how many different ones there are.

Precision, recall, density and coverage count balls that reach to nearest neighbours; the Vendi score needs no
reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features, comparable, feature_matrix

__all__ = ["ManifoldFigures", "manifold_figures", "manifold_hits", "vendi_score"]

_ENTRIES = 1 << 22  # distances in memory at once
_ROWS = 4096  # features that become float64 at once


@dataclass(frozen=True)
class ManifoldFigures:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A ball goes from each feature to its k-th nearest neighbour within its own set.

    Attributes:
        precision: Share of generated features in [0, 1] that lie in the ball of a real one.
        recall: Share of real features in [0, 1] that lie in the ball of a generated one.
        density: Mean number of real balls that a generated feature lies in, divided by k; above 1 where generated
            features crowd.
        coverage: Share of real features in [0, 1] with a generated one in their ball.
        k: The neighbour that balls reach to.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def manifold_figures(features: Features, reference: Features, k: int = 5) -> ManifoldFigures:
    """Precision, recall, density and coverage; memory does not grow with N x M.

    Features are `(N, D)` of the generated images and `(M, D)` of the real ones, N and M > k. Compare only figures of
    one k. ValueError if the sets do not compare or are too small, or a feature is not finite.
    """
    hits = manifold_hits(features, reference, k)
    return ManifoldFigures(**{name: terms.mean().item() for name, terms in hits.items()}, k=k)


def manifold_hits(features: Features, reference: Features, k: int = 5) -> dict[str, Tensor]:
    """What each feature adds to the figures of `manifold_figures`, which are the means: float64, for intervals.

    Precision and density are of the generated features, `(N,)`, recall and coverage of the real ones, `(M,)`.
    """
    if k < 1:
        raise ValueError(f"Balls reach to the first neighbour or a later one, got k = {k}.")
    generated, real = (x.double() for x in comparable(features, reference, at_least=k + 1))
    center = real.mean(dim=0)  # distances are differences of squares: the shorter the vectors, the better
    generated, real = generated - center, real - center
    radii_generated, radii_real = _neighbor_radii(generated, k), _neighbor_radii(real, k)  # (N,), (M,) squared
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    counts = []
    for rows, distances in _blocks_of_distances(generated, real):  # (n, M)
        inside = distances <= radii_real
        counts.append(inside.sum(dim=1))
        covered |= inside.any(dim=0)
        recalled |= (distances <= radii_generated[rows, None]).any(dim=0)
    balls = torch.cat(counts)  # (N,)
    hits = {"precision": balls > 0, "recall": recalled, "density": balls, "coverage": covered}
    return {name: terms.double() / (k if name == "density" else 1) for name, terms in hits.items()}


def vendi_score(features: Features) -> float:
    r"""Vendi score (Friedman & Dieng 2023) with the cosine kernel: an effective number of distinct features.

    .. math:: \exp\Bigl(-\sum_i \lambda_i \log \lambda_i\Bigr)

    of the eigenvalues of K / N. It is 1 for equal features and N for orthogonal ones, and it grows with N: compare it
    with that of as many real images. The eigenvalues are taken of the smaller of the N x N and the D x D Gram matrix,
    which have the same.

    Features are `(N, D)`, N >= 1. ValueError if one is not finite, or zero and so without a direction.
    """
    matrix = feature_matrix(features, at_least=1)
    if len(matrix) <= matrix.shape[1]:
        directions = _directions(matrix)
        gram = directions @ directions.T  # (N, N)
    else:
        gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)  # (D, D)
        for rows in matrix.split(_ROWS):
            part = _directions(rows)
            gram.addmm_(part.T, part)
    eigenvalues = torch.linalg.eigvalsh(gram / len(matrix)).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp().item()


def _neighbor_radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row: `(N,)`."""
    radii = []
    for rows, distances in _blocks_of_distances(features, features):
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _blocks_of_distances(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks `(n, M)` of squared Euclidean distances, with the slice of rows that each is of."""
    lengths = columns.square().sum(dim=1)  # (M,)
    step = max(1, _ENTRIES // len(columns))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        block = rows[part]
        # Symmetric in rows and columns also in rounding, so that a copy of a ball's rim lies in that ball:
        # `neighbours` adds in another order, which saves a matrix and keeps no ties
        distances = block.square().sum(dim=1, keepdim=True) + lengths - 2 * (block @ columns.T)
        yield part, distances.clamp_(min=0)


def _directions(features: Tensor) -> Tensor:
    features = features.double()
    lengths = features.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError(f"{int((lengths == 0).sum())} features are zero and have no direction: no cosine is defined.")
    return features / lengths
