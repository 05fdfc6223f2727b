"""Distances and scores with bootstrap intervals. Each needs a bootstrap of its own: drawn copies are not new images.

Sets that are drawn with replacement hold copies, which no sample of a population does. A Fréchet distance between such
sets is larger, and a Vendi score smaller, than between sets of as many different images; the mean by which the draws
miss the figure, its `excess`, is told and taken off the draws. So an interval is that of the figure *at these sizes of
the sets*, not of what infinite sets would give. A kernel distance leaves pairs of copies out and needs no such step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..seeds import derive_seed
from .bootstrap import bootstrap_samples, percentile_interval, resamples
from .distances import frechet_of_samples, kernel_blocks
from .diversity import vendi_score
from .inputs import Features, comparable, feature_matrix
from .manifolds import manifold_hits

__all__ = ["Bootstrap", "Estimate", "estimate_frechet", "estimate_kernel", "estimate_manifolds", "estimate_vendi"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: The figure of the sets as they are.
        low, high: Ends of the interval of draws, less their excess; of a mean of terms, of the draws as they are.
        excess: Mean of the draws less `value`, about the figure's own bias at these sizes of the sets.
    """

    value: float
    low: float
    high: float
    excess: float


@dataclass(frozen=True)
class Bootstrap:
    """How to draw.

    Args:
        repeats: Number of draws.
        seed: Of the draws.
        level: Probability mass of the intervals.
        groups: The patient of each feature, drawn whole; None draws features.
        reference_groups: The same for the reference.
    """

    repeats: int = 200
    seed: int = 0
    level: float = 0.95
    groups: Sequence[Any] | None = None
    reference_groups: Sequence[Any] | None = None

    @property
    def reference_seed(self) -> int:
        """Of the draws of the reference, which do not depend on the others."""
        return derive_seed(self.seed, "reference")


def estimate_frechet(features: Features, reference: Features, bootstrap: Bootstrap) -> Estimate:
    """`frechet_distance`, both sets drawn; it does not warn of few samples. Errors are the same."""
    first, second = comparable(features, reference)
    draws = [frechet_of_samples(first[rows], second[columns]) for rows, columns in _pairs(first, second, bootstrap)]
    return _recentred(frechet_of_samples(first, second), np.array(draws), bootstrap.level)


def estimate_kernel(features: Features, reference: Features, bootstrap: Bootstrap) -> Estimate:
    """`kernel_distance`, both sets drawn: one pass over the kernel serves all draws. Errors are the same.

    A draw is a weight for each group. Pairs of a feature with its copies are left out, and pairs within a patient who
    was drawn w times count w times, not w * w; so the draws have the expectation of the figure.
    """
    first, second = (x.double() for x in comparable(features, reference))
    draws = list(_pairs(first, second, bootstrap))
    ours = _weights([rows for rows, _ in draws], len(first))  # (1 + R, N); the first row is the figure itself
    theirs = _weights([columns for _, columns in draws], len(second))  # (1 + R, M)
    within = _mean_within(first, ours, bootstrap.groups) + _mean_within(second, theirs, bootstrap.reference_groups)
    across = torch.zeros(len(ours), dtype=torch.float64)
    for part, block in kernel_blocks(first, second):
        across += (ours[:, part] * (theirs @ block.T)).sum(dim=1)
    values = (within - 2 * across / (ours.sum(dim=1) * theirs.sum(dim=1))).numpy()
    return _recentred(float(values[0]), values[1:], bootstrap.level)


def estimate_manifolds(
    features: Features, reference: Features, k: int, bootstrap: Bootstrap
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Precision, recall, density and coverage. Errors are those of `manifold_figures`.

    The balls stay as they are, since a copy would shrink its own to nothing: precision and density are drawn over the
    generated features, recall and coverage over the real ones. What chance does to the other set is not in them.
    """
    hits = manifold_hits(features, reference, k)
    ours, theirs = (bootstrap.groups, bootstrap.seed), (bootstrap.reference_groups, bootstrap.reference_seed)
    estimates = []
    for terms, (groups, seed) in (
        (hits.precision, ours),
        (hits.recall, theirs),
        (hits.density, ours),
        (hits.coverage, theirs),
    ):
        values = terms.numpy()
        draws = bootstrap_samples(lambda rows, v=values: v[rows].mean(), len(values), groups, bootstrap.repeats, seed)
        value = float(values.mean())
        estimates.append(Estimate(value, *percentile_interval(draws, bootstrap.level), float(draws.mean()) - value))
    return tuple(estimates)


def estimate_vendi(features: Features, bootstrap: Bootstrap) -> Estimate:
    """`vendi_score` of the first set. Errors are the same."""
    matrix = feature_matrix(features)
    options = (len(matrix), bootstrap.groups, bootstrap.repeats, bootstrap.seed)
    draws = bootstrap_samples(lambda rows: vendi_score(matrix[rows]), *options)
    return _recentred(vendi_score(matrix), draws, bootstrap.level)


def _pairs(first: Tensor, second: Tensor, bootstrap: Bootstrap) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of both sets for each draw."""
    ours = resamples(len(first), bootstrap.groups, bootstrap.repeats, bootstrap.seed)
    theirs = resamples(len(second), bootstrap.reference_groups, bootstrap.repeats, bootstrap.reference_seed)
    return zip(ours, theirs, strict=True)


def _recentred(value: float, draws: np.ndarray, level: float) -> Estimate:
    excess = float(np.nanmean(draws)) - value
    return Estimate(value, *percentile_interval(draws - excess, level), excess)


def _weights(draws: list[np.ndarray], n: int) -> Tensor:
    """How often each of n rows was drawn, `(1 + R, n)` float64; the first row counts each once."""
    counts = [np.bincount(rows, minlength=n) for rows in draws]
    return torch.from_numpy(np.stack([np.ones(n), *counts]).astype(float))


def _mean_within(features: Tensor, weights: Tensor, groups: Sequence[Any] | None) -> Tensor:
    """Mean kernel `(R,)` of pairs of different features `(N, D)`, under weights `(R, N)` that are equal in a group."""
    names, codes = np.unique(np.arange(len(features)) if groups is None else np.asarray(groups), return_inverse=True)
    codes = torch.from_numpy(codes)
    total = torch.zeros(len(weights), dtype=torch.float64)
    inside = torch.zeros(
        len(names), dtype=torch.float64
    )  # sum over all pairs of a group, features with themselves too
    own = torch.zeros(len(names), dtype=torch.float64)  # of features with themselves
    for part, block in kernel_blocks(features, features):
        total += (weights[:, part] * (weights @ block.T)).sum(dim=1)
        of_group = (block * (codes[part, None] == codes)).sum(dim=1)
        inside.index_add_(0, codes[part], of_group)
        own.index_add_(0, codes[part], block[:, part].diagonal())
    sizes = torch.bincount(codes).double()
    drawn = torch.zeros(len(weights), len(names), dtype=torch.float64)
    drawn[:, codes] = weights  # (R, G): how often each group was drawn
    total += drawn @ (inside - own) - drawn.square() @ inside
    pairs = weights.sum(dim=1).square() + drawn @ (sizes * (sizes - 1)) - drawn.square() @ sizes.square()
    return total / pairs
