"""Multi-label classifiers, scored and compared: the area under the ROC curve (AUROC) of each label.

A label that all images have, or none, has no ROC curve. It is left out of the mean of that set of images, with a
warning that names it: every method loses the same label on the same images, so methods stay comparable, and hours of
training are not lost to a rare label. Where no label has both classes there is nothing to score: that is an error.

The figure of a cross-validation is the mean over folds of each fold's AUROC. Predictions of several folds are not
pooled: each fold has a classifier of its own, whose scores are on a scale of their own, and pooling them biases an
AUROC downwards (Parker et al. 2007, BMC Bioinformatics 8:326).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ..extras import require
from ..seeds import derive_seed
from .bootstrap import LEVEL, resamples

__all__ = [
    "FoldTest",
    "auroc_draws",
    "check_classes",
    "corrected_t_test",
    "draw_weights",
    "holm",
    "label_auroc",
    "macro_auroc",
    "mean_of_defined",
    "stratified_auroc",
    "with_mean",
]

logger = logging.getLogger(__name__)
_CHUNK = 1 << 21  # weights at once


def label_auroc(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AUROC of each label: `(N, L)` probabilities and bool targets give `(L,)` in [0, 1], NaN for a single class."""
    return auroc_draws(probabilities, targets)[0]


def macro_auroc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean AUROC of `(N, L)` probabilities over the labels with both classes; NaN if there is none."""
    return float(mean_of_defined(label_auroc(probabilities, targets), axis=0))


def mean_of_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        return np.nanmean(values, axis=axis)


def with_mean(values: np.ndarray) -> np.ndarray:
    """Figures of labels `(R, L)` with the mean of those that are defined before them: `(R, 1 + L)`."""
    return np.concatenate([mean_of_defined(values, axis=1)[:, None], values], axis=1)


def check_classes(targets: np.ndarray, labels: Sequence[str], where: str) -> tuple[str, ...]:
    """Warn of labels that all of the images have, or none, and return them: macro AUROC leaves them out.

    `targets` are `(N, L)` bool; `where` names the images in messages, such as `"fold 3"`. ValueError if no label
    has both classes, ValueError if shapes do not fit.
    """
    if targets.ndim != 2 or targets.shape[1] != len(labels):
        raise ValueError(f"Expected targets (N, {len(labels)}) of {', '.join(labels)}, got {targets.shape}.")
    mixed = targets.any(axis=0) & ~targets.all(axis=0)
    left_out = tuple(name for name, both in zip(labels, mixed, strict=True) if not both)
    if len(left_out) == len(labels):
        raise ValueError(
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


class FoldTest(NamedTuple):
    """The mean difference over folds, its 95 % interval, and the two-sided p of 0, not corrected for other tests."""

    mean: float
    low: float
    high: float
    p: float


def auroc_draws(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve of each label, for many weightings of the same images at once.

    It is the weighted share of pairs of a positive and a negative image in which the positive one has the higher
    score, ties counting half (Hanley & McNeil 1982).

    Takes scores `(N, L)`, targets `(N, L)` bool, and weights `(R, N)`, how often each image was drawn in each of R
    draws; None is one draw of all. Returns `(R, L)` float64, NaN where a draw lacks positive or negative images of a
    label. ValueError if the shapes do not fit, or a score is not finite.
    """
    if scores.ndim != 2 or scores.shape != targets.shape or targets.dtype != bool:
        raise ValueError(
            f"Expected scores (N, L) and boolean targets of their shape, got {scores.shape} and {targets.shape} "
            f"{targets.dtype}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are NaN or infinite.")
    weights = np.ones((1, len(scores))) if weights is None else weights
    if weights.ndim != 2 or weights.shape[1] != len(scores):
        raise ValueError(f"Expected weights (R, {len(scores)}), got {weights.shape}.")
    size, figures = max(1, _CHUNK // max(1, len(scores))), []
    for start in range(0, len(weights), size):
        chunk = np.ascontiguousarray(weights[start : start + size].T, dtype=np.float64)  # (N, draws)
        figures.append([_auroc(*label, chunk) for label in zip(scores.T, targets.T, strict=True)])
    return np.concatenate([np.stack(columns, axis=1) for columns in figures])


def stratified_auroc(
    scores: np.ndarray, targets: np.ndarray, strata: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUROC of each label where only images of one stratum are compared, such as those that one classifier scored.

    It is the weighted share of such pairs in which the positive image has the higher score: each stratum counts by
    its number of pairs, and one with a single class not at all.

    `strata` are `(N,)`, any integers; the other arguments, the result and errors are those of `auroc_draws`. A label
    is NaN where no stratum has a pair.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    wins, total = np.zeros((2, len(weights), scores.shape[1]))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        own, chosen = weights[:, rows], targets[rows]
        positive, negative = (_sums(own, kind) for kind in (chosen, ~chosen))
        pairs = positive * negative  # (R, L)
        wins += np.nan_to_num(auroc_draws(scores[rows], chosen, own)) * pairs
        total += pairs
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, wins / total, np.nan)


def draw_weights(
    patients: Sequence[Hashable], folds: Sequence[Hashable], repeats: int = 1000, seed: int = 0
) -> np.ndarray:
    """How often each image is drawn when patients are, with replacement and within their fold.

    The number of patients in each fold is kept, because each fold's classifier is a different one. `patients` and
    `folds` are those of N images; the result is `(repeats, N)` uint16. The draws of a fold depend only on the seed,
    the fold and its patients. ValueError if the lengths differ or a fold has fewer than two patients.
    """
    if len(patients) != len(folds):
        raise ValueError(f"Each image has a patient and a fold, got {len(patients)} and {len(folds)}.")
    owner, folds = np.asarray(patients), np.asarray(folds)
    weights = np.empty((repeats, len(folds)), dtype=np.uint16)
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        draws = resamples(len(rows), owner[rows], repeats, derive_seed(seed, "fold", str(fold)))
        for number, drawn in enumerate(draws):
            weights[number, rows] = np.bincount(drawn, minlength=len(rows))
    return weights


def corrected_t_test(differences: Sequence[float], num_folds: int) -> FoldTest:
    r"""Whether a difference over the runs of a (repeated) cross-validation is zero (Nadeau & Bengio 2003).

    Runs share training images, so their differences are correlated and a plain paired t test finds too much. The
    variance of the mean of J of them is taken as

    .. math:: \left(\frac{1}{J} + \frac{n_\text{test}}{n_\text{train}}\right) s^2, \qquad
              \frac{n_\text{test}}{n_\text{train}} = \frac{1}{K - 1}

    for K folds, with J - 1 degrees of freedom; J may be a multiple of K (Bouckaert & Frank 2004).

    Args:
        differences: J of them, one for each run.
        num_folds: K, how many folds the data was cut into, which is more than J where runs are missing.

    ImportError without scipy; ValueError with fewer than two differences or folds, or one that is not finite.
    """
    t = require("scipy.stats", "eval", "Tests of significance need scipy").t
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or num_folds < 2:
        raise ValueError(f"A test over folds needs two of them or more, got {values.shape} of {num_folds} folds.")
    if not np.isfinite(values).all():
        raise ValueError(f"Differences must be finite, got {values.tolist()}.")
    mean = float(values.mean())
    error = float(np.sqrt((1 / len(values) + 1 / (num_folds - 1)) * values.var(ddof=1)))
    if error == 0:  # all differences are one number
        return FoldTest(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, len(values) - 1))
    return FoldTest(mean, mean - reach, mean + reach, p)


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """p values corrected for there being several, so that the chance of any false finding is bounded (Holm 1979).

    It needs no assumption of how the tests depend on each other. `p_values` are those of the whole family. None is a
    test that is planned and has not been made: it counts as one, so that what is significant in a part of a table
    stays so in the whole, and None comes back for it. ValueError if a value is not in [0, 1].
    """
    if any(p is not None and not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p values are in [0, 1], got {list(p_values)}.")
    corrected: list[float | None] = [None] * len(p_values)
    known = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return tuple(corrected)


def _sums(weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Weight of the chosen images: `(R, n)` and `(n, L)` give `(R, L)` float64; counts to 2^24 are exact."""
    return (weights.astype(np.float32) @ chosen.astype(np.float32)).astype(np.float64)


def _auroc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One label's: `(N,)`, `(N,)` and `(N, R)` give `(R,)`."""
    positive, negative = np.flatnonzero(targets), np.flatnonzero(~targets)
    negative = negative[np.argsort(scores[negative])]
    below = np.zeros((len(negative) + 1, weights.shape[1]))  # weight of the first k negative images
    np.cumsum(weights[negative], axis=0, out=below[1:])
    first, last = (np.searchsorted(scores[negative], scores[positive], side) for side in ("left", "right"))
    wins = (weights[positive] * (below[first] + below[last])).sum(axis=0) / 2  # half of what is tied
    pairs = below[-1] * weights[positive].sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(pairs > 0, wins / pairs, np.nan)
