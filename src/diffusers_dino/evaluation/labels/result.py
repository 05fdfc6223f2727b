"""Figures of label preservation: what judges say about synthetic images, and what to compare it with.

Only images that one judge has scored are compared. Beside each figure stand those of the same judges on the real
images that the labels were taken from (what a perfect generator would reach), and with shuffled labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...metrics.auroc import draw_weights, stratified_auroc, with_mean
from ...metrics.bootstrap import percentile_interval
from ...seeds import derive_seed
from ..results import JsonResult

__all__ = ["Agreement", "JudgedSet", "LabelPreservationResult", "Part", "RealScores", "score_real", "score_sets"]

NEARNESS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # edges of the bins of |fraction - 0.5|
_SHUFFLES = 200
_ARRAYS = ("judges", "fractions", "rounds", "targets", "synthetic", "sources")


@dataclass(frozen=True)
class JudgedSet:
    """What judges say about N synthetic images and about their sources.

    Attributes:
        judges: `(N,)` int64, the number of the classifier that judged each.
        patients: Of the source whose label each has; without sources, each image is one of its own.
        fractions: `(N,)` float64, as in the plan.
        rounds: `(N,)` float64, number of the image in its plan, from 1, over the number of the plan's sources: the
            images of ratio 1:r are those of at most r.
        targets: `(N, L)` bool, labels that they were given.
        synthetic, sources: `(N, L)` float32 probabilities of the images, and of the sources whose labels they have,
            if there are any.
    """

    strategy: str
    judges: np.ndarray
    patients: tuple[str, ...]
    fractions: np.ndarray
    rounds: np.ndarray
    targets: np.ndarray
    synthetic: np.ndarray
    sources: np.ndarray | None

    def __post_init__(self) -> None:
        lengths = {len(self.patients), *(len(getattr(self, name)) for name in self.arrays)}
        shapes = {array.shape for array in (self.targets, *self.scores.values())}
        if len(lengths) != 1 or len(shapes) != 1 or not len(self.patients):
            raise ValueError(f"Expected as many of everything and at least one, got {lengths} images, {shapes}.")
        for name, values in self.scores.items():
            if not ((values >= 0) & (values <= 1)).all():  # written so that a NaN does not pass
                raise ValueError(f"Not all probabilities of {name} images are in [0, 1]; did training diverge?")

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that it has."""
        return _ARRAYS if self.sources is not None else _ARRAYS[:-1]

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Probabilities `(N, L)` of the images and, if there are any, of their sources."""
        return {name: getattr(self, name) for name in ("synthetic", "sources") if name in self.arrays}

    def select(self, rows: np.ndarray) -> JudgedSet:
        """Some of the images: `(n,)` int64."""
        chosen = {name: getattr(self, name)[rows] for name in self.arrays}
        return replace(self, patients=tuple(self.patients[row] for row in rows.tolist()), **chosen)


@dataclass(frozen=True)
class Agreement:
    """AUROC of the given labels, of one label or the mean over labels. All None where there is no pair to compare.

    Attributes:
        label: Its name, or `macro`.
        num_positive: Images that have it; for `macro`, labels that have a figure.
        synthetic, synthetic_low, synthetic_high: Of the synthetic images, with a 95 % interval over patients.
        sources, sources_low, sources_high: Of their sources; None for a prior's images, which have none.
        difference, difference_low, difference_high: Synthetic minus sources; None without sources.
        shuffled_low, shuffled_high: The middle 95 % of shuffles of the labels.
    """

    label: str
    num_positive: int
    synthetic: float | None
    synthetic_low: float | None
    synthetic_high: float | None
    sources: float | None
    sources_low: float | None
    sources_high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    shuffled_low: float | None
    shuffled_high: float | None

    def bounded(self, kind: str) -> tuple[float | None, float | None, float | None]:
        """The figure of `"synthetic"`, `"sources"` or their `"difference"`, and its interval."""
        return tuple(getattr(self, f"{kind}{end}") for end in ("", "_low", "_high"))


@dataclass(frozen=True)
class Part:
    """Some of the images of a set.

    Attributes:
        name, strategy: Of the set.
        ratio: Synthetic images for each source, counted from the beginning of the plan; 0 without sources.
        near, far: Bounds of |fraction - 0.5|, 0 in the middle between two sources and 0.5 at one; None for all.
        num_images, num_patients: Synthetic images, and patients of the sources whose labels they have; 0 without.
        macro, labels: Mean over labels, and each label.
    """

    name: str
    strategy: str
    ratio: float
    near: float | None
    far: float | None
    num_images: int
    num_patients: int
    macro: Agreement
    labels: tuple[Agreement, ...]


@dataclass(frozen=True)
class RealScores:
    """How good the judges are: AUROC of real images that they have not seen, with a 95 % interval over patients."""

    label: str
    num_positive: int
    auroc: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LabelPreservationResult(JsonResult):
    """All figures of the report.

    Attributes:
        model: Name of the judges' architecture.
        num_real, num_real_patients: Real images that judges are trained and tested on, and their patients.
        judges_seed: Of folds and training.
        seed, repeats: Of bootstrap and shuffles; draws of the bootstrap.
        real: Of held-out real images: macro first, then each label.
        parts: Of each set first the whole, then smaller ratios and bins of the fraction.
    """

    labels: tuple[str, ...]
    num_folds: int
    num_real: int
    num_real_patients: int
    model: str
    judges_seed: int
    seed: int
    repeats: int
    real: tuple[RealScores, ...]
    parts: tuple[Part, ...]

    @property
    def judges_see(self) -> bool:
        """Whether the judges tell the labels of real images: better than by chance, with the whole interval."""
        low = self.real[0].low
        return low is not None and low > 0.5

    @property
    def wholes(self) -> tuple[Part, ...]:
        """The whole of each set."""
        return tuple({part.name: part for part in reversed(self.parts)}.values())[::-1]


def score_sets(
    sets: Mapping[str, Sequence[JudgedSet]],
    labels: Sequence[str],
    *,
    ratios: Sequence[int] = (),
    repeats: int = 1000,
    seed: int = 0,
) -> tuple[Part, ...]:
    """Score sets by name; the parts of one, such as those of several folds, are taken together."""
    parts = []
    for name, members in sets.items():
        whole = _join(name, members, labels)
        size = 0 if whole.sources is None else max(0.1, round(whole.rounds.max(), 1))
        smaller = [ratio for ratio in sorted(set(ratios)) if ratio < size]
        chosen = [(size, None, whole.rounds >= 0), *((ratio, None, whole.rounds <= ratio) for ratio in smaller)]
        if whole.strategy == "interpolation":
            distance = np.abs(whole.fractions - 0.5)
            for near, far in itertools.pairwise(NEARNESS):
                inside = (distance >= near) & ((distance < far) | (far == NEARNESS[-1]))
                chosen.append((size, (near, far), inside))
        for ratio, bounds, inside in chosen:
            if inside.any():
                images = whole.select(np.flatnonzero(inside))
                parts.append(_part(name, images, labels, ratio, bounds or (None, None), repeats, seed))
    return tuple(parts)


def score_real(
    probabilities: np.ndarray,
    targets: np.ndarray,
    judges: np.ndarray,
    images: np.ndarray,
    patients: Sequence[str],
    labels: Sequence[str],
    *,
    repeats: int = 1000,
    seed: int = 0,
) -> tuple[RealScores, ...]:
    """AUROC of held-out real images, which several judges may have scored.

    Probabilities, targets `(N, L)` and patients have a row for each judge and image, whose numbers `(N,)` int64 are
    `judges` and `images`: each image is counted once.
    """
    weights = draw_weights(patients, np.zeros(len(patients), int), repeats, seed)
    figures = with_mean(stratified_auroc(probabilities, targets, judges))[0]
    draws = with_mean(stratified_auroc(probabilities, targets, judges, weights))
    _, once = np.unique(images, return_index=True)
    counts = _counts(targets[once], figures)
    return tuple(
        RealScores(name, number, _number(value), *_interval(column))
        for name, number, value, column in zip(("macro", *labels), counts, figures, draws.T, strict=True)
    )


def _join(name: str, members: Sequence[JudgedSet], labels: Sequence[str]) -> JudgedSet:
    strategies = {one.strategy for one in members}
    if len(strategies) != 1:
        raise ValueError(f"The set {name!r} must have parts of one strategy, got {sorted(strategies) or 'none'}.")
    if any(one.targets.shape[1] != len(labels) for one in members):
        raise ValueError(f"The set {name!r} does not have the {len(labels)} labels {', '.join(labels)}.")
    joined: dict[str, np.ndarray | None] = dict.fromkeys(_ARRAYS)
    joined |= {field: np.concatenate([getattr(one, field) for one in members]) for field in members[0].arrays}
    return JudgedSet(strategies.pop(), patients=tuple(p for one in members for p in one.patients), **joined)


def _part(
    name: str,
    images: JudgedSet,
    labels: Sequence[str],
    ratio: float,
    bounds: tuple[float | None, float | None],
    repeats: int,
    seed: int,
) -> Part:
    scores = images.scores
    figures = {kind: with_mean(stratified_auroc(s, images.targets, images.judges))[0] for kind, s in scores.items()}
    draws: dict[str, np.ndarray] = {}
    if len(set(images.patients)) > 1:  # else there is nobody to draw
        weights = draw_weights(images.patients, np.zeros(len(images.patients), int), repeats, seed)
        for kind, s in scores.items():
            draws[kind] = with_mean(stratified_auroc(s, images.targets, images.judges, weights))
    for values in (figures, draws):
        if "sources" in values:
            values["difference"] = values["synthetic"] - values["sources"]
    shuffled = with_mean(_shuffle(images, derive_seed(seed, "shuffles")))
    agreements = []
    counts = _counts(images.targets, figures["synthetic"])
    for place, (label, number) in enumerate(zip(("macro", *labels), counts, strict=True)):
        row: list[float | None] = []
        for kind in ("synthetic", "sources", "difference"):
            value = _number(figures[kind][place]) if kind in figures else None
            row += [value, *_interval(draws[kind][:, place] if kind in draws else None)]
        agreements.append(Agreement(label, number, *row, *_interval(shuffled[:, place])))
    patients = 0 if images.sources is None else len(set(images.patients))
    return Part(
        name, images.strategy, ratio, *bounds, len(images.patients), patients, agreements[0], (*agreements[1:],)
    )


def _shuffle(images: JudgedSet, seed: int) -> np.ndarray:
    """`(shuffles, L)` AUROC of the labels of other images of the same judge."""
    random, figures = np.random.default_rng(seed), []
    members = [np.flatnonzero(images.judges == judge) for judge in np.unique(images.judges)]
    for _ in range(_SHUFFLES):
        targets = images.targets.copy()
        for rows in members:
            targets[rows] = targets[random.permutation(rows)]
        figures.append(stratified_auroc(images.synthetic, targets, images.judges)[0])
    return np.array(figures)


def _counts(targets: np.ndarray, figures: np.ndarray) -> list[int]:
    return [int(np.isfinite(figures[1:]).sum()), *targets.sum(axis=0).tolist()]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(draws: np.ndarray | None) -> tuple[float | None, float | None]:
    """None where a figure is not defined on most of the draws."""
    if draws is None or 2 * np.isfinite(draws).sum() < len(draws):
        return None, None
    return tuple(percentile_interval(draws))
