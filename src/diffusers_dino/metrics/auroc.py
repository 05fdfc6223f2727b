"""Multi-label classification, scored: the area under the ROC curve of each label, and their mean.

A label that all images have, or none, has no ROC curve. It is left out of the mean of that set of images, with a
warning that names it: every method loses the same label on the same images, so methods stay comparable, and hours of
training are not lost to a rare label. Where no label has both classes there is nothing to score: that is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from .comparison import auroc_draws

__all__ = ["SingleClassError", "check_classes", "label_auroc", "macro_auroc"]

logger = logging.getLogger(__name__)


class SingleClassError(ValueError):
    """No label has images of both classes. The message names what there is."""


def label_auroc(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AUROC of each label: `(N, L)` probabilities and bool targets give `(L,)` in [0, 1], NaN for a single class.

    Raises:
        ValueError: If shapes do not fit or a probability is not finite.
    """
    return auroc_draws(probabilities, targets)[0]


def macro_auroc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean AUROC of `(N, L)` probabilities over the labels with both classes; NaN if there is none."""
    per_label = label_auroc(probabilities, targets)
    return float(np.nanmean(per_label)) if np.isfinite(per_label).any() else float("nan")


def check_classes(targets: np.ndarray, labels: Sequence[str], where: str) -> tuple[str, ...]:
    """Warn of labels with a single class, before hours are spent on what cannot be scored.

    Args:
        targets: `(N, L)` bool.
        labels: Names of the L labels.
        where: What the images are called in messages, such as `"fold 3"`.

    Returns:
        The labels that all of the images have, or none: those that macro AUROC leaves out.

    Raises:
        SingleClassError: If no label has both classes.
        ValueError: If shapes do not fit.
    """
    if targets.ndim != 2 or targets.shape[1] != len(labels):
        raise ValueError(f"Expected targets (N, {len(labels)}) of {', '.join(labels)}, got {targets.shape}.")
    mixed = targets.any(axis=0) & ~targets.all(axis=0)
    left_out = tuple(name for name, both in zip(labels, mixed, strict=True) if not both)
    if len(left_out) == len(labels):
        raise SingleClassError(
            f"No label of {', '.join(labels)} has both positive and negative images among the {len(targets)} of "
            f"{where}: use fewer folds or more frequent labels."
        )
    if left_out:
        logger.warning(
            "%d of %d labels have a single class among the %d images of %s and are left out of its macro AUROC: %s.",
            len(left_out),
            len(labels),
            len(targets),
            where,
            ", ".join(left_out),
        )
    return left_out
