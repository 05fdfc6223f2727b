"""Classifiers of real images judge synthetic ones, and one of synthetic images is tested on real ones.

The first asks whether images show their labels, the second whether they are of use (train on synthetic, test on real;
Esteban et al. 2017, arXiv 1706.02633). Real images are cut into two halves by patient: each half's classifier is
tested on the other, which is the control of both. Any labelled images can be asked, also such as have no sources;
`evaluate_labels` is stricter where they have, and `evaluate_augmentation` asks how much synthetic images help.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...data.labels import plain_label
from ...devices import deterministic
from ...files import make_writable_folder
from ...metrics.auroc import draw_weights, stratified_auroc, with_mean
from ...metrics.bootstrap import percentile_interval
from ...seeds import derive_seed
from ..classifier import ClassifierSettings, LabelledImages, predict, train_classifier
from ..folds import assign_folds
from ..image_sets import ImageSet
from ..packed import pack_images
from ..results import JsonResult

__all__ = ["Bounded", "LabelTransfer", "TransferResult", "common_labels", "evaluate_transfer"]

_HALVES, _SHUFFLES = 2, 200


@dataclass(frozen=True)
class Bounded:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LabelTransfer:
    """AUROC of one label, or the mean over labels (`macro`).

    Attributes:
        label: Its name among the real images.
        num_real, num_synthetic: Images that have it; for `macro`, all images.
        real: Classifiers of real images on real images of other patients.
        synthetic: The same classifiers on synthetic images and the labels that these were given.
        agreement: Synthetic minus real.
        shuffled: The middle of shuffles of the synthetic labels, and the ends that hold 95 % of them.
        student: A classifier of synthetic images on all real ones.
        utility: Student minus real.
    """

    label: str
    num_real: int
    num_synthetic: int
    real: Bounded
    synthetic: Bounded
    agreement: Bounded
    shuffled: Bounded
    student: Bounded
    utility: Bounded


@dataclass(frozen=True)
class TransferResult(JsonResult):
    """All figures of one set.

    Attributes:
        num_real, num_patients, num_synthetic: Labelled images; None where patients are not known.
        left_out: Labels that only one of the sets has, or that too few images have.
        model: Name of the architecture.
        seed, repeats: Of training and bootstrap; draws of the latter.
        rows: The mean first, then each label.
    """

    num_real: int
    num_patients: int | None
    num_synthetic: int
    left_out: tuple[str, ...]
    model: str
    seed: int
    repeats: int
    rows: tuple[LabelTransfer, ...]

    @property
    def macro(self) -> LabelTransfer:
        """The mean over labels."""
        return self.rows[0]

    @property
    def judges_see(self) -> bool:
        """Whether classifiers tell the labels of real images: better than by chance, with the whole interval."""
        return self.macro.real.low > 0.5

    @property
    def labels_agree(self) -> bool:
        """Whether synthetic labels are told as well as real ones, as far as the interval says."""
        return self.macro.agreement.high >= 0 and self.macro.synthetic.value > self.macro.shuffled.high

    @property
    def is_useful(self) -> bool:
        """Whether synthetic images train as well as half of the real ones, as far as the interval says."""
        return self.macro.utility.high >= 0


def common_labels(ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """The label of `theirs` that each of `ours` is, apart from capitals and punctuation; the others are not there."""
    known = {plain_label(name): name for name in sorted(theirs)}
    return {name: known[plain_label(name)] for name in sorted(ours) if plain_label(name) in known}


def evaluate_transfer(
    real: ImageSet,
    synthetic: ImageSet,
    folder: str | Path,
    *,
    classifier: ClassifierSettings | None = None,
    fewest: int = 10,
    bootstrap_repeats: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TransferResult:
    """Train two classifiers on halves of the real images and one on the synthetic images, and exchange them.

    Args:
        real: Real images with labels, of other patients than the generator was trained on. Where patients are not
            known, each image counts as one.
        synthetic: Images with labels; those that both sets have are used.
        folder: Where packed images go.
        classifier: Architecture and training, of all three alike.
        fewest: Images of either set that must have a label, and as many that must not.
        bootstrap_repeats: Draws of the intervals, over patients of either set, or images where these are not known.
        seed: Of halves, training, bootstrap and shuffles.

    ValueError if a set has no labels, or no label is common to both sets and frequent enough.
    """
    classifier, folder = classifier or ClassifierSettings(), make_writable_folder(folder)
    for name, one in (("real", real), ("synthetic", synthetic)):
        if not one.labels:
            raise ValueError(f"The {name} images have no labels: give a table of them.")
    same = common_labels(synthetic.label_names, real.label_names)
    if not same:
        raise ValueError(
            f"No label is common to synthetic images ({_shown(synthetic.label_names)}) and real ones "
            f"({_shown(real.label_names)}): name them alike."
        )
    names = sorted(set(same.values()))

    def labelled(one: ImageSet, file: str, renamed: Mapping[str, str]) -> LabelledImages:
        """The images that have labels, with those of `names` as their targets."""
        packed = pack_images(one.images.resized(classifier.size), folder / file, one.place, classifier.channels)
        rows = np.flatnonzero([key in one.labels for key in packed.keys])
        given = [{renamed.get(x, x) for x in one.labels[packed.keys[row]]} for row in rows.tolist()]
        return LabelledImages(packed, rows, np.array([[name in own for name in names] for own in given], dtype=bool))

    ours, theirs = labelled(real, "real.npy", {}), labelled(synthetic, "made.npy", same)
    counts = [np.minimum(one.targets.sum(axis=0), (~one.targets).sum(axis=0)) for one in (ours, theirs)]
    enough = np.minimum(*counts) >= fewest
    if not enough.any():
        raise ValueError(
            f"Of {', '.join(names)}, no label has {fewest} images and as many without it in both sets: give more "
            "images."
        )
    labels = [name for name, used in zip(names, enough.tolist(), strict=True) if used]
    every = {*real.label_names, *(same.get(name, name) for name in synthetic.label_names)}
    ours, theirs = (one._replace(targets=one.targets[:, enough]) for one in (ours, theirs))
    patients, made_of = _patients_of(real, ours), _patients_of(synthetic, theirs)
    halves = assign_folds(ours.targets, patients, _HALVES, seed)
    real_scores, judged = np.empty(ours.targets.shape), []
    with deterministic(threads=1):
        for half in range(_HALVES):
            tested, own_seed = halves == half, derive_seed(seed, "judge", half)
            judge = train_classifier([ours.select(~tested)], None, classifier, own_seed, device)
            real_scores[tested] = predict(judge.model, ours.select(tested), device)
            judged.append(predict(judge.model, theirs, device))
        student = train_classifier([theirs], None, classifier, derive_seed(seed, "student"), device)
        student_scores = predict(student.model, ours, device)
    figures = _figures(
        (real_scores, np.concatenate(judged), student_scores),
        (ours.targets, np.concatenate([theirs.targets] * _HALVES)),
        (halves, np.repeat(np.arange(_HALVES), len(theirs.rows))),
        (patients, made_of),
        bootstrap_repeats,
        seed,
    )
    totals = ([len(one.rows), *one.targets.sum(axis=0).tolist()] for one in (ours, theirs))
    return TransferResult(
        num_real=len(ours.rows),
        num_patients=len(set(patients)) if real.patients else None,
        num_synthetic=len(theirs.rows),
        left_out=tuple(sorted(every - set(labels))),
        model=classifier.name,
        seed=seed,
        repeats=bootstrap_repeats,
        rows=tuple(
            LabelTransfer(name, *counts, **{figure: columns[i] for figure, columns in figures.items()})
            for i, (name, *counts) in enumerate(zip(["macro", *labels], *totals, strict=True))
        ),
    )


def _patients_of(one: ImageSet, labelled: LabelledImages) -> list[str]:
    """The patient of each image, or its key: then each counts as one."""
    keys = [labelled.images.keys[row] for row in labelled.rows.tolist()]
    return [one.patients[key] for key in keys] if one.patients else keys


def _figures(
    scores: tuple[np.ndarray, np.ndarray, np.ndarray],
    targets: tuple[np.ndarray, np.ndarray],
    strata: tuple[np.ndarray, np.ndarray],
    patients: tuple[Sequence[str], Sequence[str]],
    repeats: int,
    seed: int,
) -> dict[str, list[Bounded]]:
    """Each figure of `LabelTransfer`, of the mean and of each label."""
    real, judged, student = scores
    weights = draw_weights(patients[0], strata[0].tolist(), repeats, seed)
    number = len(judged) // _HALVES
    chosen = draw_weights(patients[1], [0] * number, repeats, derive_seed(seed, "synthetic"))
    of_real, of_made = (targets[0], strata[0]), (targets[1], strata[1])
    values, draws = {}, {}
    for name, one, other, drawn in (
        ("real", real, of_real, weights),
        ("synthetic", judged, of_made, np.concatenate([chosen] * _HALVES, axis=1)),
        ("student", student, of_real, weights),
    ):
        values[name] = with_mean(stratified_auroc(one, *other))[0]
        draws[name] = with_mean(stratified_auroc(one, *other, drawn))
    for name, first in (("agreement", "synthetic"), ("utility", "student")):
        values[name], draws[name] = (kind[first] - kind["real"] for kind in (values, draws))
    random = np.random.default_rng(derive_seed(seed, "shuffles"))
    shuffled = []
    for _ in range(_SHUFFLES):
        order = np.concatenate([random.permutation(number)] * _HALVES)
        shuffled.append(stratified_auroc(judged, targets[1][order], strata[1])[0])
    draws["shuffled"] = with_mean(np.array(shuffled))
    values["shuffled"] = np.median(draws["shuffled"], axis=0)
    return {
        name: [Bounded(float(v), *percentile_interval(d)) for v, d in zip(values[name], draws[name].T, strict=True)]
        for name in values
    }


def _shown(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "none"
