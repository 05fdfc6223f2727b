"""The judge of a fold, and which of its synthetic images it contradicts.

It is trained on real images of those training patients of whom no image is in a regime or chooses weights. So it has
seen no patient that is tested, none whose images choose a classifier's weights, and none that a classifier or
a synthetic image learns from. A quarter of these patients is held out from it and says what it may contradict.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...data.labels import LabelTable
from ...devices import device_of
from ...files import write_json
from ...fingerprints import as_json
from ...metrics.auroc import check_classes, label_auroc
from ...seeds import derive_seed
from ..classifier import LabelledImages
from ..folds import hold_out
from ..judge import Judge, Limits, check_left
from .plans import FoldSplit

__all__ = ["FoldJudge", "find_kept", "judge_rows", "train_fold_judge"]

_CALIBRATION = 0.25


class FoldJudge(NamedTuple):
    """A judge of a fold: the images that it is trained on, and those that its limits are from."""

    judge: Judge
    train: LabelledImages
    held_out: LabelledImages
    labels: tuple[str, ...]
    false_alarms: float
    seed: int


def judge_rows(
    table: LabelTable, labels: Sequence[str], fold: int, split: FoldSplit, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows `(n,)` that the judge of a fold is trained on, and of those that are held out from it.

    ValueError if the regimes leave no images for it.
    """
    used = {table.patients[row] for part in split for row in part.tolist()}
    rows = np.array([row for row, patient in enumerate(table.patients) if patient not in used], dtype=np.int64)
    where = f"the images outside test, validation and regimes of fold {fold}, which its judge is trained on"
    patients = [table.patients[row] for row in rows.tolist()]
    if len(set(patients)) < 1 / _CALIBRATION:
        raise ValueError(
            f"There are {len(rows)} images in {where}: use smaller regimes, or strategies without a judge."
        )
    targets = table.targets(labels)[rows]
    aside = hold_out(targets, patients, _CALIBRATION, derive_seed(seed, "judge", fold))
    check_classes(targets[~aside], labels, where)
    return rows[~aside], rows[aside]


def train_fold_judge(place: int, judge: FoldJudge, device: str | None) -> None:
    """Train the judge of a fold, unless it is there."""
    judge.judge.train(judge.train, None, judge.seed, device_of(place, device))


def find_kept(place: int, judge: FoldJudge, images: LabelledImages, report: Path, device: str | None) -> list[str]:
    """Train the judge, unless it is there, and ask it about a set: the keys of the images that are kept.

    Writes what was dropped to a JSON file. ValueError if no image of a label is left.
    """
    train_fold_judge(place, judge, device)
    device = device_of(place, device)
    truth, real = judge.held_out.targets, judge.judge.predict(judge.held_out, device)
    limits = Limits.of_real(real, truth, judge.false_alarms)
    kept = ~limits.contradicted(judge.judge.predict(images, device), images.targets).any(axis=1)
    check_left(images.targets, kept, judge.labels)
    given = images.targets == 1
    auroc = [value if np.isfinite(value) else None for value in label_auroc(real, truth).tolist()]
    counts = {
        name: {"given": int(own.sum()), "dropped": int((own & ~kept).sum()), "AUROC of the judge": value}
        for name, own, value in zip(judge.labels, given.T, auroc, strict=True)
    }
    facts = {
        "images": len(kept),
        "kept": int(kept.sum()),
        "real images that the judge is trained on": len(judge.train.rows),
        "real images held out from it": len(real),
        "share of these that the same limits drop": float(limits.contradicted(real, truth).any(axis=1).mean()),
        "labels": counts,
    }
    write_json(report, as_json(facts), indent=2)
    return [images.images.keys[row] for row in images.rows[kept].tolist()]
