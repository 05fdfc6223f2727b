r"""Do synthetic images help a classifier? Table 1 and Fig. 4 of the paper, on your images and labels.

    diffusers-dino evaluate augmentation --data_dir /data/cxr --labels /data/cxr.csv --output_dir eval --write_folds
    diffusers-dino evaluate augmentation --data_dir /data/cxr --labels /data/cxr.csv --output_dir eval \
        --model "models/fold-{fold}" --training_keys "eval/fold-{fold}/training_keys.txt"

The first command writes the keys that the generator of each fold may be trained on. The second makes a synthetic set
for each fold and strategy, trains a classifier for each strategy, mode, ratio, regime and fold, and compares them.
Stopped at any moment, the same command goes on where it was. docs/augmentation.md says what is measured.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ...data import ImageDataset, Preprocessing
from ...data.labels import LabelTable
from ...devices import count_workers, device_of
from ...evaluation.augmentation.cells import CellResult, CellSpec, grid_of, load_cells
from ...evaluation.augmentation.comparison import summarise
from ...evaluation.augmentation.folds import FOLD, check_generators, make_folds, of_fold, write_folds
from ...evaluation.augmentation.plans import RegimePlan, plan_regimes
from ...evaluation.augmentation.plot import plot_augmentation, plot_differences
from ...evaluation.augmentation.run import CellJob, FoldSplit, run_cell, split_folds, synthetic_images, training_images
from ...evaluation.augmentation.sets import SyntheticJob, make_synthetic, pack_path
from ...evaluation.augmentation.table import write_tables
from ...evaluation.classifier import ClassifierSettings, LabelledImages, make_classifier
from ...evaluation.packed import PackedImages, pack_images
from ...files import PARTIAL, lock_folder, make_writable_folder, sha256_of, write_json
from ...fingerprints import as_json, hash_of
from ...frozen import require_same
from ...metrics.auroc import check_classes, macro_auroc
from ...seeds import derive_seed
from ...synthesis import SynthesisSettings
from ...workers import progress_bar, run_apart
from ..arguments import flag
from ..classifier_flags import ClassifierArguments, LabelledImageArguments, classifier_settings, open_labelled_images
from ..sampling_flags import SamplingArguments

logger = logging.getLogger("eval_augmentation")

EXPERIMENT = "experiment.json"


@dataclass
class Arguments(SamplingArguments, ClassifierArguments, LabelledImageArguments):
    regimes: list[int] = flag([10000, 5000, 1000, 500, 100, 50], "Numbers of real images.", group="Grid")  # noqa: RUF009
    ratios: list[int] = flag([1, 5, 10, 25, 50], "Synthetic images for each real one.")  # noqa: RUF009
    strategies: list[str] = flag(["reconstruction", "interpolation"], "How they are made.")  # noqa: RUF009
    modes: list[str] = flag(["augmentation", "full-synthetic"], "Beside real images, or in place of them.")  # noqa: RUF009
    num_folds: int = flag(5, "Folds of cross-validation.")
    seed: int = flag(0, "Seed of folds, regimes, synthesis and training.")
    write_folds: bool = flag(False, "Write folds.csv and fold-K/training_keys.txt, and stop.")
    model: str = flag(
        "outputs/quickstart/model",
        f"DinoDiffusionPipeline; {FOLD} in it stands for the fold's number.",
        group="Generator",
    )
    training_keys: str | None = flag(None, f"File of the keys that the generator was trained on, {FOLD} as above.")
    sampling_batch_size: int = flag(16, "Images sampled together.")
    shard_size: int = flag(1000, "Synthetic images in a shard: what a kill loses, for each process.")
    gate: str | None = flag(None, f"File of a CopyGate, {FOLD} as above: near-copies are drawn again.")
    output_dir: str = flag("augmentation", "Where sets, cells, tables and figures go.", group="Work")
    num_workers: int | None = flag(None, "Processes at a time; by default one for each GPU, or core; 0: this one.")
    device: str | None = flag(None, "Where to compute; by default all GPUs, or else the CPU.")
    bootstrap_repeats: int = flag(1000, "Draws of the intervals over patients.")


@dataclass
class Experiment:
    """What the folder is for, opened."""

    args: Arguments
    output: Path
    table: LabelTable
    names: tuple[str, ...]
    folds: np.ndarray
    splits: list[FoldSplit]
    classifier: ClassifierSettings
    digest: str
    num_workers: int

    @property
    def cells(self) -> Path:
        return self.output / "cells"

    def left(self) -> list[CellSpec]:
        """The cells that are not finished."""
        return [spec for spec in self.grid() if not CellResult.path(self.cells, spec).is_file()]

    def grid(self) -> list[CellSpec]:
        args = self.args
        return grid_of(args.regimes, args.ratios, args.num_folds, args.strategies, args.modes)


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    output = make_writable_folder(args.output_dir)
    with lock_folder(output):
        images, table, names = open_labelled_images(args, args.size)
        folds = make_folds(table, names, args.num_folds, args.seed, args.training_keys)
        write_folds(table, folds, output)
        if args.write_folds:
            patients = len(set(table.patients))
            print(f"{output}/folds.csv: {len(table)} images of {patients} patients in {args.num_folds} folds")
            return
        experiment = open_experiment(args, output, table, names, folds)
        real = pack_real(experiment, images)
        problems = make_cells(experiment, real)
        report(experiment, problems)


def open_experiment(
    args: Arguments, output: Path, table: LabelTable, names: tuple[str, ...], folds: np.ndarray
) -> Experiment:
    """Check what can be checked before hours of work, and freeze what decides over the figures."""
    grid_of(args.regimes, args.ratios, args.num_folds, args.strategies, args.modes)
    classifier = classifier_settings(args)
    make_classifier(classifier, len(names))
    targets = table.targets(names)
    for fold in range(args.num_folds):
        check_classes(targets[folds == fold], names, f"fold {fold}")
    options = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    splits = split_folds(table, names, folds, args.regimes, **options)
    weights = args.classifier_weights and sha256_of(args.classifier_weights)
    begun = {
        "data": hash_of(*sorted(map(str, zip(table.keys, table.patients, targets.tolist(), strict=True))))[:16],
        "preparation": asdict(Preprocessing(args.size, args.remove_borders)),
        "labels": names,
        **{name: getattr(args, name) for name in ("regimes", "ratios", "strategies", "modes", "num_folds", "model")},
        **options,
        "synthesis": asdict(synthesis_settings(args)) | {"dtype": args.dtype, "scheduler": args.scheduler},
        "gate": args.gate,
        "classifier": asdict(classifier) | {"weights": weights},
    }
    begun = as_json(begun)
    path = output / EXPERIMENT
    if path.is_file():
        require_same(json.loads(path.read_bytes())["configuration"], begun, output)
    generators = check_generators(table, folds, args.model, args.training_keys)
    write_json(path, {"configuration": begun, "generators": generators})
    digest = hash_of(json.dumps(begun, sort_keys=True))[:16]
    return Experiment(
        args, output, table, names, folds, splits, classifier, digest, count_workers(args.num_workers, args.device)
    )


def synthesis_settings(args: Arguments) -> SynthesisSettings:
    shared = {entry.name for entry in fields(SynthesisSettings)} & {entry.name for entry in fields(args)}
    options = {name: getattr(args, name) for name in shared}
    # a process on the CPU has one thread: processes side by side use the cores better than threads do
    return SynthesisSettings(**options, batch_size=args.sampling_batch_size, threads=1, grayscale=args.channels == 1)


def pack_real(experiment: Experiment, images: ImageDataset) -> PackedImages:
    """The real images as one array; where one cannot be read, the experiment goes on without it."""
    args, table = experiment.args, experiment.table
    for leftover in experiment.output.glob(f".*{PARTIAL}"):
        leftover.unlink()
    real = pack_images(images, experiment.output / "real.npy", channels=args.channels)
    if real.keys != table.keys:
        fold_of = dict(zip(table.keys, experiment.folds.tolist(), strict=True))
        experiment.table = table.select(real.keys)
        experiment.folds = np.array([fold_of[key] for key in real.keys])
        options = {"validation_fraction": args.validation_fraction, "seed": args.seed}
        experiment.splits = split_folds(experiment.table, experiment.names, experiment.folds, args.regimes, **options)
        logger.warning(f"{len(table) - len(real.keys)} of {len(table)} images cannot be read and are left out.")
    return real


def make_cells(experiment: Experiment, real: PackedImages) -> list[str]:
    """Make all synthetic sets that are needed, then all cells; returns what went wrong."""
    experiment.cells.mkdir(exist_ok=True)
    for leftover in experiment.cells.glob(f".*{PARTIAL}"):
        leftover.unlink()
    left, device = experiment.left(), experiment.args.device
    kinds = sorted({(spec.fold, spec.strategy) for spec in left if not spec.is_baseline})
    planned = {kind: plan_set(experiment, *kind) for kind in kinds}
    digests, problems = make_sets(experiment, planned)
    ready = [spec for spec in left if spec.is_baseline or (spec.fold, spec.strategy) in digests]
    kind_of = {spec: (spec.fold, spec.strategy) for spec in ready}
    jobs = (  # one by one: all of them together hold the rows of the grid many times
        (cell_job(experiment, real, spec, planned.get(kind), digests.get(kind, "")), experiment.cells, device)
        for spec, kind in kind_of.items()
    )
    total = len(experiment.grid())
    with progress_bar("Classifiers", "cell", total, total - len(left)) as bar:
        for outcome in run_apart(train_cell, jobs, experiment.num_workers):
            if outcome.error:
                problems.append(f"{ready[outcome.number].name}: {outcome.error}")
                logger.error(problems[-1])
            bar.update()
    return problems


def plan_set(experiment: Experiment, fold: int, strategy: str) -> RegimePlan:
    """What to synthesise for a fold: all regimes at the largest ratio."""
    args = experiment.args
    chosen = [experiment.table.keys[row] for row in experiment.splits[fold].ordered.tolist()]
    table = experiment.table.select(chosen)
    seed = derive_seed(args.seed, "synthetic", strategy, fold)
    options: dict[str, Any] = {"seed": seed, "settings": synthesis_settings(args)}
    return plan_regimes(strategy, table.keys, table.labels, args.regimes, max(args.ratios), **options)


def make_sets(
    experiment: Experiment, planned: dict[tuple[int, str], RegimePlan]
) -> tuple[dict[tuple[int, str], str], list[str]]:
    """Synthesise; returns the digest of the plan of each set that is there, and what went wrong."""
    args, kinds = experiment.args, list(planned)
    gates = {fold: args.gate and of_fold(args.gate, fold) for fold, _ in kinds}
    jobs = [
        SyntheticJob(
            plan=planned[fold, strategy].plan,
            model=of_fold(args.model, fold),
            dtype=args.dtype,
            scheduler=args.scheduler,
            gate=gates[fold],
            data_dir=args.data_dir,
            data_split=args.data_split,
            remove_borders=args.remove_borders,
            folder=set_folder(experiment, fold, strategy),
            size=args.size,
            channels=args.channels,
            device=args.device,
        )
        for fold, strategy in kinds
    ]
    digests, problems, started = {}, [], time.perf_counter()
    for outcome in run_apart(make_synthetic, [(job,) for job in jobs], experiment.num_workers):
        fold, strategy = kinds[outcome.number]
        name, job = f"{strategy} of fold {fold}", jobs[outcome.number]
        if outcome.error:
            problems.append(f"{name}: {outcome.error}")
            logger.error(problems[-1])
            continue
        digests[fold, strategy] = outcome.value
        logger.info(f"{name}: {len(job.plan)} synthetic images, {time.perf_counter() - started:.0f} s so far")
    return digests, problems


def set_folder(experiment: Experiment, fold: int, strategy: str) -> Path:
    return experiment.output / f"fold-{fold}" / strategy


def cell_job(
    experiment: Experiment, real: PackedImages, spec: CellSpec, planned: RegimePlan | None, digest: str
) -> CellJob:
    split, names = experiment.splits[spec.fold], experiment.names
    targets = experiment.table.targets(names)

    def real_images(rows: np.ndarray) -> LabelledImages:
        return LabelledImages(real, rows, targets[rows])

    synthetic = None
    if planned is not None and not spec.is_baseline:
        packed = PackedImages(pack_path(set_folder(experiment, spec.fold, spec.strategy)))
        synthetic = synthetic_images(packed, planned, names, spec.regime, spec.ratio)
    return CellJob(
        spec=spec,
        train=training_images(spec, real_images(split.ordered[: spec.regime]), synthetic),
        validation=real_images(split.validation),
        test=real_images(split.test),
        patients=tuple(experiment.table.patients[row] for row in split.test.tolist()),
        labels=names,
        classifier=experiment.classifier,
        seed=experiment.args.seed,
        settings=experiment.digest,
        plan=digest,
    )


def train_cell(place: int, job: CellJob, folder: Path, device: str | None) -> float:
    """Make one cell; returns its macro AUROC."""
    result = run_cell(job, folder, device_of(place, device))
    return macro_auroc(result.probabilities, result.targets)


def report(experiment: Experiment, problems: Sequence[str]) -> None:
    """Tables and figures of the cells that are there; what is missing ends the script with an error."""
    args, output = experiment.args, experiment.output
    if not any(experiment.cells.iterdir()):
        raise RuntimeError(f"No cell was finished: {'; '.join(problems)}")
    cells = load_cells(experiment.cells)
    result = summarise(cells, experiment.grid(), repeats=args.bootstrap_repeats, seed=args.seed)
    write_tables(result, output)
    drawn = {"augmentation": (plot_augmentation, "mean"), "differences": (plot_differences, "difference")}
    for name, (plot, figure) in drawn.items():
        if any(getattr(row, figure) is not None for row in result.configurations):
            plot(result).savefig(output / f"{name}.png", dpi=120, bbox_inches="tight")
    print((output / "table.md").read_text())
    if problems:
        raise RuntimeError(
            f"{len(experiment.left())} of {len(experiment.grid())} cells are missing. {'; '.join(problems[:5])}. "
            "The same command tries them again."
        )
