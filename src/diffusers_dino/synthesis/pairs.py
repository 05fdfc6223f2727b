"""Which images to interpolate between, how the result is labelled, and which labels to draw images of."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..seeds import derive_seed

__all__ = ["Pair", "check_exponent", "interpolated_labels", "permute", "sample_pairs", "sample_places", "soft_labels"]

_ROUNDS = 6  # of the Feistel network; four make it a pseudo-random permutation (Luby & Rackoff 1988)
_CHUNK = 4096  # candidates at once
_GOLDEN = (math.sqrt(5) - 1) / 2


class Pair(NamedTuple):
    """A point between two images: a `fraction` in (0, 1) of the way from index `source` to the larger `target`."""

    source: int
    target: int
    fraction: float


def interpolated_labels(
    source: Collection[Hashable], target: Collection[Hashable], fraction: float
) -> frozenset[Hashable]:
    """Labels of an image between two: those of the nearer one; at a fraction of 0.5 the source counts as nearer.

    The rule is that of DiNO-Diffusion, section 2.4.

    Raises:
        ValueError: If the two do not share a label, or the fraction is outside [0, 1].
    """
    _check_ends(source, target, fraction)
    return frozenset(source if fraction <= 0.5 else target)


def soft_labels(
    source: Collection[str], target: Collection[str], fraction: float, exponent: float = 1.0
) -> dict[str, float]:
    """Probabilities `(1 - r^g) y1 + r^g y2` of the labels of an image at a fraction r between two, by name.

    A label of both has 1, one of neither is left out. The rule is Diff-Mix's (arXiv 2403.19600); with an exponent g of
    1 it is mixup's (arXiv 1710.09412): labels are mixed as the condition tokens are.

    Raises:
        ValueError: If the two do not share a label, the fraction is outside [0, 1], or the exponent is not positive.
    """
    _check_ends(source, target, fraction)
    check_exponent(exponent)
    weight = fraction**exponent
    given = {}
    for name in sorted({*source, *target}):
        given[name] = 1.0 if name in source and name in target else weight if name in target else 1 - weight
    return given


def check_exponent(exponent: float) -> None:
    """ValueError unless an exponent of soft labels is a positive number."""
    if not 0 < exponent < math.inf:  # written so that a NaN does not pass
        raise ValueError(f"The exponent of soft labels must be a positive number, got {exponent}.")


def _check_ends(source: Collection[Hashable], target: Collection[Hashable], fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"The fraction must be in [0, 1], got {fraction}.")
    if not set(source) & set(target):
        raise ValueError(
            f"Images that share no label are not interpolated, got {sorted(map(str, source))} and "
            f"{sorted(map(str, target))}."
        )


def sample_places(
    labels: Sequence[Collection[str]], balanced: Sequence[str] | None = None, seed: int = 0
) -> Iterator[int]:
    """Numbers of images whose labels a prior is asked for, without end; take as many as you need.

    Each image comes once, in random order, before any comes again. Of `balanced` labels each comes equally often: they
    take turns, each with the images that have it. A longer sequence begins with the same numbers.

    Raises:
        ValueError: If there is no image, or none has one of the balanced labels.
    """
    pools = [range(len(labels))]
    if balanced is not None:
        pools = [[place for place, own in enumerate(labels) if name in own] for name in balanced]
        if absent := [name for name, pool in zip(balanced, pools, strict=True) if not pool]:
            raise ValueError(f"No image has the label {', '.join(map(repr, absent))}, which is to come equally often.")
    if not pools or not len(pools[0]):
        raise ValueError("There are no labels to draw images of.")
    return (_in_turn(pools, index, seed) for index in itertools.count())


def _in_turn(pools: Sequence[Sequence[int]], index: int, seed: int) -> int:
    """The member that image `index` takes where pools take turns, each with its members in random order."""
    turn, number = divmod(index, len(pools))
    pool = pools[number]
    round_, rank = divmod(turn, len(pool))
    return pool[int(permute(np.array([rank]), len(pool), derive_seed(seed, "labels", number, round_))[0])]


def sample_pairs(labels: Sequence[Collection[Hashable]], seed: int = 0) -> Iterator[Pair]:
    """Draw pairs of images that share a label, without end; take as many as you need with `itertools.islice`.

    All such pairs come once, in random order, before any comes again, each time with another fraction. The fractions
    of a pair spread evenly over (0, 1) (Weyl's sequence). The sequence depends only on the labels and the seed, and a
    longer one begins with the same pairs.

    Neither memory nor start-up grows with the number of pairs: 100,000 images have five thousand million of them.

    Args:
        labels: Of each image, in any order; an image without labels is not in any pair.
        seed: Of order and fractions.

    Raises:
        ValueError: If no two images share a label.
    """
    members = _members(labels)
    sizes = np.array([len(images) * (len(images) - 1) // 2 for images in members], dtype=np.int64)
    ends = np.cumsum(sizes)  # the pairs within a label are numbered from the end of the label before
    if not len(ends) or not ends[-1]:
        raise ValueError("No two images share a label, so there is no pair to interpolate between.")
    return _rounds(members, ends, sizes, seed)


def _rounds(members: list[np.ndarray], ends: np.ndarray, sizes: np.ndarray, seed: int) -> Iterator[Pair]:
    having = defaultdict(set)  # numbers of each image's labels
    for number, images in enumerate(members):
        for image in images.tolist():
            having[image].add(number)
    total, round_ = int(ends[-1]), 0
    while True:
        for first in range(0, total, _CHUNK):
            ranks = permute(np.arange(first, min(first + _CHUNK, total)), total, derive_seed(seed, "pairs", round_))
            numbers = np.searchsorted(ends, ranks, side="right")  # of the label that each pair is counted under
            lower, upper = _unrank(ranks - (ends - sizes)[numbers])
            for label, i, j in zip(numbers.tolist(), lower.tolist(), upper.tolist(), strict=True):
                source, target = int(members[label][i]), int(members[label][j])
                # a pair that shares several labels is counted under each of them, and drawn only under the first
                if min(having[source] & having[target]) == label:
                    start = derive_seed(seed, "fraction", source, target) / 2**63
                    fraction = (start + round_ * _GOLDEN) % 1
                    yield Pair(source, target, min(max(fraction, 1e-6), 1 - 1e-6))  # not the images themselves
        round_ += 1


def _members(labels: Sequence[Collection[Hashable]]) -> list[np.ndarray]:
    """Of each label, the images that have it, ascending."""
    members: dict[Hashable, list[int]] = {}
    for image, own in enumerate(labels):
        if isinstance(own, str):
            raise ValueError(f"The labels of an image are a collection, got {own!r} for image {image}.")
        for label in sorted(set(own), key=str):
            members.setdefault(label, []).append(image)
    return [np.array(images, dtype=np.int64) for _, images in sorted(members.items(), key=lambda item: str(item[0]))]


def _unrank(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair `i < j` that is number `j (j - 1) / 2 + i`."""
    upper = ((1 + np.sqrt(1 + 8 * ranks.astype(np.float64))) // 2).astype(np.int64)
    upper -= upper * (upper - 1) // 2 > ranks  # the root may be rounded up, or down, by one
    upper += (upper + 1) * upper // 2 <= ranks
    return ranks - upper * (upper - 1) // 2, upper


def permute(numbers: np.ndarray, total: int, key: int) -> np.ndarray:
    """Where numbers `(n,)` in [0, total) go in the pseudo-random permutation of this key, as `(n,)` int64.

    The others are not computed. A Feistel network permutes a power of four of at least `total`; what falls outside
    goes round again until it falls inside (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64(max(1, (max(total - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values, outside = numbers.astype(np.uint64), np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_hash(right, derive_seed(key, round_)) & mask)
        values[outside] = left << half | right
        outside = values >= total
    return values.astype(np.int64)


def _hash(values: np.ndarray, key: int) -> np.ndarray:
    """Mix 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = values + np.uint64(key)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
