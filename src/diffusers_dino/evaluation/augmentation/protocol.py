"""Does training with synthetic images make better classifiers? Table 1 and Fig. 4 of the paper, resumable in a folder.

Source: DiNO-Diffusion (arXiv 2407.11594), section 2.4. The folder holds folds (`folds.csv`), synthetic sets
(`fold-K/STRATEGY`), a file for each classifier (`cells`), and the settings that it was begun with (`experiment.json`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data import ImageDataset
from ...data.labels import LabelTable
from ...devices import count_workers
from ...files import lock_folder, make_writable_folder, read_json, write_json
from ...fingerprints import as_json, hash_of
from ...frozen import require_same
from ...metrics.auroc import check_classes
from ...synthesis import SynthesisSettings
from ...synthesis.pairs import check_exponent
from ..classifier import ClassifierSettings, make_classifier
from ..folds import check_fraction
from ..packed import GRAY, pack_images
from .cells import (
    AUGMENTATION,
    BALANCED,
    FULL_SYNTHETIC,
    INTERPOLATION,
    JUDGED,
    PRIOR,
    RECONSTRUCTION,
    SOFT,
    grid_of,
    images_of,
    load_cells,
)
from .experiment import Experiment, make_cells
from .generators import PerFold, check_generators, write_folds
from .judged import judge_rows
from .plans import split_folds
from .result import AugmentationResult, summarise
from .sets import FoldPriors, SetOptions

__all__ = ["UnfinishedGridError", "evaluate_augmentation"]


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
    priors: FoldPriors | None = None,
    exponent: float = 1.0,
    false_alarms: float = 0.05,
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
        strategies: How they are made and labelled: `"reconstruction"`; `"interpolation"` by the paper's rule, the
            labels of the nearer image; `"interpolation-identical"`, only between images of the very same labels;
            `"interpolation-soft"`, the images of `"interpolation"` with soft labels; `"prior"`, drawn without an
            image, labelled as the images of the regime; `"prior-balanced"`, each label equally often. With `+judge`
            behind it a strategy loses the images that a judge contradicts (`judged` says what the judge has seen).
        modes: What they are trained with: real images (`"augmentation"`) or nothing else (`"full-synthetic"`).
        num_folds: Folds of cross-validation, which keep patients whole.
        training_keys: Files with the keys, one a line, that generators and priors were trained on. If given, one that
            has seen patients of its fold is refused; the patients of one that serves all folds are tested in none.
        gates: Files of a `CopyGate` for each fold, which has near-copies drawn again.
        priors: Of the strategies `"prior"` and `"prior-balanced"`. They have learned from the labels of all of their
            training images, which are more than those of a small regime. Of the labels in the table they are asked for
            all that they know.
        exponent: Of soft labels, see `diffusers_dino.synthesis.soft_labels`.
        false_alarms: Share of correct labels of real images that a judge may contradict, see `judge.Limits`.
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

    Raises:
        UnfinishedGridError: If cells could not be made; it has the result of the others.
        ValueError: If the folder was begun with other settings, a generator has seen its test patients, a regime is
            larger than the training data of a fold, a prior is missing or lacks a label, no image is left for a
            judge, or an argument is out of its range.
        KeyError: If an image has no row in the table.
        RuntimeError: If another process is at work in the folder, or no cell could be made.
    """
    grid = grid_of(regimes, ratios, num_folds, strategies, modes)
    classifier = classifier or ClassifierSettings()
    synthesis = replace(synthesis or SynthesisSettings(), threads=1, grayscale=classifier.channels == 1)
    known, table = table, table.select(images.keys)
    labels = tuple(labels or table.most_frequent(4))
    table = table.restrict(labels)
    own = _own_options(strategies, priors, exponent, false_alarms)
    make_classifier(classifier, len(labels))  # refuses what timm does not make before hours of work
    real_images = images.resized(classifier.size)
    output = make_writable_folder(output_dir)
    with lock_folder(output):
        trained = {"training_keys": training_keys, "known": known}
        folds = write_folds(table, labels, output, num_folds=num_folds, seed=seed, **trained)
        targets = table.targets(labels)
        for fold in range(num_folds):
            check_classes(targets[folds == fold], labels, f"fold {fold}")
        options = {"validation_fraction": validation_fraction, "seed": seed}
        splits = split_folds(table, labels, folds, regimes, **options)
        asked = [
            priors.table_for(fold, known.select(table.keys), labels) for fold in range(num_folds if priors else 0)
        ]
        for fold, split in enumerate(splits if "false_alarms" in own else ()):
            judge_rows(table, labels, fold, split, seed)  # refuses regimes that leave nothing
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
            "classifier": classifier.facts(),
            **own,
        }
        begun, path = as_json(begun), output / "experiment.json"
        if path.is_file():
            before = read_json(path)
            if not isinstance(before, dict) or not isinstance(before.get("configuration"), dict):
                raise ValueError(f"{path} is damaged: it holds no configuration. Give another output folder.")
            require_same(before["configuration"], begun, output)
        checked = check_generators(table, folds, generators, priors=priors and priors.paths, **trained)
        write_json(path, {"configuration": begun, "generators": checked})
        real = pack_images(real_images, output / "real.npy", channels=classifier.channels)
        if real.keys != table.keys:
            fold_of = dict(zip(table.keys, folds.tolist(), strict=True))
            table, folds = table.select(real.keys), np.array([fold_of[key] for key in real.keys])
            splits = split_folds(table, labels, folds, regimes, **options)
        digest = hash_of(json.dumps(begun, sort_keys=True))[:16]
        if real.num_averaged:  # cells of older versions were trained on other gray values
            digest = hash_of(digest, GRAY)[:16]
        set_options = SetOptions(images, generators, priors, gates, dtype, scheduler, classifier, device, progress)
        experiment = Experiment(
            output=output,
            real=real,
            table=table,
            asked=[one.select(real.keys) for one in asked],
            labels=labels,
            splits=splits,
            grid=grid,
            set_options=set_options,
            synthesis=synthesis,
            exponent=exponent,
            false_alarms=false_alarms,
            seed=seed,
            digest=digest,
            num_workers=count_workers(num_workers, device),
        )
        cells = output / "cells"
        problems = make_cells(experiment, cells)
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


def _own_options(
    strategies: Sequence[str], priors: FoldPriors | None, exponent: float, false_alarms: float
) -> dict[str, Any]:
    """Check the options of single strategies, and return those that count: older experiments have none of them."""
    options: dict[str, Any] = {}
    if {images_of(one) for one in strategies} & {PRIOR, BALANCED}:
        if priors is None:
            raise ValueError(f"The strategies {PRIOR} and {BALANCED} need a prior, and there is none: give it.")
        options["prior"] = asdict(priors)
    elif priors is not None:
        raise ValueError(f"A prior goes with the strategies {PRIOR} and {BALANCED}, got {', '.join(strategies)}.")
    if any(one.removesuffix(JUDGED) == SOFT for one in strategies):
        check_exponent(exponent)
        options["exponent"] = float(exponent)
    if any(one.endswith(JUDGED) for one in strategies):
        check_fraction(false_alarms, "false_alarms")
        options["false_alarms"] = false_alarms
    return options
