"""Does a synthetic image show what its label says? A classifier trained on real images of other patients is asked."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...data import ImageDataset
from ...data.labels import LabelTable
from ...devices import count_workers, device_of
from ...files import make_writable_folder, remove_partials, work_folder
from ...metrics.auroc import check_classes
from ...workers import progress_bar, run_apart
from ..classifier import ClassifierSettings, make_classifier
from ..folds import assign_folds, check_fraction
from ..packed import pack_images
from .judges import Judges, SyntheticImages, held_out_pairs
from .result import LabelPreservationResult, RealScores, score_real, score_sets

__all__ = ["evaluate_labels", "open_judges", "train_judges"]

logger = logging.getLogger(__name__)


def evaluate_labels(
    images: ImageDataset,
    table: LabelTable,
    sets: Mapping[str, str | Path | Sequence[str | Path]],
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    ratios: Sequence[int] = (),
    num_folds: int = 5,
    classifier: ClassifierSettings | None = None,
    validation_fraction: float = 0.15,
    seed: int = 0,
    bootstrap_repeats: int = 1000,
    num_workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> LabelPreservationResult:
    """Train judges on real images, and score the labels of synthetic ones by them.

    Judges stay in the folder: called again, what was stopped goes on, and other sets are scored by the same judges.

    Args:
        images: Real images, among them the sources of all sets. A prior's set has none: whether it shows the labels
            that were asked for is measured, and nothing is compared with sources.
        table: Labels and patients of (at least) these images: the labels that the sets were made with.
        sets: By name the folders that `synthesise` has completed; several of one name are taken together.
        output_dir: Where judges and packed images go.
        ratios: Smaller ratios of synthetic to real images to show as well, from the beginnings of the plans.
        num_folds: Folds of patients, at least 3; each judge is trained without two of them.
        validation_fraction: Share of the training patients that chooses a judge's weights; 0 takes the last weights.
        seed: Of folds, training, bootstrap and shuffles.
        labels, classifier, bootstrap_repeats, num_workers, device: As in `evaluate_augmentation`.

    Raises:
        ValueError: If there is no set, a set has sources that are not among the images, its labels are not those of
            the table, or soft, or an argument is out of its range.
        FileNotFoundError: If a set is not complete.
        KeyError: If an image has no row in the table.
        RuntimeError: If another process is at work in the folder, or a judge could not be trained.
    """
    if not sets:
        raise ValueError("There is no set to judge.")
    if any(ratio < 1 for ratio in ratios):
        raise ValueError(f"Ratios are 1 or more, got {list(ratios)}.")
    options = {"num_folds": num_folds, "classifier": classifier, "validation_fraction": validation_fraction}
    with open_judges(images, table, output_dir, labels=labels, seed=seed, **options) as judges:
        opened = _open_sets(sets, Path(output_dir), judges.settings)
        members = [one for parts in opened.values() for one in parts]
        pairs = train_judges(judges, members, num_workers=num_workers, device=device, progress=progress)
        place, draws = device_of(0, device), {"repeats": bootstrap_repeats, "seed": seed}
        judged = {name: [judges.judge(one, place) for one in parts] for name, parts in opened.items()}
        result = LabelPreservationResult(
            labels=judges.labels,
            num_folds=num_folds,
            num_real=len(judges.table),
            num_real_patients=len(set(judges.table.patients)),
            model=judges.settings.name,
            judges_seed=seed,
            real=_score_judges(judges, pairs, place, **draws),
            parts=score_sets(judged, judges.labels, ratios=ratios, **draws),
            **draws,
        )
        if not result.judges_see:
            logger.warning(
                "The classifiers are no better than chance on real images: what they say of synthetic ones says "
                "nothing. Train them longer, or on more images."
            )
        return result


@contextmanager
def open_judges(
    images: ImageDataset,
    table: LabelTable,
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    num_folds: int = 5,
    classifier: ClassifierSettings | None = None,
    validation_fraction: float = 0.15,
    seed: int = 0,
) -> Iterator[Judges]:
    """Pack the real images, share out their patients to folds, and hold the folder of the judges.

    Arguments and errors are those of `evaluate_labels`.
    """
    check_fraction(validation_fraction)
    held_out_pairs(np.zeros((0, 2), np.int64), num_folds)  # refuses too few folds before images are read
    classifier = classifier or ClassifierSettings()
    table = table.select(images.keys)
    labels = tuple(labels or table.most_frequent(4))
    table = table.restrict(labels)
    make_classifier(classifier, len(labels))  # refuses what timm does not make before images are read
    with work_folder(output_dir) as output:
        folder = make_writable_folder(output / "judges")
        remove_partials(folder)
        real = pack_images(images.resized(classifier.size), output / "real.npy", channels=classifier.channels)
        table = table.select(real.keys)
        targets = table.targets(labels)
        check_classes(targets, labels, "the real data")
        folds = assign_folds(targets, table.patients, num_folds, seed)
        yield Judges(real, table, labels, folds, classifier, folder, validation_fraction, seed)


def train_judges(
    judges: Judges, sets: Sequence[SyntheticImages], *, num_workers: int | None, device: str | None, progress: bool
) -> list[tuple[int, int]]:
    """Train the judges that these sets need, and return the folds that are held out from each."""
    pairs = judges.pairs_for(sets)
    jobs, problems = [(judges, pair, device) for pair in pairs], []
    with progress_bar("Classifiers", "classifier", len(pairs), show=progress) as bar:
        for outcome in run_apart(_train_judge, jobs, count_workers(num_workers, device)):
            if outcome.error:
                problems.append(f"the classifier without folds {pairs[outcome.number]}: {outcome.error}")
            bar.update()
    if problems:
        raise RuntimeError(f"{len(problems)} classifiers were not trained: {'; '.join(problems)}")
    return pairs


def _open_sets(
    sets: Mapping[str, str | Path | Sequence[str | Path]], output: Path, classifier: ClassifierSettings
) -> dict[str, list[SyntheticImages]]:
    opened: dict[str, list[SyntheticImages]] = {}
    place = itertools.count()
    for name, folders in sets.items():
        for folder in [folders] if isinstance(folders, (str, Path)) else folders:
            file = re.sub(r"[^\w.-]+", "_", f"set-{next(place)}-{Path(folder).resolve().name}") + ".npy"
            one = SyntheticImages.open(folder, output / file, classifier.size, classifier.channels)
            if one.is_soft:
                raise ValueError(
                    f"{folder} has soft labels, of which there is no AUROC: that needs labels that are there or not. "
                    "Judge a set of the same plan without an exponent."
                )
            opened.setdefault(name, []).append(one)
    return opened


def _train_judge(place: int, judges: Judges, pair: tuple[int, int], device: str | None) -> None:
    judges.train(pair, device_of(place, device))


def _score_judges(
    judges: Judges, pairs: Sequence[tuple[int, int]], device: str, **options: int
) -> tuple[RealScores, ...]:
    """How good the judges are on real images that they have not seen."""
    found = [judges.judge_real(pair, device) for pair in pairs]
    rows = np.concatenate([rows for rows, _ in found])
    numbers = np.repeat(np.arange(len(found)), [len(rows) for rows, _ in found])
    patients = [judges.table.patients[row] for row in rows.tolist()]
    targets = judges.table.targets(judges.labels)[rows]
    probabilities = np.concatenate([values for _, values in found])
    return score_real(probabilities, targets, numbers, rows, patients, judges.labels, **options)
