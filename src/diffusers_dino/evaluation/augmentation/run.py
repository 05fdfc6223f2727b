"""From labelled images to the cells of the classification grid: folds, training images of a cell, and its making."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ...data.labels import LabelTable
from ...seeds import derive_seed
from ...synthesis.tokens import settled_arithmetic
from ..classifier import ClassifierSettings, LabelledImages, predict, train_classifier
from ..folds import assign_folds
from ..packed import PackedImages
from .cells import FULL_SYNTHETIC, CellFacts, CellResult, CellSpec
from .plans import RegimePlan
from .regimes import check_regimes, order_balanced

__all__ = ["CellJob", "FoldSplit", "run_cell", "split_folds", "synthetic_images", "training_images"]


class FoldSplit(NamedTuple):
    """The images of one fold, as numbers of rows of a table; no patient is in two of the parts.

    Attributes:
        test: Those that are predicted.
        validation: Those that choose the weights of a classifier.
        ordered: Training images of the largest regime; a regime of R images has the first R.
    """

    test: np.ndarray
    validation: np.ndarray
    ordered: np.ndarray


def split_folds(
    table: LabelTable,
    labels: Sequence[str],
    folds: np.ndarray,
    regimes: Sequence[int],
    *,
    validation_fraction: float = 0.15,
    seed: int = 0,
) -> list[FoldSplit]:
    """Divide the images of each fold into test, validation and training.

    Validation images are those of a stratified share of the training patients. They are the same in all cells of a
    fold, beside the images of every regime: all methods choose among their weights in the same way, and no choice
    looks at a test image.

    Args:
        table: N images.
        labels: Names of the labels to stratify and to balance.
        folds: `(N,)`, the fold that each image is tested in; -1 for images that are only trained on.
        regimes: Numbers of real images.
        validation_fraction: Share of the training patients; 0 keeps none, and the last weights are taken.
        seed: Of validation patients and regimes.

    Raises:
        ValueError: If a regime is larger than the training data of a fold, or the fraction is not in [0, 0.5].
    """
    if not 0 <= validation_fraction <= 0.5:
        raise ValueError(f"validation_fraction is in [0, 0.5], got {validation_fraction}.")
    targets = table.targets(labels)
    parts = []
    for fold in range(int(folds.max()) + 1):
        training = np.flatnonzero(folds != fold)
        kept_aside = np.zeros(len(training), dtype=bool)
        if validation_fraction:
            patients = [table.patients[row] for row in training.tolist()]
            shares = round(1 / validation_fraction)
            kept_aside = assign_folds(targets[training], patients, shares, derive_seed(seed, "validation", fold)) == 0
        parts.append((np.flatnonzero(folds == fold), training[kept_aside], training[~kept_aside]))
    check_regimes(regimes, [len(pool) for _, _, pool in parts])
    splits = []
    for fold, (test, validation, pool) in enumerate(parts):
        keys = [table.keys[row] for row in pool.tolist()]
        order = order_balanced(targets[pool], keys, max(regimes), derive_seed(seed, "regimes", fold))
        splits.append(FoldSplit(test, validation, pool[order]))
    return splits


def synthetic_images(
    packed: PackedImages, planned: RegimePlan, labels: Sequence[str], regime: int, ratio: int
) -> LabelledImages:
    """The synthetic images of a regime and ratio; what a gate left out is not there.

    Args:
        packed: The images of the whole plan.
        planned: The plan.
        labels: Names of the L labels.
        regime: Number of real images.
        ratio: Synthetic images for each.
    """
    chosen = [planned.plan[int(number)] for number in planned.images[regime][: regime * ratio]]
    chosen = [image for image in chosen if image.key in packed.places]
    rows = np.array([packed.places[image.key] for image in chosen], dtype=np.int64)
    targets = np.array([[name in (image.labels or ()) for name in labels] for image in chosen], dtype=bool)
    return LabelledImages(packed, rows, targets.reshape(len(chosen), len(labels)))


def training_images(
    spec: CellSpec, real: LabelledImages, synthetic: LabelledImages | None
) -> tuple[LabelledImages, ...]:
    """What a cell trains on: real images, synthetic ones, or both.

    Args:
        spec: The cell.
        real: The real images of its regime.
        synthetic: The synthetic ones of its strategy, regime and ratio; None for the baseline.
    """
    if synthetic is None:
        return (real,)
    return (synthetic,) if spec.mode == FULL_SYNTHETIC else (real, synthetic)


@dataclass(frozen=True)
class CellJob:
    """All that a cell is made from; it travels to another process.

    Attributes:
        spec: Which cell.
        train: What it trains on: see `training_images`.
        validation: What chooses its weights; may be empty.
        test: What it predicts.
        patients: Of the test images.
        labels: Names of the labels.
        classifier: Architecture and training.
        seed: Of the experiment.
        settings: Digest of the experiment's settings.
        plan: Digest of the plan of the synthetic images; empty for the baseline.
    """

    spec: CellSpec
    train: tuple[LabelledImages, ...]
    validation: LabelledImages
    test: LabelledImages
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    classifier: ClassifierSettings
    seed: int
    settings: str
    plan: str


def run_cell(job: CellJob, folder: str | Path, device: torch.device | str = "cpu") -> CellResult:
    """Train one cell's classifier, predict its test images and write the cell's file.

    The result is a function of the job: on the CPU it is computed by one thread, since sums depend on their number.
    All cells of a fold start from the same weights, so that a difference between two is one of their images.

    Args:
        job: What to do.
        folder: Where the file goes.
        device: Where to compute.

    Raises:
        ValueError: If there is no image to train on, or training diverges.
        OSError: If the disk is full, or the folder is not writable.
    """
    started = time.perf_counter()
    with settled_arithmetic(threads=1):
        seed = derive_seed(job.seed, "classifier", job.spec.fold)
        validation = job.validation if len(job.validation.rows) else None
        trained = train_classifier(job.train, validation, job.classifier, seed, device)
        probabilities = predict(trained.model, job.test, device)
    num_real = sum(len(part.rows) for part in job.train if part.images.path == job.test.images.path)
    facts = CellFacts(
        num_real=num_real,
        num_synthetic=sum(len(part.rows) for part in job.train) - num_real,
        num_validation=len(job.validation.rows),
        steps=job.classifier.max_steps,
        best_step=trained.best_step,
        validation_auroc=trained.validation_auroc,
        seconds=time.perf_counter() - started,
        seed=job.seed,
        settings=job.settings,
        plan=job.plan,
        model=job.classifier.name,
        device=str(device),
    )
    keys = tuple(job.test.images.keys[row] for row in job.test.rows.tolist())
    result = CellResult(job.spec, job.labels, keys, job.patients, probabilities, job.test.targets, facts)
    result.save(folder)
    return result
