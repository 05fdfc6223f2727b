"""The work of an augmentation experiment: its synthetic sets, the judges of its folds, and a classifier for each cell.

Each step leaves out what is in the folder already, and goes on with the others where one fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.labels import LabelTable
from ...devices import device_of
from ...files import remove_partials
from ...fingerprints import hash_of
from ...seeds import derive_seed
from ...synthesis import Plan, SynthesisSettings
from ...workers import progress_bar, run_apart
from ..classifier import LabelledImages
from ..judge import Judge
from ..packed import PackedImages
from .cells import BALANCED, FULL_SYNTHETIC, JUDGED, PRIOR, SOFT, CellJob, CellResult, CellSpec, images_of, run_cell
from .judged import FoldJudge, find_kept, judge_rows, train_fold_judge
from .plans import FoldSplit, RegimePlan, plan_regimes
from .sets import SetOptions, make_set, targets_of

__all__ = ["Experiment", "make_cells", "synthetic_images"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """What sets and cells are made from, in the folder `output`."""

    output: Path
    real: PackedImages
    table: LabelTable  # of the real images
    asked: list[LabelTable]  # the same with all labels that the prior of each fold knows; empty without priors
    labels: tuple[str, ...]
    splits: list[FoldSplit]
    grid: list[CellSpec]
    set_options: SetOptions
    synthesis: SynthesisSettings
    exponent: float
    false_alarms: float
    seed: int
    digest: str  # of the settings
    num_workers: int

    def set_folder(self, fold: int, strategy: str) -> Path:
        """Where the synthetic set of a fold and strategy is; strategies of the same images share it."""
        return self.output / f"fold-{fold}" / images_of(strategy)

    def packed(self, fold: int, strategy: str) -> PackedImages:
        """The images of a set that is there."""
        folder = self.set_folder(fold, strategy)
        return PackedImages(folder.with_name(f"{folder.name}.npy"))

    def real_images(self, rows: np.ndarray) -> LabelledImages:
        """Those of some rows of the table."""
        return LabelledImages(self.real, rows, self.table.targets(self.labels)[rows])

    def targets(self, plan: Plan, strategy: str) -> np.ndarray:
        """The labels that all images of a plan train with."""
        if strategy.removesuffix(JUDGED) != SOFT:
            return targets_of(plan, self.labels)
        return targets_of(plan, self.labels, self.exponent, dict(zip(self.table.keys, self.table.labels, strict=True)))


def make_cells(experiment: Experiment, cells: Path) -> list[str]:
    """Make all synthetic sets that are needed, then all cells; returns what went wrong."""
    cells.mkdir(exist_ok=True)
    for folder in (experiment.output, cells, *experiment.output.glob("fold-*")):
        remove_partials(folder)
    left = [spec for spec in experiment.grid if not CellResult.path(cells, spec).is_file()]
    made = next(cells.iterdir(), None)
    if made is not None and CellResult.load(made).facts.settings != experiment.digest:
        raise ValueError(f"The cells in {cells} are of other settings: delete them, or give another output folder.")
    planned = {
        (fold, strategy): _plan_set(experiment, fold, strategy)
        for fold, strategy in sorted({(spec.fold, images_of(spec.strategy)) for spec in left if not spec.is_baseline})
    }
    digests, problems = _make_sets(experiment, planned)
    ready = [spec for spec in left if spec.is_baseline or (spec.fold, images_of(spec.strategy)) in digests]
    kept = _ask_judges(experiment, planned, ready, problems)
    ready = [spec for spec in ready if not spec.strategy.endswith(JUDGED) or (spec.fold, spec.strategy) in kept]
    # one by one: all jobs together hold the rows of the grid many times
    set_options = experiment.set_options
    jobs = ((_cell_job(experiment, spec, planned, digests, kept), cells, set_options.device) for spec in ready)
    total = len(experiment.grid)
    with progress_bar("Classifiers", "cell", total, total - len(left), set_options.progress) as bar:
        for outcome in run_apart(_train_cell, jobs, experiment.num_workers):
            if outcome.error:
                problems.append(f"{ready[outcome.number].name}: {outcome.error}")
                logger.error(problems[-1])
            bar.update()
    return problems


def _plan_set(experiment: Experiment, fold: int, strategy: str) -> RegimePlan:
    """What to synthesise for a fold: all regimes at the largest ratio."""
    table = experiment.asked[fold] if strategy in (PRIOR, BALANCED) else experiment.table
    chosen = table.select([experiment.table.keys[row] for row in experiment.splits[fold].ordered.tolist()])
    return plan_regimes(
        strategy,
        chosen.keys,
        chosen.labels,
        sorted({spec.regime for spec in experiment.grid}),
        max(spec.ratio for spec in experiment.grid),
        names=experiment.labels,
        seed=derive_seed(experiment.seed, "synthetic", strategy, fold),
        settings=experiment.synthesis,
    )


def _make_sets(
    experiment: Experiment, planned: Mapping[tuple[int, str], RegimePlan]
) -> tuple[dict[tuple[int, str], str], list[str]]:
    """Synthesise; returns the digest of the plan of each set that is there, and what went wrong."""
    kinds, digests, problems, started = list(planned), {}, [], time.perf_counter()
    jobs = [(experiment.set_options, fold, planned[fold, s].plan, experiment.set_folder(fold, s)) for fold, s in kinds]
    for outcome in run_apart(make_set, jobs, experiment.num_workers):
        fold, strategy = kinds[outcome.number]
        if outcome.error:
            problems.append(f"{strategy} of fold {fold}: {outcome.error}")
            logger.error(problems[-1])
            continue
        digests[fold, strategy] = outcome.value
        seconds = time.perf_counter() - started
        logger.info(
            f"{strategy} of fold {fold}: {len(planned[fold, strategy].plan)} synthetic images, {seconds:.0f} s so far"
        )
    return digests, problems


def _ask_judges(
    experiment: Experiment,
    planned: Mapping[tuple[int, str], RegimePlan],
    ready: Sequence[CellSpec],
    problems: list[str],
) -> dict[tuple[int, str], set[str]]:
    """Train the judges of folds that need one; returns by fold and strategy the keys of the images that are kept."""
    wanted = sorted({(spec.fold, spec.strategy) for spec in ready if spec.strategy.endswith(JUDGED)})
    judges = {fold: _fold_judge(experiment, fold) for fold, _ in wanted}
    device, workers = experiment.set_options.device, experiment.num_workers
    for _ in run_apart(train_fold_judge, [(judge, device) for judge in judges.values()], workers):
        pass  # what fails here fails again below, and is named there
    jobs, kept = [], {}
    for fold, strategy in wanted:
        packed, plan = experiment.packed(fold, strategy), planned[fold, images_of(strategy)].plan
        there = np.array([packed.places.get(image.key, -1) for image in plan])
        images = LabelledImages(packed, there[there >= 0], experiment.targets(plan, strategy)[there >= 0])
        jobs.append((judges[fold], images, experiment.output / f"fold-{fold}" / f"{strategy}.json", device))
    for outcome in run_apart(find_kept, jobs, workers):
        fold, strategy = wanted[outcome.number]
        if outcome.error:
            problems.append(f"the judge of {strategy} in fold {fold}: {outcome.error}")
            logger.error(problems[-1])
        else:
            kept[fold, strategy] = set(outcome.value)
    return kept


def _fold_judge(experiment: Experiment, fold: int) -> FoldJudge:
    train, held_out = judge_rows(experiment.table, experiment.labels, fold, experiment.splits[fold], experiment.seed)
    path, digest = experiment.output / f"fold-{fold}" / "judge.safetensors", hash_of(experiment.digest, "judge", fold)
    return FoldJudge(
        Judge(path, experiment.set_options.classifier, digest),
        experiment.real_images(train),
        experiment.real_images(held_out),
        experiment.labels,
        experiment.false_alarms,
        derive_seed(experiment.seed, "judge", fold),
    )


def _cell_job(
    experiment: Experiment,
    spec: CellSpec,
    planned: Mapping[tuple[int, str], RegimePlan],
    digests: Mapping[tuple[int, str], str],
    kept: Mapping[tuple[int, str], Collection[str]],
) -> CellJob:
    split, labels, real = experiment.splits[spec.fold], experiment.labels, experiment.real_images
    place = spec.fold, images_of(spec.strategy)
    train = [] if spec.mode == FULL_SYNTHETIC else [real(split.ordered[: spec.regime])]
    if not spec.is_baseline:
        packed, targets = experiment.packed(*place), experiment.targets(planned[place].plan, spec.strategy)
        left = kept.get((spec.fold, spec.strategy), packed.places)
        train.append(synthetic_images(packed, planned[place], targets, spec.regime, spec.ratio, left))
    return CellJob(
        spec=spec,
        train=tuple(train),
        validation=real(split.validation),
        test=real(split.test),
        patients=tuple(experiment.table.patients[row] for row in split.test.tolist()),
        labels=labels,
        classifier=experiment.set_options.classifier,
        seed=experiment.seed,
        settings=experiment.digest,
        plan=digests.get(place, ""),
    )


def _train_cell(place: int, job: CellJob, folder: Path, device: str | None) -> None:
    run_cell(job, folder, device_of(place, device))


def synthetic_images(
    packed: PackedImages, planned: RegimePlan, targets: np.ndarray, regime: int, ratio: int, kept: Collection[str]
) -> LabelledImages:
    """The synthetic images of a regime and ratio among those of the whole plan, if they are kept.

    `targets` `(P, L)` are of all P images of the plan. What a gate left out is not there.
    """
    numbers = planned.images[regime][: regime * ratio].tolist()
    chosen = [number for number in numbers if planned.plan[number].key in kept]
    rows = np.array([packed.places[planned.plan[number].key] for number in chosen], dtype=np.int64)
    return LabelledImages(packed, rows, targets[chosen])
