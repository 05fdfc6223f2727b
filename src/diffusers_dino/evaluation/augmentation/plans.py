"""What to synthesise for a fold: one plan that serves all regimes and ratios, each regime from its own images alone.

A user with 50 images can vary these 50 and interpolate between them, and nothing else. Regimes are nested, so much of
what a small one needs serves the larger ones, too:

- Reconstruction: of each variation of all images of the largest regime, a smaller one takes those of its own images.
- Interpolation: in the random order of a regime's pairs, those between two images of the next smaller regime are taken
  from that regime's order. Either order is as random as alone, each pair still comes once before any comes again, and
  an image is sampled once for all regimes that hold it.

Within a regime the images of ratio 1:1 are the first of those of 1:5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from ...seeds import derive_seed
from ...synthesis.pairs import Pair, sample_pairs
from ...synthesis.plan import Plan, plan_pairs, plan_reconstruction
from ...synthesis.settings import SynthesisError, SynthesisSettings
from .cells import INTERPOLATION, RECONSTRUCTION

__all__ = ["RegimePlan", "plan_regimes"]


class RegimePlan(NamedTuple):
    """A plan, and which of its images each regime has.

    Attributes:
        plan: All images of the fold and strategy, each once.
        images: For each regime of R real images, `(R * ratio,)` int64 numbers of the plan's images at the largest
            ratio; ratio r has the first `R * r`.
    """

    plan: Plan
    images: Mapping[int, np.ndarray]


def plan_regimes(
    strategy: str,
    keys: Sequence[str],
    labels: Sequence[Collection[str]],
    regimes: Sequence[int],
    ratio: int,
    *,
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> RegimePlan:
    """Plan the synthetic images of all regimes at the largest ratio.

    Args:
        strategy: `RECONSTRUCTION` or `INTERPOLATION`.
        keys: Of the images of the largest regime; a regime of R images has the first R (`order_balanced`).
        labels: Of each.
        regimes: Numbers of real images.
        ratio: The largest number of synthetic images for each real one.
        seed: Of pairs, fractions and noise.
        settings: How images are computed and stored.

    Raises:
        ValueError: If the strategy is unknown, or a regime is larger than `keys`.
        SynthesisError: If no two images of a regime share a label.
    """
    if not regimes or max(regimes) > len(keys) or min(regimes) < 1 or ratio < 1:
        raise ValueError(f"Regimes {list(regimes)} at ratio {ratio} cannot be planned from {len(keys)} images.")
    largest = max(regimes)
    keys, labels = keys[:largest], labels[:largest]
    if strategy == RECONSTRUCTION:
        plan = plan_reconstruction(keys, labels, ratio=ratio, seed=seed, settings=settings)
        rank = {key: place for place, key in enumerate(keys)}
        source = np.array([rank[plan.keys[number]] for number in plan.sources[:, 0].tolist()])
        return RegimePlan(plan, {regime: np.flatnonzero(source < regime) for regime in regimes})
    if strategy != INTERPOLATION:
        raise ValueError(f"The strategy is {RECONSTRUCTION!r} or {INTERPOLATION!r}, got {strategy!r}.")
    pairs = _nested_pairs(labels, sorted(regimes), ratio, seed)
    number = {pair: place for place, pair in enumerate(dict.fromkeys(p for own in pairs.values() for p in own))}
    plan = plan_pairs(keys, labels, list(number), seed=seed, settings=settings)
    return RegimePlan(plan, {regime: np.array([number[pair] for pair in own]) for regime, own in pairs.items()})


def _nested_pairs(
    labels: Sequence[Collection[str]], regimes: Sequence[int], ratio: int, seed: int
) -> dict[int, list[Pair]]:
    """The pairs of each regime, regimes ascending; those within a smaller one are its own first ones."""
    pairs: dict[int, list[Pair]] = {}
    smaller, inner = 0, _Replayed(iter(()))
    for regime in regimes:
        try:
            own = sample_pairs(labels[:regime], derive_seed(seed, "regime", regime))
        except ValueError as error:
            raise SynthesisError(
                f"The regime of {regime} images cannot be interpolated. {error} Leave it out, or use coarser labels."
            ) from error
        inner = _Replayed(_replace_inner(own, smaller, iter(inner)))
        pairs[regime] = list(islice(inner, regime * ratio))
        smaller = regime
    return pairs


def _replace_inner(pairs: Iterator[Pair], smaller: int, inner: Iterator[Pair]) -> Iterator[Pair]:
    """Pairs, where those of two of the first `smaller` images give way to the next one of `inner`."""
    for pair in pairs:
        yield next(inner) if pair.target < smaller else pair


class _Replayed:
    """An endless iterator that can be read from its start several times."""

    def __init__(self, source: Iterator[Pair]) -> None:
        self._source = source
        self._seen: list[Pair] = []

    def __iter__(self) -> Iterator[Pair]:
        place = 0
        while True:
            if place == len(self._seen):
                self._seen.append(next(self._source))
            yield self._seen[place]
            place += 1
