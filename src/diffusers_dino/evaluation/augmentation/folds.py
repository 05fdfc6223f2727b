"""Who is tested where in `eval_augmentation.py`, and whether the generators have seen them."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...data.labels import LabelTable
from ...files import atomic_write, write_csv
from ..folds import assign_folds

__all__ = ["FOLD", "check_generators", "make_folds", "of_fold", "write_folds"]

logger = logging.getLogger("eval_augmentation")

FOLD = "{fold}"
FOLDS = "folds.csv"
TRAINING_KEYS = "training_keys.txt"
_COLUMNS = ("key", "patient", "fold")


def of_fold(path: str, fold: int) -> str:
    """A path in which `{fold}` stands for the number of a fold."""
    return path.replace(FOLD, str(fold))


def make_folds(
    table: LabelTable, names: Sequence[str], num_folds: int, seed: int, training_keys: str | None
) -> np.ndarray:
    """The fold that each image is tested in.

    Patients of `training_keys`, if that is what one generator for all folds was trained on, are tested in none: -1.

    Raises:
        ValueError: If there are fewer patients to test than folds.
    """
    seen: set[str] = set()
    if training_keys is not None and FOLD not in training_keys:
        seen = _patients_of(_read_keys(training_keys), table)
        logger.info(f"{len(seen)} patients that the generator was trained on are not tested")
    tested = np.array([patient not in seen for patient in table.patients])
    if not tested.any():
        raise ValueError(
            f"The generator was trained on all {len(set(table.patients))} patients, so that none can be tested: train "
            f"one for each fold (--write_folds, --model .../fold-{FOLD})."
        )
    folds = np.full(len(table), -1)
    patients = [table.patients[row] for row in np.flatnonzero(tested).tolist()]
    folds[tested] = assign_folds(table.targets(names)[tested], patients, num_folds, seed)
    return folds


def write_folds(table: LabelTable, folds: np.ndarray, output: Path) -> None:
    """Write `folds.csv`, and for each fold the keys that its generator may be trained on.

    Raises:
        ValueError: If other folds have been written there, by which generators may have been trained.
    """
    rows = sorted(zip(table.keys, table.patients, map(str, folds.tolist()), strict=True))
    path = output / FOLDS
    if not path.is_file():
        write_csv(path, _COLUMNS, rows)
    with open(path, newline="") as file:
        before = [tuple(row) for row in csv.reader(file)]
    if before != [_COLUMNS, *rows]:
        raise ValueError(
            f"{path} has other folds than these images, labels, --num_folds and --seed give. Use those that it was "
            "written with, or another --output_dir."
        )
    for fold in range(int(folds.max()) + 1):
        folder = output / f"fold-{fold}"
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / TRAINING_KEYS) as file:
            keys = [key for key, _, tested_in in rows if tested_in != str(fold)]
            file.write("".join(f"{key}\n" for key in keys).encode())


def check_generators(table: LabelTable, folds: np.ndarray, model: str, training_keys: str | None) -> str:
    """What is known of the generators having seen patients of the folds that they are used for.

    Returns:
        A sentence for the record.

    Raises:
        ValueError: If the training keys of a fold's generator are of patients whom the fold tests.
    """
    if training_keys is None:
        if FOLD in model:
            return f"One generator a fold ({model}); that each was trained without its test patients was not checked."
        logger.warning(
            f"One generator serves all folds and may have been trained on images of the patients that are tested: "
            f"figures may be too good. Give --training_keys, or train one for each fold: --write_folds, then "
            f"--model .../fold-{FOLD}."
        )
        return "One generator for all folds, which may have been trained on images of the patients that are tested."
    for fold in range(int(folds.max()) + 1):
        trained = _patients_of(_read_keys(of_fold(training_keys, fold)), table)
        tested = {table.patients[row] for row in np.flatnonzero(folds == fold).tolist()}
        if both := sorted(trained & tested):
            raise ValueError(
                f"The generator of fold {fold} was trained on images of {len(both)} of the {len(tested)} patients "
                f"that the fold tests, such as {both[0]}: train it on fold-{fold}/{TRAINING_KEYS} (--write_folds)."
            )
    return "No generator was trained on an image of a patient whom it is used to test, by the keys in --training_keys."


def _patients_of(keys: Sequence[str], table: LabelTable) -> set[str]:
    wanted = set(keys)
    return {patient for key, patient in zip(table.keys, table.patients, strict=True) if key in wanted}


def _read_keys(path: str) -> list[str]:
    """Keys of images, one a line."""
    return [line for line in Path(path).read_text().splitlines() if line]
