"""Small sets of real images, each a part of the next larger one, with labels as balanced as the data allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...seeds import derive_seed

__all__ = ["check_regimes", "order_balanced"]


def order_balanced(targets: np.ndarray, keys: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """Order images so that the first n of them are balanced over labels, for every n: regimes are its beginnings.

    Images with one combination of labels are alike. Each step takes one of the combination after which the numbers of
    images of all labels have the smallest variance; of equal ones that with most images left. Images without any of
    the labels are balanced like a label of their own. Where a label runs out, or comes with another one alone, the
    rest is as even as it can be.

    Args:
        targets: `(N, L)` bool.
        keys: Of the N images; what is drawn depends on keys, not on the order of the images.
        count: How many images to order, at most N.
        seed: Of the draws within a combination.

    Returns:
        `(count,)` int64, numbers of images, each once.

    Raises:
        ValueError: If there are fewer images than `count`, or the lengths differ.
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


def check_regimes(regimes: Sequence[int], available: Sequence[int]) -> None:
    """Refuse regimes that a fold has too few training images for.

    Args:
        regimes: Numbers of real images.
        available: Training images of each fold, those for validation aside.

    Raises:
        ValueError: If a regime is no positive number, comes twice, or is larger than a fold's training data.
    """
    if not regimes or min(regimes) < 1 or len(set(regimes)) < len(regimes):
        raise ValueError(f"Regimes are different numbers of images, of at least 1, got {list(regimes)}.")
    short = [fold for fold, number in enumerate(available) if number < max(regimes)]
    if short:
        raise ValueError(
            f"The regime of {max(regimes)} images is larger than the training data of fold "
            f"{', '.join(f'{fold} ({available[fold]} images)' for fold in short)}, test and validation patients "
            f"aside: use regimes of up to {min(available)} images, or a smaller validation_fraction."
        )
