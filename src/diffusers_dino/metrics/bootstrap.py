"""Intervals of figures: bootstrap of any figure with patients drawn whole (Efron & Tibshirani 1993), and of distances.

Sets that are drawn with replacement hold copies, which no sample of a population does. A Fréchet distance between such
sets is larger, and a Vendi score smaller, than between sets of as many different images; the mean by which the draws
miss the figure, its `excess`, is reported and subtracted from the draws. So an interval is that of the figure *at
these sizes of the sets*, not of what infinite sets would give. A kernel distance leaves pairs of copies out and needs
no such step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..seeds import derive_seed, generator_for
from .distances import frechet_of_samples, kernel_blocks
from .features import Features, comparable, feature_matrix
from .manifolds import manifold_hits, vendi_score

__all__ = [
    "LEVEL",
    "Bootstrap",
    "Estimate",
    "Interval",
    "bootstrap_interval",
    "bootstrap_samples",
    "estimate_frechet",
    "estimate_kernel",
    "estimate_manifolds",
    "estimate_vendi",
    "percentile_interval",
    "resamples",
    "share_interval",
]

LEVEL = 0.95  # probability mass of every interval


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    n: int,
    groups: Sequence[Any] | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % percentile interval of a figure of n items, drawn with replacement.

    Args:
        statistic: Row numbers `(m,)` int64, with repetitions -> the figure of these rows. NaN where it is not defined,
            such as an AUROC where all images have the label: such draws are left out.
        n: Number of items.
        groups: The group of each item, such as its patient: groups are drawn whole, so m varies. None draws items.
        repeats: Number of draws.
        seed: Two figures of the same seed, n and groups see the same draws.

    ValueError if there are fewer than two groups, or the figure is not defined on half of the draws.
    """
    return percentile_interval(bootstrap_samples(statistic, n, groups, repeats, seed))


def bootstrap_samples(
    statistic: Callable[[np.ndarray], Any],
    n: int,
    groups: Sequence[Any] | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The figure on each draw, `(repeats, ...)` float64: for intervals of differences or of several figures at once.

    Arguments are those of `bootstrap_interval`, but the statistic may return an array of figures.
    """
    return np.stack([np.asarray(statistic(rows), float) for rows in resamples(n, groups, repeats, seed)])


def percentile_interval(samples: np.ndarray) -> Interval:
    """The interval that holds 95 % of `(repeats,)` draws; ValueError if fewer than half of them are finite."""
    finite = samples[np.isfinite(samples)]
    if len(finite) == 0 or 2 * len(finite) < len(samples):
        raise ValueError(
            f"The figure is defined on {len(finite)} of {len(samples)} draws only: there is too little data for an "
            "interval."
        )
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Interval(low, high)


def resamples(n: int, groups: Sequence[Any] | None = None, repeats: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Row numbers `(m,)` of each draw; arguments and errors are those of `bootstrap_interval`.

    As many groups as there are, are drawn with replacement, each with all of its rows.
    """
    names, codes = np.unique(np.arange(n) if groups is None else np.asarray(groups), return_inverse=True)
    if len(codes) != n:
        raise ValueError(f"Expected the group of each of {n} items, got {len(codes)} groups.")
    if len(names) < 2 or repeats < 1:
        raise ValueError(
            f"A bootstrap needs two items or groups and one draw at least, got {len(names)} and {repeats}."
        )
    generator = generator_for(seed, "bootstrap")
    by_group = np.argsort(codes, kind="stable")
    members = np.split(by_group, np.cumsum(np.bincount(codes))[:-1])
    for _ in range(repeats):  # not in one go: 1,000 draws of 100,000 rows are 0.8 GB
        drawn = torch.randint(len(names), (len(names),), generator=generator).numpy()
        yield by_group[drawn] if len(names) == n else np.concatenate([members[group] for group in drawn])


def share_interval(count: int, n: int) -> Interval:
    """95 % interval of a share of n independent images (Wilson 1927), which is not empty for 0 of n."""
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"A share is of at least one image and at most all, got {count} of {n}.")
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    center, spread = count / n + z * z / (2 * n), z * math.sqrt(count * (n - count) / n**3 + z * z / (4 * n * n))
    low, high = ((center + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Interval(max(low, 0.0) if count else 0.0, min(high, 1.0) if count < n else 1.0)


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
    """How to draw features, and those of the reference (`reference_groups`); see `bootstrap_interval`."""

    repeats: int = 200
    seed: int = 0
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
    return _recentred(frechet_of_samples(first, second), np.array(draws))


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
    return _recentred(float(values[0]), values[1:])


def estimate_manifolds(
    features: Features, reference: Features, k: int, bootstrap: Bootstrap
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Precision, recall, density and coverage. Errors are those of `manifold_figures`.

    The balls stay as they are, since a copy would shrink its own to nothing: precision and density are drawn over the
    generated features, recall and coverage over the real ones. What chance does to the other set is not in them.
    """
    hits = manifold_hits(features, reference, k)
    ours, theirs = (bootstrap.groups, bootstrap.seed), (bootstrap.reference_groups, bootstrap.reference_seed)

    def estimate(terms: Tensor, groups: Sequence[Any] | None, seed: int) -> Estimate:
        values = terms.numpy()
        draws = bootstrap_samples(lambda rows: values[rows].mean(), len(values), groups, bootstrap.repeats, seed)
        value = float(values.mean())
        return Estimate(value, *percentile_interval(draws), float(draws.mean()) - value)

    return tuple(
        estimate(terms, *(ours if name in ("precision", "density") else theirs)) for name, terms in hits.items()
    )


def estimate_vendi(features: Features, bootstrap: Bootstrap) -> Estimate:
    """`vendi_score` of the first set. Errors are the same."""
    matrix = feature_matrix(features)
    options = (len(matrix), bootstrap.groups, bootstrap.repeats, bootstrap.seed)
    draws = bootstrap_samples(lambda rows: vendi_score(matrix[rows]), *options)
    return _recentred(vendi_score(matrix), draws)


def _pairs(first: Tensor, second: Tensor, bootstrap: Bootstrap) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of both sets for each draw."""
    ours = resamples(len(first), bootstrap.groups, bootstrap.repeats, bootstrap.seed)
    theirs = resamples(len(second), bootstrap.reference_groups, bootstrap.repeats, bootstrap.reference_seed)
    return zip(ours, theirs, strict=True)


def _recentred(value: float, draws: np.ndarray) -> Estimate:
    excess = float(np.nanmean(draws)) - value
    return Estimate(value, *percentile_interval(draws - excess), excess)


def _weights(draws: list[np.ndarray], n: int) -> Tensor:
    """How often each of n rows was drawn, `(1 + R, n)` float64; the first row counts each once."""
    counts = [np.bincount(rows, minlength=n) for rows in draws]
    return torch.from_numpy(np.stack([np.ones(n), *counts]).astype(float))


def _mean_within(features: Tensor, weights: Tensor, groups: Sequence[Any] | None) -> Tensor:
    """Mean kernel `(R,)` of pairs of different features `(N, D)`, under weights `(R, N)` that are equal in a group."""
    names, codes = np.unique(np.arange(len(features)) if groups is None else np.asarray(groups), return_inverse=True)
    codes = torch.from_numpy(codes)
    total = torch.zeros(len(weights), dtype=torch.float64)
    # for each group the sum over all its pairs, and over features with themselves
    inside, own = torch.zeros(2, len(names), dtype=torch.float64)
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
