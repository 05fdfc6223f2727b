"""What the classification grid says, as figures that go to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import JsonResult
from .cells import CellSpec

__all__ = ["AugmentationResult", "Configuration", "Difference", "LabelFigures"]


@dataclass(frozen=True)
class Difference:
    """AUROC of a configuration less that of the baseline of its regime.

    Attributes:
        mean: Over folds.
        low, high: 95 % interval by the corrected t test over folds: with other training runs and patients.
        p: By the same test, two-sided.
        corrected_p: For all tests of its family.
        patients_low, patients_high: 95 % bootstrap interval over patients: of these very classifiers.
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
        label: Its name.
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
        folds: Folds that are finished.
        num_images: Test images in them.
        num_patients: Patients of these.
        macro: Macro AUROC of each finished fold.
        mean: Of them; None while a fold is missing, as are all below.
        sd: Standard deviation over folds.
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
        """Whether it was trained on real images alone."""
        return self.ratio == 0


@dataclass(frozen=True)
class AugmentationResult(JsonResult):
    """All figures of a grid.

    Attributes:
        labels: Names of the labels.
        num_folds: Of the cross-validation.
        num_images: Test images of all folds that any cell has tested.
        num_patients: Patients of these.
        model: Name of the classifier.
        experiment_seed: Of folds, training and synthesis.
        settings: Digest of the experiment's settings.
        seed: Of the bootstrap.
        repeats: Draws of the bootstrap.
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
