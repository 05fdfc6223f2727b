"""What a fold trains on: nested regimes of real images, and one plan of synthetic images that serves all of them.

The synthetic images of a regime come from its own images only, as those of a user who has no more. Much of what a
small regime needs serves larger ones, too:

- Reconstruction: of each variation of all images of the largest regime, a smaller one takes those of its own images.
- Interpolation: in the random order of a regime's pairs, those between two images of the next smaller regime are taken
  from that regime's order. Both orders are equally random, each pair still comes once before any comes again, and an
  image is sampled once for all regimes that hold it. The images of ratio 1:1 are the first of those of 1:5.
- Prior: regimes share the first, second, ... image of each set of labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice, tee
from typing import Any, NamedTuple

import numpy as np

from ...data.labels import LabelTable
from ...seeds import derive_seed
from ...synthesis import (
    Pair,
    Plan,
    SynthesisError,
    SynthesisSettings,
    plan_interpolation,
    plan_prior,
    plan_reconstruction,
    sample_pairs,
    sample_places,
)
from ..folds import hold_out
from .cells import BALANCED, IDENTICAL, INTERPOLATION, PRIOR, RECONSTRUCTION

__all__ = ["FoldSplit", "RegimePlan", "order_balanced", "plan_regimes", "split_folds"]


class FoldSplit(NamedTuple):
    """The images of one fold, as numbers of rows of a table; no patient is in two of the parts.

    A regime of R images trains on the first R of `ordered`.
    """

    test: np.ndarray
    validation: np.ndarray
    ordered: np.ndarray


def split_folds(
    table: LabelTable,
    labels: Sequence[str],
    folds: np.ndarray,
    regimes: Sequence[int],
    *,
    validation_fraction: float = 0.15,
    seed: int = 0,
) -> list[FoldSplit]:
    """Divide the images of each fold `(N,)` (-1: only trained on) into test, validation and training.

    Validation images are those of a stratified share of the training patients. They are the same in all cells of a
    fold and in none of its regimes: all methods choose among their weights in the same way, and no choice looks at a
    test image. Arguments without a word here are as in `evaluate_augmentation`.
    """
    if not regimes or min(regimes) < 1 or len(set(regimes)) < len(regimes):
        raise ValueError(f"Regimes are different numbers of images, of at least 1, got {list(regimes)}.")
    targets = table.targets(labels)
    parts = []
    for fold in range(int(folds.max()) + 1):
        training = np.flatnonzero(folds != fold)
        patients = [table.patients[row] for row in training.tolist()]
        aside = hold_out(targets[training], patients, validation_fraction, derive_seed(seed, "validation", fold))
        parts.append((np.flatnonzero(folds == fold), training[aside], training[~aside]))
    available = [len(pool) for _, _, pool in parts]
    short = [f"{fold} ({number} images)" for fold, number in enumerate(available) if number < max(regimes)]
    if short:
        raise ValueError(
            f"The regime of {max(regimes)} images is larger than the training data of fold {', '.join(short)}, "
            f"without test and validation patients: use regimes of up to {min(available)} images, or a smaller "
            "validation_fraction."
        )
    splits = []
    for fold, (test, validation, pool) in enumerate(parts):
        keys = [table.keys[row] for row in pool.tolist()]
        order = order_balanced(targets[pool], keys, max(regimes), derive_seed(seed, "regimes", fold))
        splits.append(FoldSplit(test, validation, pool[order]))
    return splits


def order_balanced(targets: np.ndarray, keys: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """Order images so that the first n of them are balanced over labels, for every n: regimes are its beginnings.

    Images with the same combination of labels are interchangeable. Each step takes one of the combination after which
    the numbers of images of all labels have the smallest variance; of equal ones that with most images left. Images
    without any of the labels are balanced like a label of their own. Where a label runs out, or never comes without
    another one, the rest is as even as it can be.

    Takes `(N, L)` bool, and keys, on which the draws within a combination depend, not on the order of the images;
    returns the numbers `(count,)` int64 of `count` images, each once.
    """
    if targets.ndim != 2 or len(targets) != len(keys):
        raise ValueError(f"Expected targets (N, L) of {len(keys)} images, got {targets.shape}.")
    if not 0 <= count <= len(targets):
        raise ValueError(f"{count} images cannot be taken from {len(targets)}.")
    unlabelled = ~targets.any(axis=1, keepdims=True)
    columns = np.concatenate([targets, unlabelled], axis=1) if unlabelled.any() else targets
    kinds, kind_of = np.unique(columns, axis=0, return_inverse=True)  # (K, L'), (N,)
    shuffled = np.array(sorted(range(len(keys)), key=lambda i: derive_seed(seed, "regime", keys[i])), dtype=np.int64)
    waiting = [shuffled[kind_of.reshape(-1)[shuffled] == kind].tolist()[::-1] for kind in range(len(kinds))]
    left = np.array([len(images) for images in waiting])
    counts, order = np.zeros(columns.shape[1], np.int64), []
    for _ in range(count):
        after = counts + kinds  # (K, L')
        spread = np.where(left > 0, after.var(axis=1).round(9), np.inf)
        kind = int(np.lexsort((-left, spread))[0])
        order.append(waiting[kind].pop())
        left[kind] -= 1
        counts += kinds[kind]
    return np.array(order, dtype=np.int64)


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
    names: Sequence[str] = (),
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> RegimePlan:
    """Plan the synthetic images of all regimes at the largest ratio; seed and settings are as in `plan_interpolation`.

    `names` are the labels that come equally often in the strategy `BALANCED`, as far as a regime has them. Keys and
    labels are those of the images of the largest regime; a regime of R images has the first R
    (`order_balanced`). SynthesisError if no two images of a regime share a label.
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
    if strategy in (PRIOR, BALANCED):
        wanted = _nested_labels(labels, regimes, ratio, names if strategy == BALANCED else None, seed)
    elif strategy in (INTERPOLATION, IDENTICAL):
        paired = [{tuple(sorted(own))} if own else () for own in labels] if strategy == IDENTICAL else labels
        wanted = _nested_pairs(paired, sorted(regimes), ratio, seed)
    else:
        raise ValueError(f"No images are made by the strategy {strategy!r}.")
    # an image that several regimes want has one number
    number = {one: place for place, one in enumerate(dict.fromkeys(chain.from_iterable(wanted.values())))}
    options: dict[str, Any] = {"seed": seed, "settings": settings}
    if strategy in (PRIOR, BALANCED):
        plan = plan_prior((), asked=[own for own, _ in number], **options)
    else:
        plan = plan_interpolation(keys, labels, pairs=list(number), **options)
    return RegimePlan(plan, {regime: np.array([number[one] for one in own]) for regime, own in wanted.items()})


def _nested_labels(
    labels: Sequence[Collection[str]], regimes: Sequence[int], ratio: int, names: Sequence[str] | None, seed: int
) -> dict[int, list[tuple[tuple[str, ...], int]]]:
    """What each regime asks a prior for: sets of labels, and the how-many-th image of that set each is."""
    asked = {}
    for regime in sorted(regimes):
        own = labels[:regime]
        there = None if names is None else [name for name in names if any(name in each for each in own)]
        if there == []:
            raise SynthesisError(f"The regime of {regime} images has none of the labels that are to be balanced.")
        places = islice(sample_places(own, there, derive_seed(seed, "regime", regime)), regime * ratio)
        counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
        asked[regime] = []
        for place in places:
            one = tuple(sorted(own[place]))
            asked[regime].append((one, counts[one]))
            counts[one] += 1
    return asked


def _nested_pairs(
    labels: Sequence[Collection[str]], regimes: Sequence[int], ratio: int, seed: int
) -> dict[int, list[Pair]]:
    """The pairs of each regime, regimes ascending; those within a smaller one are its own first ones."""
    pairs: dict[int, list[Pair]] = {}
    smaller, inner = 0, iter(())
    for regime in regimes:
        try:
            own = sample_pairs(labels[:regime], derive_seed(seed, "regime", regime))
        except ValueError as error:
            raise SynthesisError(
                f"The regime of {regime} images cannot be interpolated. {error} Leave it out, or use coarser labels."
            ) from error
        nested, inner = tee(_replace_inner(own, smaller, inner))  # the next larger regime reads them from the start
        pairs[regime] = list(islice(nested, regime * ratio))
        smaller = regime
    return pairs


def _replace_inner(pairs: Iterator[Pair], smaller: int, inner: Iterator[Pair]) -> Iterator[Pair]:
    """Pairs, where those between two of the first `smaller` images give way to the next one of `inner`."""
    for pair in pairs:
        yield next(inner) if pair.target < smaller else pair
