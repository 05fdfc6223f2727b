"""Bootstrap intervals of any figure, patients drawn whole (Efron & Tibshirani 1993, percentile method)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..seeds import generator_for

__all__ = ["Interval", "bootstrap_interval", "bootstrap_samples", "percentile_interval", "resamples"]


@dataclass(frozen=True)
class Interval:
    """Both ends of an interval."""

    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.low, self.high))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    n: int,
    groups: Sequence[Any] | None = None,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a figure of n items, drawn with replacement.

    Args:
        statistic: Row numbers `(m,)` int64, with repetitions -> the figure of these rows. NaN where it is not defined,
            such as an AUROC of one class alone: such draws are left out.
        n: Number of items.
        groups: The group of each item, such as its patient: groups are drawn whole, so m varies. None draws items.
        repeats: Number of draws.
        seed: Of the draws; two figures of the same seed, n and groups see the same draws.
        level: Probability mass between the ends.

    Raises:
        ValueError: If there are fewer than two groups, or the figure is not defined on half of the draws.
    """
    return percentile_interval(bootstrap_samples(statistic, n, groups, repeats, seed), level)


def bootstrap_samples(
    statistic: Callable[[np.ndarray], Any],
    n: int,
    groups: Sequence[Any] | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The figure on each draw, for intervals of differences or of several figures at once.

    Args:
        statistic: As in `bootstrap_interval`, but it may return an array of figures.
        n: Items, of which each draw has as many groups as there are.
        groups: Group of each item, such as its patient, drawn whole; by default each is its own.
        repeats: Draws.
        seed: Of the draws.

    Returns:
        `(repeats, ...)` float64.
    """
    return np.stack([np.asarray(statistic(rows), float) for rows in resamples(n, groups, repeats, seed)])


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> Interval:
    """The interval that holds `level` of `(repeats,)` draws, those that are not finite left out.

    Raises:
        ValueError: If fewer than half of them are finite, or `level` is no probability.
    """
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval is in (0, 1), got {level}.")
    finite = samples[np.isfinite(samples)]
    if len(finite) == 0 or 2 * len(finite) < len(samples):
        raise ValueError(
            f"The figure is defined on {len(finite)} of {len(samples)} draws alone: there is too little data for an "
            "interval."
        )
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(low, high)


def resamples(n: int, groups: Sequence[Any] | None = None, repeats: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Row numbers of each draw.

    Args:
        n: Items, of which each draw has as many groups as there are.
        groups: Group of each item, such as its patient, drawn whole; by default each is its own.
        repeats: Draws.
        seed: Of the draws.

    Yields:
        `(m,)` int64 in [0, n): as many groups as there are, drawn with replacement, each with all of its rows.

    Raises:
        ValueError: If there are fewer than two groups, not one for each item, or no draw.
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
