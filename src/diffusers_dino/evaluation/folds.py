"""Folds of cross-validation that keep patients whole and share out rare labels evenly."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from ..seeds import derive_seed

__all__ = ["assign_folds", "check_fraction", "hold_out"]


def assign_folds(targets: np.ndarray, groups: Sequence[Hashable], num_folds: int = 5, seed: int = 0) -> np.ndarray:
    """The fold of each image: multi-label stratification (Sechidis et al. 2011) of whole groups.

    Groups are placed one by one, those with the label that fewest remaining groups have first, each into the fold
    that lacks most of that label; ties go to the fold that lacks most images, then to a draw. The folds `(N,)` int64
    depend neither on the order of the images nor on that of the labels.

    Args:
        targets: `(N, L)` bool, which image has which label.
        groups: The patient of each image, who is in one fold only; at least as many as folds.
    """
    if num_folds < 2:
        raise ValueError(f"Cross-validation has two folds or more, got {num_folds}.")
    if targets.ndim != 2 or len(targets) != len(groups):
        raise ValueError(f"Expected targets (N, L) of {len(groups)} images, got {targets.shape}.")
    names = sorted(set(groups), key=str)
    if len(names) < num_folds:
        raise ValueError(f"{len(names)} patients cannot be shared out to {num_folds} folds.")
    number = {name: i for i, name in enumerate(names)}
    owner = np.array([number[group] for group in groups])
    # column 0 counts the images of a group, the others those with each label
    counts = np.zeros((len(names), 1 + targets.shape[1]), dtype=np.int64)
    np.add.at(counts, owner, np.column_stack([np.ones(len(targets), np.int64), targets.astype(np.int64)]))
    if targets.shape[1]:
        counts[:, 1:] = counts[:, 1 + np.lexsort(counts[:, 1:])]  # an order that the labels' names have no part in
    order = np.argsort([derive_seed(seed, "folds", str(name)) for name in names])
    fold_of = np.empty(len(names), dtype=np.int64)
    lacking = np.tile(counts.sum(0) / num_folds, (num_folds, 1))  # (folds, 1 + L)
    remaining = list(order)
    while remaining:
        label = _rarest(counts[remaining])
        ready = [group for group in remaining if counts[group, label]]
        ready.sort(key=lambda group: -counts[group, label])  # large ones first; equal ones stay in random order
        for group in ready:
            fold = _neediest(lacking, label, derive_seed(seed, "fold", str(names[group])))
            fold_of[group] = fold
            lacking[fold] -= counts[group]
        remaining = [group for group in remaining if not counts[group, label]]
    return fold_of[owner]


def hold_out(targets: np.ndarray, groups: Sequence[Hashable], fraction: float, seed: int = 0) -> np.ndarray:
    """`(N,)` bool: one of `round(1 / fraction)` parts of the groups (a half for 0.4), stratified as by `assign_folds`.

    `fraction` is in [0, 0.5]; 0 holds none out. The patients whose images choose a classifier's weights, for example.
    """
    check_fraction(fraction)
    if not fraction:
        return np.zeros(len(targets), dtype=bool)
    shares, patients = round(1 / fraction), len(set(groups))
    if patients < shares:
        raise ValueError(
            f"{patients} patients are too few to keep {fraction:g} of them for validation: use a larger "
            "validation_fraction, or 0."
        )
    return assign_folds(targets, groups, shares, seed) == 0


def check_fraction(fraction: float, name: str = "validation_fraction") -> None:
    """ValueError that names an argument unless it is in [0, 0.5]."""
    if not 0 <= fraction <= 0.5:  # written so that a NaN does not pass
        raise ValueError(f"{name} is in [0, 0.5], got {fraction}.")


def _rarest(counts: np.ndarray) -> int:
    """The label that fewest of the groups have, or 0, all images, where none has a label."""
    having = (counts > 0).sum(0)
    labels = [label for label in range(1, counts.shape[1]) if having[label]]
    return min(labels, key=lambda label: having[label], default=0)


def _neediest(lacking: np.ndarray, label: int, draw: int) -> int:
    needs = lacking[:, [label, 0]].tolist()  # lists compare by the first item, then by the second
    best = [fold for fold, need in enumerate(needs) if need == max(needs)]
    return best[draw % len(best)]
