"""Does training with synthetic images make better classifiers? Table 1 and Fig. 4 of the paper, resumable in a folder.

Source: DiNO-Diffusion (arXiv 2407.11594), section 2.4. The folder holds folds (`folds.csv`), synthetic sets
(`fold-K/STRATEGY`), a file for each classifier (`cells`), and the settings that it was begun with (`experiment.json`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ...data import ImageDataset, Preprocessing, open_images
from ...data.labels import LabelTable
from ...devices import count_workers, device_of
from ...files import lock_folder, make_writable_folder, read_json, remove_partials, sha256_of, write_json
from ...fingerprints import as_json, hash_of
from ...frozen import require_same
from ...metrics.auroc import check_classes
from ...metrics.copy_gate import CopyGate
from ...pipelines.checks import image_size
from ...seeds import derive_seed
from ...synthesis import Plan, SynthesisSettings, load_generator, synthesise
from ...workers import progress_bar, run_apart
from ..classifier import ClassifierSettings, LabelledImages, make_classifier
from ..generation import stack_images
from ..packed import GRAY, PackedImages, at_size, pack_images
from .cells import (
    AUGMENTATION,
    FULL_SYNTHETIC,
    INTERPOLATION,
    RECONSTRUCTION,
    CellJob,
    CellResult,
    CellSpec,
    grid_of,
    load_cells,
    run_cell,
)
from .generators import PerFold, check_generators, of_fold, write_folds
from .plans import FoldSplit, RegimePlan, plan_regimes, split_folds
from .result import AugmentationResult, summarise

__all__ = ["UnfinishedGridError", "evaluate_augmentation"]

logger = logging.getLogger(__name__)

_SHOWN_TO_GATE = 16


class UnfinishedGridError(RuntimeError):
    """Some cells could not be made. Call again to try them again; `result` has the others."""

    def __init__(self, message: str, result: AugmentationResult) -> None:
        super().__init__(message)
        self.result = result


def evaluate_augmentation(
    images: ImageDataset,
    table: LabelTable,
    generators: PerFold,
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    regimes: Sequence[int] = (10000, 5000, 1000, 500, 100, 50),
    ratios: Sequence[int] = (1, 5, 10, 25, 50),
    strategies: Sequence[str] = (RECONSTRUCTION, INTERPOLATION),
    modes: Sequence[str] = (AUGMENTATION, FULL_SYNTHETIC),
    num_folds: int = 5,
    training_keys: PerFold | None = None,
    gates: PerFold | None = None,
    classifier: ClassifierSettings | None = None,
    validation_fraction: float = 0.15,
    synthesis: SynthesisSettings | None = None,
    dtype: str = "float32",
    scheduler: str | None = None,
    seed: int = 0,
    bootstrap_repeats: int = 1000,
    num_workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> AugmentationResult:
    """Train classifiers on real images, on real and synthetic ones, and on synthetic ones only, and compare them.

    For each fold and strategy a synthetic set is made; for each strategy, mode, ratio, regime and fold a classifier is
    trained. Each is a process of its own and stays in the folder: called again, also with another number of processes,
    an experiment that was stopped goes on where it was, and ends with the same figures.

    Args:
        images: Real images. Their size does not matter: generator and classifier see them at their own.
        table: Labels and patients of (at least) these images. Training keys are looked up among all of its rows.
        generators: Folder of the `DinoDiffusionPipeline` of each fold, which must not have been trained on images of
            the patients that the fold tests (see `write_folds`): one path in which `{fold}` stands for the number of a
            fold, or one for each. A single one for all folds, or a repository of the Hub, is possible, too.
        output_dir: Folder of the experiment.
        labels: Names of the labels to classify; by default the four most frequent findings and "No Finding".
        regimes: Numbers of real images. Regimes are nested, and their labels as balanced as the data allows.
        ratios: Numbers of synthetic images for each real one.
        strategies: How they are made: `"reconstruction"`, `"interpolation"`.
        modes: What they are trained with: real images (`"augmentation"`) or nothing else (`"full-synthetic"`).
        num_folds: Folds of cross-validation, which keep patients whole.
        training_keys: Files with the keys, one a line, that the generators were trained on. If given, a generator that
            has seen patients of its fold is refused; the patients of one that serves all folds are tested in none.
        gates: Files of a `CopyGate` for each fold, which has near-copies drawn again.
        classifier: Architecture and training of all classifiers.
        validation_fraction: Share of the training patients whose real images choose the weights of a classifier, the
            same for all cells of a fold; 0 takes the last weights.
        synthesis: How images are sampled; `threads` is always 1, `grayscale` follows the classifier's channels.
        dtype: Type of the generators' weights: `"float32"`, `"bfloat16"` or `"float16"`.
        scheduler: Class of diffusers in place of the generators' scheduler.
        seed: Of folds, regimes, synthesis, training and bootstrap.
        bootstrap_repeats: Draws of the intervals over patients.
        num_workers: Processes at a time; by default one for each GPU, or for each core without one; 0: this one.
        device: Where to compute; by default on all GPUs in turn, or else on the CPU.
        progress: Whether to show progress bars.

    Raises:
        UnfinishedGridError: If cells could not be made; it has the result of the others.
        ValueError: If the folder was begun with other settings, a generator has seen its test patients, a regime is
            larger than the training data of a fold, or an argument is out of its range.
        KeyError: If an image has no row in the table.
        RuntimeError: If another process is at work in the folder, or no cell could be made.
    """
    grid = grid_of(regimes, ratios, num_folds, strategies, modes)
    classifier = classifier or ClassifierSettings()
    synthesis = replace(synthesis or SynthesisSettings(), threads=1, grayscale=classifier.channels == 1)
    labels = tuple(labels or table.most_frequent(4))
    known, table = table, table.select(images.keys).restrict(labels)
    make_classifier(classifier, len(labels))  # refuses what timm does not make before hours of work
    real_images = at_size(images, classifier.size)
    output = make_writable_folder(output_dir)
    with lock_folder(output):
        trained = {"training_keys": training_keys, "known": known}
        folds = write_folds(table, labels, output, num_folds=num_folds, seed=seed, **trained)
        targets = table.targets(labels)
        for fold in range(num_folds):
            check_classes(targets[folds == fold], labels, f"fold {fold}")
        options = {"validation_fraction": validation_fraction, "seed": seed}
        splits = split_folds(table, labels, folds, regimes, **options)
        begun = {
            "data": hash_of(*sorted(map(str, zip(table.keys, table.patients, targets.tolist(), strict=True))))[:16],
            "preparation": asdict(real_images.preprocessing),
            "labels": labels,
            "regimes": regimes,
            "ratios": ratios,
            "strategies": strategies,
            "modes": modes,
            "num_folds": num_folds,
            "model": generators,
            **options,
            "synthesis": asdict(synthesis) | {"dtype": dtype, "scheduler": scheduler},
            "gate": gates,
            "classifier": asdict(classifier) | {"weights": classifier.weights and sha256_of(classifier.weights)},
        }
        begun, path = as_json(begun), output / "experiment.json"
        if path.is_file():
            before = read_json(path)
            if not isinstance(before, dict) or not isinstance(before.get("configuration"), dict):
                raise ValueError(f"{path} is damaged: it holds no configuration. Give another output folder.")
            require_same(before["configuration"], begun, output)
        write_json(path, {"configuration": begun, "generators": check_generators(table, folds, generators, **trained)})
        real = pack_images(real_images, output / "real.npy", channels=classifier.channels)
        if real.keys != table.keys:
            logger.warning(f"{len(table) - len(real)} of {len(table)} images cannot be read and are left out.")
            fold_of = dict(zip(table.keys, folds.tolist(), strict=True))
            table, folds = table.select(real.keys), np.array([fold_of[key] for key in real.keys])
            splits = split_folds(table, labels, folds, regimes, **options)
        digest = hash_of(json.dumps(begun, sort_keys=True))[:16]
        if real.num_averaged:  # cells of older versions were trained on other gray values
            digest = hash_of(digest, GRAY)[:16]
        sampling = _Sampling(images, generators, gates, dtype, scheduler, classifier, device, progress)
        workers = count_workers(num_workers, device)
        experiment = _Experiment(output, real, table, labels, splits, grid, sampling, synthesis, seed, digest, workers)
        cells = output / "cells"
        problems = _make_cells(experiment, cells)
        if not any(cells.iterdir()):
            raise RuntimeError(f"No cell was finished: {'; '.join(problems)}")
        result = summarise(load_cells(cells), grid, repeats=bootstrap_repeats, seed=seed)
    if problems:
        raise UnfinishedGridError(
            f"{len(result.missing)} of {len(grid)} cells are missing. {'; '.join(problems[:5])}. Run again, and they "
            "are tried again.",
            result,
        )
    return result


@dataclass(frozen=True)
class _Sampling:
    """How the images of a set are made and packed; it travels to other processes."""

    images: ImageDataset
    generators: PerFold
    gates: PerFold | None
    dtype: str
    scheduler: str | None
    classifier: ClassifierSettings
    device: str | None
    progress: bool


@dataclass(frozen=True)
class _Experiment:
    """What sets and cells are made from."""

    output: Path
    real: PackedImages
    table: LabelTable  # of the real images
    labels: tuple[str, ...]
    splits: list[FoldSplit]
    grid: list[CellSpec]
    sampling: _Sampling
    synthesis: SynthesisSettings
    seed: int
    digest: str  # of the settings
    num_workers: int

    def set_folder(self, fold: int, strategy: str) -> Path:
        return self.output / f"fold-{fold}" / strategy


def _make_cells(experiment: _Experiment, cells: Path) -> list[str]:
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
        for fold, strategy in sorted({(spec.fold, spec.strategy) for spec in left if not spec.is_baseline})
    }
    digests, problems = _make_sets(experiment, planned)
    ready = [spec for spec in left if spec.is_baseline or (spec.fold, spec.strategy) in digests]
    # one by one: all jobs together hold the rows of the grid many times
    sampling = experiment.sampling
    jobs = ((_cell_job(experiment, spec, planned, digests), cells, sampling.device) for spec in ready)
    total = len(experiment.grid)
    with progress_bar("Classifiers", "cell", total, total - len(left), sampling.progress) as bar:
        for outcome in run_apart(_train_cell, jobs, experiment.num_workers):
            if outcome.error:
                problems.append(f"{ready[outcome.number].name}: {outcome.error}")
                logger.error(problems[-1])
            bar.update()
    return problems


def _plan_set(experiment: _Experiment, fold: int, strategy: str) -> RegimePlan:
    """What to synthesise for a fold: all regimes at the largest ratio."""
    chosen = experiment.table.select([experiment.table.keys[row] for row in experiment.splits[fold].ordered.tolist()])
    return plan_regimes(
        strategy,
        chosen.keys,
        chosen.labels,
        sorted({spec.regime for spec in experiment.grid}),
        max(spec.ratio for spec in experiment.grid),
        seed=derive_seed(experiment.seed, "synthetic", strategy, fold),
        settings=experiment.synthesis,
    )


def _make_sets(
    experiment: _Experiment, planned: Mapping[tuple[int, str], RegimePlan]
) -> tuple[dict[tuple[int, str], str], list[str]]:
    """Synthesise; returns the digest of the plan of each set that is there, and what went wrong."""
    kinds, digests, problems, started = list(planned), {}, [], time.perf_counter()
    jobs = [(experiment.sampling, fold, planned[fold, s].plan, experiment.set_folder(fold, s)) for fold, s in kinds]
    for outcome in run_apart(_make_set, jobs, experiment.num_workers):
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


def _make_set(place: int, sampling: _Sampling, fold: int, plan: Plan, folder: Path) -> str:
    """Make a set, or go on with it, and pack its images for classifiers. Returns the digest of its plan."""
    generator = of_fold(sampling.generators, fold)
    pipe = load_generator(generator, sampling.dtype, sampling.scheduler).to(device_of(place, sampling.device))
    sources = at_size(sampling.images, image_size(pipe))
    gate = None if sampling.gates is None else CopyGate.load(of_fold(sampling.gates, fold))
    if gate is not None and gate(stack_images(sources.select(plan.keys[:_SHOWN_TO_GATE]))).all():
        logger.warning(
            f"The gate of fold {fold} calls none of the first {_SHOWN_TO_GATE} sources a copy: is it of other images? "
            "A gate must know the images that the generator was trained on."
        )
    made = synthesise(plan, pipe, sources, folder, gate=gate, progress=sampling.progress and place == 0)
    images = open_images(folder, Preprocessing(sampling.classifier.size, remove_borders=False))
    packed = pack_images(
        images, folder.with_name(f"{folder.name}.npy"), made.plan.digest, sampling.classifier.channels
    )
    if lost := len(images) - len(packed):
        logger.warning(f"{lost} of {len(images)} images of {folder} cannot be read and are left out.")
    return made.plan.digest


def _cell_job(
    experiment: _Experiment,
    spec: CellSpec,
    planned: Mapping[tuple[int, str], RegimePlan],
    digests: Mapping[tuple[int, str], str],
) -> CellJob:
    split, labels = experiment.splits[spec.fold], experiment.labels
    targets = experiment.table.targets(labels)

    def real(rows: np.ndarray) -> LabelledImages:
        return LabelledImages(experiment.real, rows, targets[rows])

    train = [] if spec.mode == FULL_SYNTHETIC else [real(split.ordered[: spec.regime])]
    if not spec.is_baseline:
        folder = experiment.set_folder(spec.fold, spec.strategy)
        packed = PackedImages(folder.with_name(f"{folder.name}.npy"))
        train.append(synthetic_images(packed, planned[spec.fold, spec.strategy], labels, spec.regime, spec.ratio))
    return CellJob(
        spec=spec,
        train=tuple(train),
        validation=real(split.validation),
        test=real(split.test),
        patients=tuple(experiment.table.patients[row] for row in split.test.tolist()),
        labels=labels,
        classifier=experiment.sampling.classifier,
        seed=experiment.seed,
        settings=experiment.digest,
        plan=digests.get((spec.fold, spec.strategy), ""),
    )


def _train_cell(place: int, job: CellJob, folder: Path, device: str | None) -> None:
    run_cell(job, folder, device_of(place, device))


def synthetic_images(
    packed: PackedImages, planned: RegimePlan, labels: Sequence[str], regime: int, ratio: int
) -> LabelledImages:
    """The synthetic images of a regime and ratio among those of the whole plan; what a gate left out is not there."""
    chosen = [planned.plan[int(number)] for number in planned.images[regime][: regime * ratio]]
    chosen = [image for image in chosen if image.key in packed.places]
    rows = np.array([packed.places[image.key] for image in chosen], dtype=np.int64)
    targets = np.array([[name in (image.labels or ()) for name in labels] for image in chosen], dtype=bool)
    return LabelledImages(packed, rows, targets.reshape(len(chosen), len(labels)))
