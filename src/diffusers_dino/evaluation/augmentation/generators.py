"""Which fold tests which patient, and whether the generators have seen the patients that they help to test."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...data.keys import match_paths, read_keys
from ...data.labels import LabelTable
from ...files import atomic_write, is_csv_of, make_writable_folder, write_csv
from ..folds import assign_folds

__all__ = ["FOLD", "PerFold", "check_generators", "of_fold", "write_folds"]

logger = logging.getLogger(__name__)

FOLD = "{fold}"
TRAINING_KEYS = "training_keys.txt"
_COLUMNS = ("key", "patient", "fold")

PerFold = str | Path | Sequence[str | Path]  # one for all folds, in which {fold} is a fold's number; or one for each


def of_fold(paths: PerFold, fold: int) -> str:
    """The path of a fold."""
    one = paths if isinstance(paths, (str, Path)) else paths[fold]
    return str(one).replace(FOLD, str(fold))


def is_shared(paths: PerFold) -> bool:
    """Whether all folds have the same path."""
    return isinstance(paths, (str, Path)) and FOLD not in str(paths)


def write_folds(
    table: LabelTable,
    labels: Sequence[str],
    output_dir: str | Path,
    *,
    num_folds: int = 5,
    training_keys: PerFold | None = None,
    known: LabelTable | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Share out patients to folds, and write which images the generator of each fold may be trained on.

    Writes `folds.csv`, and `fold-K/training_keys.txt` for each fold K: train its generator on these images. The
    arguments are those of `evaluate_augmentation`; `known` has the patients of more images than are used, among which
    training keys are looked up. Returns `(N,)` int64, the fold that each image of the table is tested in; -1 for none.
    ValueError if there are fewer patients to test than folds, the folder has other folds, or no training key is known.
    """
    seen: set[str] = set()
    if training_keys is not None and is_shared(training_keys):
        seen = _trained_on(of_fold(training_keys, 0), known or table)[0]
        logger.info(f"{len(seen)} patients that the generator was trained on are not tested")
    tested = np.array([patient not in seen for patient in table.patients])
    if not tested.any():
        raise ValueError(
            f"The generator was trained on all {len(set(table.patients))} patients, so none is left to test: train "
            f"one generator for each fold, on the keys in fold-K/{TRAINING_KEYS}."
        )
    folds = np.full(len(table), -1)
    patients = [table.patients[row] for row in np.flatnonzero(tested).tolist()]
    folds[tested] = assign_folds(table.targets(labels)[tested], patients, num_folds, seed)

    rows = sorted(zip(table.keys, table.patients, map(str, folds.tolist()), strict=True))
    path = make_writable_folder(output_dir) / "folds.csv"
    if not path.is_file():
        write_csv(path, _COLUMNS, rows)
    if not is_csv_of(path, _COLUMNS, rows):
        raise ValueError(
            f"{path} has other folds than these images, labels, number of folds and seed give. Use those that it was "
            "written with, or another output folder."
        )
    for fold in range(num_folds):
        folder = path.parent / f"fold-{fold}"
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / TRAINING_KEYS) as file:
            file.write("".join(f"{key}\n" for key, _, own in rows if own != str(fold)).encode())
    return folds


def check_generators(
    table: LabelTable,
    folds: np.ndarray,
    generators: PerFold,
    training_keys: PerFold | None = None,
    known: LabelTable | None = None,
    priors: PerFold | None = None,
) -> str:
    """A sentence about whether generators have seen patients of the folds `(N,)` that they are used for.

    ValueError if a fold's generator was trained on images of patients whom the fold tests, by the keys in the files
    `training_keys`, or if none of these is the key of an image here. `known` is as of `write_folds`; the keys are
    those of the `priors` as well.
    """
    if training_keys is None:
        if priors is not None and is_shared(priors):
            logger.warning(
                "One prior serves all folds and may have learned labels of the patients that are tested: figures may "
                "be too good. Give the keys that it was trained on, or train one for each fold."
            )
        if not is_shared(generators):
            return (
                f"One generator for each fold ({generators}); that each was trained without its test patients was not "
                "checked."
            )
        logger.warning(
            "One generator serves all folds and may have been trained on images of the patients that are tested: "
            "figures may be too good. Give the keys that it was trained on, or train one for each fold, on the keys "
            f"in fold-K/{TRAINING_KEYS}."
        )
        return "One generator for all folds, which may have been trained on images of the patients that are tested."
    matches = []
    for fold in range(int(folds.max()) + 1):
        trained, matched = _trained_on(of_fold(training_keys, fold), known or table)
        matches.append(matched)
        tested = {table.patients[row] for row in np.flatnonzero(folds == fold).tolist()}
        if both := sorted(trained & tested):
            raise ValueError(
                f"The generator of fold {fold} was trained on images of {len(both)} of the {len(tested)} patients "
                f"that the fold tests, such as {both[0]}: train it on the keys in fold-{fold}/{TRAINING_KEYS}."
            )
    by_fold = ", ".join(f"{matched} for fold {fold}" for fold, matched in enumerate(matches))
    checked = (
        "By the training keys, no generator was trained on an image of a patient whom it is used to test. Of the "
        f"training keys, these are of images here: {matches[0] if is_shared(training_keys) else by_fold}."
    )
    if table.patients == table.keys:
        checked += " Patients are not known: each image counted as a patient of its own."
    return checked


def _trained_on(path: str, table: LabelTable) -> tuple[set[str], str]:
    """Patients of the images whose keys are in a file, and how many of its keys are of images in the table.

    ValueError if none is: then nothing could be checked.
    """
    keys = read_keys(path)
    rows = [row for row in match_paths(keys, table.keys) if row is not None]
    if not rows:
        raise ValueError(
            f"None of the {len(keys)} keys in {path}, such as {keys[0]!r}, is of one of the {len(table)} images, such "
            f"as {table.keys[0]!r}: it cannot be checked what the generator has seen. Give the keys that it was "
            "trained on as they are in these images, or no training keys if it was trained on other images."
        )
    if len(rows) < len(keys):
        logger.warning(
            f"{len(rows)} of the {len(keys)} keys in {path} are of images here. The others are not checked: what the "
            "generator was trained on besides may hold images of the patients that are tested."
        )
    return {table.patients[row] for row in rows}, f"{len(rows)} of {len(keys)}"
