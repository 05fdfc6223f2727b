"""Table 1 of the paper from the cells of a grid: is training with synthetic images better than with only real ones?

Every configuration (strategy, mode, ratio) is compared with the real-only baseline of its regime, on the same test
images, fold by fold. docs/augmentation.md says why by these tests, intervals and corrections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...metrics.auroc import auroc_draws, corrected_t_test, draw_weights, holm, mean_of_defined
from ...metrics.bootstrap import percentile_interval
from ..results import JsonResult
from .cells import CellResult, CellSpec, order_of

__all__ = ["AugmentationResult", "Configuration", "Difference", "LabelFigures", "summarise"]


@dataclass(frozen=True)
class Difference:
    """AUROC of a configuration minus that of the baseline of its regime: mean over folds.

    Attributes:
        low, high, p: 95 % interval and two-sided p by the corrected t test over folds: for other training runs.
        corrected_p: For all tests of its family.
        patients_low, patients_high: 95 % bootstrap interval over patients: for these very classifiers.
    """

    mean: float
    low: float
    high: float
    p: float
    corrected_p: float
    patients_low: float
    patients_high: float


@dataclass(frozen=True)
class LabelFigures:
    """AUROC of one label.

    Attributes:
        num_positive: Test images that have it, of all folds.
        folds: AUROC of each finished fold; None where the fold's images all have it, or none has.
        mean: Over the folds that have one; None if the configuration is unfinished or there is none.
        difference: To the baseline; None for the baseline, and where fewer than two folds have a figure.
    """

    label: str
    num_positive: int
    folds: tuple[float | None, ...]
    mean: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Configuration:
    """A strategy, mode and ratio in one regime.

    Attributes:
        strategy, mode, ratio, regime: As in `CellSpec`.
        folds, macro: Folds that are finished, and the macro AUROC of each.
        num_images, num_patients: Test images in them, and their patients.
        mean, sd: Over folds; None while a fold is missing, as are all below.
        patients_low, patients_high: 95 % bootstrap interval of the mean over patients.
        difference: To the baseline; None for the baseline itself, and while that is unfinished.
        labels: Of each label.
    """

    strategy: str
    mode: str
    ratio: int
    regime: int
    folds: tuple[int, ...]
    num_images: int
    num_patients: int
    macro: tuple[float, ...]
    mean: float | None
    sd: float | None
    patients_low: float | None
    patients_high: float | None
    difference: Difference | None
    labels: tuple[LabelFigures, ...]

    @property
    def is_baseline(self) -> bool:
        """Whether it was trained on real images only."""
        return self.ratio == 0


@dataclass(frozen=True)
class AugmentationResult(JsonResult):
    """All figures of a grid.

    Attributes:
        labels, num_folds, model: Names of the labels, number of folds, and name of the classifier.
        num_images, num_patients: Test images of all folds that any cell has tested, and their patients.
        experiment_seed, settings: Seed of the experiment, and digest of its settings.
        seed, repeats: Of the bootstrap.
        num_tests: Configurations that p values are corrected for.
        undefined: Labels that have no AUROC in a fold, as `LABEL in fold K`; left out of that fold's macro AUROC.
        configurations: Of each regime the baseline, then the others; the largest regime first.
    """

    labels: tuple[str, ...]
    num_folds: int
    num_images: int
    num_patients: int
    model: str
    experiment_seed: int
    settings: str
    seed: int
    repeats: int
    num_tests: int
    undefined: tuple[str, ...]
    configurations: tuple[Configuration, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the cells that are not there."""
        return tuple(
            CellSpec(one.strategy, one.mode, one.ratio, one.regime, fold).name
            for one in self.configurations
            for fold in range(self.num_folds)
            if fold not in one.folds
        )


def summarise(
    cells: Sequence[CellResult], planned: Sequence[CellSpec], *, repeats: int = 1000, seed: int = 0
) -> AugmentationResult:
    """Compare all configurations of a planned grid with the real-only baselines."""
    finished = _check(cells)
    strays = set(finished) - set(planned)
    if strays:
        raise ValueError(f"{len(strays)} cells are not in the grid that was planned, such as {min(strays).name}.")
    num_folds = 1 + max(spec.fold for spec in planned)
    # any cell of each fold: its images, patients and targets are those of all
    tests = {cell.spec.fold: cell for cell in sorted(finished.values(), key=lambda cell: cell.spec.fold)}
    weights = {fold: draw_weights(t.patients, [fold] * len(t.keys), repeats, seed) for fold, t in tests.items()}
    undefined = tuple(f"{label} in fold {fold}" for fold, test in tests.items() for label in _undefined(test))
    rows: list[Configuration] = []
    for regime in sorted({spec.regime for spec in planned}, reverse=True):
        baseline = None
        kinds = {_kind(spec) for spec in planned if spec.regime == regime}
        # the baseline first, then by ratio, mode and strategy
        for kind in sorted(kinds, key=lambda kind: (kind[2], kind[1], order_of(kind[0]))):
            found = {fold: finished.get(CellSpec(*kind, regime, fold)) for fold in range(num_folds)}
            own = _figures({fold: cell for fold, cell in found.items() if cell is not None}, weights, num_folds)
            baseline = own if kind[2] == 0 else baseline
            rows.append(_configuration(kind, regime, own, baseline, tests))
    return AugmentationResult(
        labels=cells[0].labels,
        num_folds=num_folds,
        num_images=sum(len(test.keys) for test in tests.values()),
        num_patients=sum(len(set(test.patients)) for test in tests.values()),
        model=cells[0].facts.model,
        experiment_seed=cells[0].facts.seed,
        settings=cells[0].facts.settings,
        seed=seed,
        repeats=repeats,
        num_tests=sum(not row.is_baseline for row in rows),
        undefined=undefined,
        configurations=_corrected(rows),
    )


class _Figures(NamedTuple):
    folds: list[int]
    auroc: np.ndarray  # (folds, L)
    draws: np.ndarray  # (folds, R, L); empty unless complete, as nothing would be shown that needs them
    complete: bool


def _check(cells: Sequence[CellResult]) -> dict[CellSpec, CellResult]:
    """Cells by their place in the grid, images of a fold in one order."""
    if not cells:
        raise ValueError("There is no finished cell to summarise.")
    found: dict[CellSpec, CellResult] = {}
    first_of: dict[int, CellResult] = {}
    for cell in cells:
        if cell.spec in found:
            raise ValueError(f"There are two cells {cell.spec.name}.")
        if (cell.labels, cell.facts.settings) != (cells[0].labels, cells[0].facts.settings):
            raise ValueError(f"{cell.spec.name} and {cells[0].spec.name} have other labels or settings.")
        found[cell.spec] = _align(cell, first_of.setdefault(cell.spec.fold, cell))
    folds_of = Counter(patient for cell in first_of.values() for patient in set(cell.patients))
    if split := sum(folds > 1 for folds in folds_of.values()):
        raise ValueError(f"{split} patients are tested in two folds or more: folds must keep patients whole.")
    return found


def _align(cell: CellResult, like: CellResult) -> CellResult:
    """The cell with its images in the order of another one; they must be the same images."""
    if sorted(cell.keys) != sorted(like.keys):
        other = set(cell.keys) ^ set(like.keys)
        raise ValueError(
            f"{cell.spec.name} and {like.spec.name} were tested on different images ({len(other)} are in only one): "
            "they cannot be compared."
        )
    places = {key: place for place, key in enumerate(cell.keys)}
    order = [places[key] for key in like.keys]
    patients, targets = tuple(cell.patients[i] for i in order), cell.targets[order]
    if patients != like.patients or not np.array_equal(targets, like.targets):
        raise ValueError(f"{cell.spec.name} and {like.spec.name} have other patients or labels for the same images.")
    return replace(cell, keys=like.keys, patients=patients, probabilities=cell.probabilities[order], targets=targets)


def _kind(spec: CellSpec) -> tuple[str, str, int]:
    return spec.strategy, spec.mode, spec.ratio


def _undefined(test: CellResult) -> list[str]:
    """Labels without an AUROC in a fold."""
    mixed = test.targets.any(axis=0) & ~test.targets.all(axis=0)
    if not mixed.any():
        raise ValueError(f"No label of fold {test.spec.fold} has images with and without it, so there is no AUROC.")
    return [label for label, both in zip(test.labels, mixed, strict=True) if not both]


def _figures(cells: Mapping[int, CellResult], weights: Mapping[int, np.ndarray], num_folds: int) -> _Figures:
    """Of a configuration's cells by fold."""
    auroc = [auroc_draws(cell.probabilities, cell.targets)[0] for cell in cells.values()]
    complete = len(cells) == num_folds
    draws = [auroc_draws(c.probabilities, c.targets, weights[fold]) for fold, c in cells.items()] if complete else []
    return _Figures(list(cells), np.array(auroc), np.array(draws), complete)


def _configuration(
    kind: tuple[str, str, int], regime: int, own: _Figures, baseline: _Figures | None, tests: Mapping[int, CellResult]
) -> Configuration:
    macro = mean_of_defined(own.auroc, axis=-1) if own.folds else np.empty(0)
    compared = kind[2] > 0 and own.complete and baseline is not None and baseline.complete
    patients_low = patients_high = difference = None
    if own.complete:
        by_fold = mean_of_defined(own.draws, axis=-1)  # (folds, R)
        patients_low, patients_high = percentile_interval(mean_of_defined(by_fold, axis=0))
    if compared:
        gaps = macro - mean_of_defined(baseline.auroc, axis=-1)
        difference = _difference(gaps, mean_of_defined(own.draws - baseline.draws, axis=-1))
    tested = [tests[fold] for fold in own.folds]
    names = tested[0].labels if tested else ()
    return Configuration(
        *kind,
        regime,
        folds=tuple(own.folds),
        num_images=sum(len(cell.keys) for cell in tested),
        num_patients=sum(len(set(cell.patients)) for cell in tested),
        macro=tuple(macro.tolist()),
        mean=float(macro.mean()) if own.complete else None,
        sd=float(macro.std(ddof=1)) if own.complete and len(macro) > 1 else None,
        patients_low=patients_low,
        patients_high=patients_high,
        difference=difference,
        labels=tuple(_label(name, i, own, baseline if compared else None, tested) for i, name in enumerate(names)),
    )


def _label(
    name: str, place: int, own: _Figures, baseline: _Figures | None, tested: Sequence[CellResult]
) -> LabelFigures:
    auroc = own.auroc[:, place]
    defined = np.isfinite(auroc)
    difference = None
    if baseline is not None and defined.sum() > 1:
        gaps = (auroc - baseline.auroc[:, place])[defined]
        difference = _difference(gaps, (own.draws - baseline.draws)[defined, :, place], len(auroc))
    return LabelFigures(
        label=name,
        num_positive=int(sum(cell.targets[:, place].sum() for cell in tested)),
        folds=tuple(value if np.isfinite(value) else None for value in auroc.tolist()),
        mean=float(auroc[defined].mean()) if own.complete and defined.any() else None,
        difference=difference,
    )


def _difference(gaps: np.ndarray, draws: np.ndarray, num_folds: int | None = None) -> Difference | None:
    """Of gaps `(folds,)` and draws `(folds, R)`. A draw that lacks a class in a fold is the mean of the others."""
    if len(gaps) < 2:
        return None
    test = corrected_t_test(gaps, num_folds or len(gaps))
    return Difference(*test, test.p, *percentile_interval(mean_of_defined(draws, axis=0)))


def _corrected(rows: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """Correct the p values of macro AUROC, and those of labels as a family of their own."""
    tested = [row for row in rows if not row.is_baseline]
    macro = _holm([row.difference for row in tested])
    family = [label.difference for row in tested for label in row.labels]
    width = max(len(row.labels) for row in rows)
    family += [None] * (width * len(tested) - len(family))  # of configurations that have not begun
    single = _holm(family)

    def correct(row: Configuration) -> Configuration:
        labels = tuple(replace(label, difference=next(single)) for label in row.labels)
        return replace(row, difference=next(macro), labels=labels)

    return tuple(row if row.is_baseline else correct(row) for row in rows)


def _holm(family: Sequence[Difference | None]) -> Iterator[Difference | None]:
    values = holm([None if one is None else one.p for one in family])
    return (one and replace(one, corrected_p=value) for one, value in zip(family, values, strict=True))
