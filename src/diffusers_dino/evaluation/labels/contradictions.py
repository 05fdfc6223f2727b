"""Which images of a synthetic set to keep: those whose labels no judge contradicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from ...data import ImageDataset
from ...data.keys import find_keys
from ...data.labels import LabelTable
from ...data.tables import CsvTable
from ...devices import device_of
from ...files import write_csv
from ...metrics.auroc import label_auroc
from ..classifier import ClassifierSettings
from ..folds import check_fraction
from ..judge import Limits, check_left
from ..results import JsonResult
from ..table_text import markdown_table
from .judges import SyntheticImages
from .protocol import open_judges, train_judges

__all__ = ["FilterResult", "FilteredLabel", "filter_by_judge", "format_filter_table"]

KEPT = "kept.csv"
DROPPED = "dropped.csv"


@dataclass(frozen=True)
class FilteredLabel:
    """One label in a filtered set.

    Attributes:
        given, dropped: Images that were given it, and those of them that are dropped, for whatever label.
        not_seen: Images that were given it, where the judge says that it is not there.
        not_given: Images that were not given it, where the judge says that it is there.
        auroc: How well the judges tell it in real images that they have not seen; None with a single class.
    """

    label: str
    given: int
    dropped: int
    not_seen: int
    not_given: int
    auroc: float | None


@dataclass(frozen=True)
class FilterResult(JsonResult):
    """What was kept of a set.

    Attributes:
        num_images, num_kept: Images of the set that can be read, and those that are kept.
        false_alarms: Share of correct labels of real images that the limits contradict, for each label.
        num_real, real_dropped: Real images that the judges have not seen, and the share of them that the same limits
            would drop: what is dropped beyond it is the images' own.
        num_hidden: Real images that no judge was shown, since their patients are to be tested.
        labels: Each label.
    """

    num_images: int
    num_kept: int
    false_alarms: float
    num_real: int
    real_dropped: float
    num_hidden: int
    labels: tuple[FilteredLabel, ...]


def filter_by_judge(
    images: ImageDataset,
    table: LabelTable,
    folder: str | Path,
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    false_alarms: float = 0.05,
    test_keys: Sequence[str] = (),
    num_folds: int = 5,
    classifier: ClassifierSettings | None = None,
    validation_fraction: float = 0.15,
    seed: int = 0,
    num_workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> FilterResult:
    """Drop the images of a finished set whose labels a judge contradicts, and write the rows of the others.

    Judges are those of `evaluate_labels`, kept in `judges/`: classifiers of real images, each without two folds of
    patients; an image is judged by one that has not seen its sources' patients, or by one that is drawn for it. Limits
    are of each judge's own held-out real images, see `Limits`. A soft label between 0 and 1 is not contradicted.

    Writes `kept.csv` (the rows of the set's `labels.csv` that stay), `dropped.csv` (key, label, what it was given and
    what the judge says) and `filter.json`. The same arguments give the same files; the set itself is not changed.

    Args:
        images, table: As for `evaluate_labels`.
        folder: Of the set.
        labels: Names of labels to judge; by default as for `evaluate_labels`.
        false_alarms: Share of correct labels of real images that may be contradicted, in [0, 0.5], of each label.
        test_keys: Real images whose patients will test a classifier that is trained on the set: no image of these
            patients reaches a judge.
        num_folds, classifier, validation_fraction, seed, num_workers, device: As for `evaluate_labels`.

    Raises:
        ValueError: As `evaluate_labels`, if a source is of a test patient, or no image of a label is left.
        KeyError: If a test key is not of one of the images.
    """
    check_fraction(false_alarms, "false_alarms")
    table = table.select(images.keys)
    found = find_keys(test_keys, table.keys, "test images are not among the real images")
    tested = {table.patients[row] for row in found}
    shown = [key for key, patient in zip(table.keys, table.patients, strict=True) if patient not in tested]
    options = {"num_folds": num_folds, "classifier": classifier, "validation_fraction": validation_fraction}
    # the labels are those of all images, whoever is tested
    labels = tuple(labels or table.most_frequent(4))
    output = Path(output_dir)
    with open_judges(images.select(shown), table, output, labels=labels, seed=seed, **options) as judges:
        settings = judges.settings
        one = SyntheticImages.open(folder, output / "synthetic.npy", settings.size, settings.channels)
        if unlabelled := [image.key for image in one.planned if image.given is None]:
            raise ValueError(f"{len(unlabelled)} images of {folder} have no labels to judge, such as {unlabelled[0]}.")
        pairs = train_judges(judges, [one], num_workers=num_workers, device=device, progress=progress)
        own, said = judges.scores(one, device_of(0, device))
        given, wrong = one.given(labels), np.zeros(said.shape, bool)
        dropped_real, auroc = [], []
        for pair in pairs:
            rows, probabilities = judges.judge_real(pair, device_of(0, device))
            targets = judges.table.targets(labels)[rows]
            limits = Limits.of_real(probabilities, targets, false_alarms)
            mine = (own == pair).all(axis=1)
            wrong[mine] = limits.contradicted(said[mine], given[mine])
            dropped_real.append(limits.contradicted(probabilities, targets).any(axis=1))
            auroc.append(label_auroc(probabilities, targets))
        kept = ~wrong.any(axis=1)
        check_left(given, kept, labels)
        keys = [image.key for image in one.planned]
        stays = {keys[i] for i in np.flatnonzero(kept).tolist()}
        listed = CsvTable(Path(folder) / "labels.csv")
        rows = (tuple(row.values()) for _, row in listed.rows(listed.header))
        write_csv(output / KEPT, listed.header, (row for row in rows if row[0] in stays))
        places = np.argwhere(wrong).tolist()
        reasons = ((keys[i], labels[j], f"{given[i, j]:g}", f"{said[i, j]:.4f}") for i, j in places)
        write_csv(output / DROPPED, ("key", "label", "given", "judge"), reasons)
        result = FilterResult(
            num_images=len(kept),
            num_kept=int(kept.sum()),
            false_alarms=false_alarms,
            num_real=sum(map(len, dropped_real)),
            real_dropped=float(np.concatenate(dropped_real).mean()),
            num_hidden=len(table) - len(shown),
            labels=tuple(_label(name, i, given, kept, wrong, auroc) for i, name in enumerate(labels)),
        )
        result.save(output / "filter.json")
    return result


def format_filter_table(result: FilterResult) -> str:
    """A line for each label, in Markdown, and a sentence about the whole."""
    header = ["label", "given", "dropped", "given, not seen", "not given, seen", "AUROC of the judges"]
    counts = attrgetter("label", "given", "dropped", "not_seen", "not_given")
    body = [[*counts(row), "" if row.auroc is None else f"{row.auroc:.3f}"] for row in result.labels]
    dropped = 1 - result.num_kept / result.num_images
    text = (
        f"{result.num_kept} of {result.num_images} images are kept, {dropped:.1%} dropped. The same limits would drop "
        f"{result.real_dropped:.1%} of held-out real images (N = {result.num_real}, each counted for each judge that "
        f"has not seen it). {result.num_hidden} images of test patients reached no judge."
    )
    return f"{markdown_table(header, body)}\n\n{text}\n"


def _label(
    name: str, place: int, given: np.ndarray, kept: np.ndarray, wrong: np.ndarray, auroc: Sequence[np.ndarray]
) -> FilteredLabel:
    has, contradicted = given[:, place] == 1, wrong[:, place]
    told = [values[place] for values in auroc if np.isfinite(values[place])]
    return FilteredLabel(
        name,
        given=int(has.sum()),
        dropped=int((has & ~kept).sum()),
        not_seen=int((has & contradicted).sum()),
        not_given=int((~has & contradicted).sum()),
        auroc=float(np.mean(told)) if told else None,
    )
