"""Labels and patients of images: from a table, or from the JSON files beside the images of a set. Soft labels, too."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .datasets import ImageDataset
from .facts import facts_beside, patient_in
from .keys import find_keys, unify
from .stores.folder import image_key
from .tables import CsvTable

__all__ = [
    "NO_FINDING",
    "PROBABILITIES",
    "LabelTable",
    "SoftLabelTable",
    "plain_label",
    "read_label_table",
    "read_soft_labels",
    "stored_labels",
]

NO_FINDING = "No Finding"
_SPELLINGS = {"pleuraleffusion": "effusion"}  # of other data sets, as TorchXRayVision maps them
PROBABILITIES = "probabilities"  # of soft labels: a column of tables, and a name in JSON files
_SOFT = (
    "has soft labels, and hard ones are needed here. read_soft_labels reads them; for hard ones make the set without "
    "an exponent."
)


@dataclass(frozen=True)
class LabelTable:
    """Labels and patients of N images.

    Attributes:
        keys: Name of each image within its data set, without repeats.
        labels: The labels of each image, which may be empty.
        patients: The patient of each image; where it is unknown, a patient of its own.
    """

    keys: tuple[str, ...]
    labels: tuple[frozenset[str], ...]
    patients: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.labels) == len(self.patients):
            raise ValueError(
                f"Each image has one key, its labels and a patient, got {len(self.keys)} keys, "
                f"{len(self.labels)} sets of labels and {len(self.patients)} patients."
            )
        twice = [key for key, count in Counter(self.keys).items() if count > 1]
        if twice:
            raise ValueError(f"{len(twice)} keys come more than once in the labels, such as {', '.join(twice[:3])}.")

    def __len__(self) -> int:
        return len(self.keys)

    def counts(self) -> dict[str, int]:
        """Images of each label, the most frequent first, then by name."""
        counts = Counter(label for labels in self.labels for label in labels)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def select(self, keys: Sequence[str]) -> LabelTable:
        """The rows of these keys, in their order and under their names; raises `KeyError` if the table lacks one.

        Other spellings of a key are known as well: see `keys.match_keys`.
        """
        chosen = find_keys(keys, self.keys, "images have no row in the labels")
        return LabelTable(
            tuple(keys),
            tuple(self.labels[i] for i in chosen),
            tuple(self.patients[i] for i in chosen),
        )

    def restrict(self, names: Sequence[str]) -> LabelTable:
        """The same images with only these labels; raises `ValueError` if no image has one of them."""
        absent = [name for name in names if not any(name in labels for labels in self.labels)]
        if absent:
            raise ValueError(
                f"No image is labelled {', '.join(map(repr, absent))}; there are {', '.join(self.counts())}."
            )
        return LabelTable(self.keys, tuple(labels & set(names) for labels in self.labels), self.patients)

    def most_frequent(self, count: int, always: Sequence[str] = (NO_FINDING,)) -> tuple[str, ...]:
        """The `count` most frequent findings (`ValueError` if there are fewer), then those of `always` that occur."""
        counts = self.counts()
        findings = [name for name in counts if name not in always]
        if len(findings) < count:
            raise ValueError(f"There are {len(findings)} findings ({', '.join(findings)}), not {count}.")
        return (*findings[:count], *(name for name in always if name in counts))

    def targets(self, names: Sequence[str]) -> np.ndarray:
        """`(N, L)` bool: which image has which of the labels `names`."""
        return np.array([[name in labels for name in names] for labels in self.labels], dtype=bool).reshape(
            len(self), len(names)
        )


@dataclass(frozen=True)
class SoftLabelTable:
    """Soft labels of N images.

    Attributes:
        keys: Name of each image, without repeats.
        probabilities: Of each image the probabilities of its labels, in [0, 1]; a label that is not named has 0.
    """

    keys: tuple[str, ...]
    probabilities: tuple[Mapping[str, float], ...]

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.probabilities) or len(set(self.keys)) < len(self.keys):
            raise ValueError("Each image has one key of its own and its probabilities.")
        for key, own in zip(self.keys, self.probabilities, strict=True):
            for name, value in own.items():
                if not 0 <= value <= 1:  # written so that a NaN does not pass
                    raise ValueError(f"The probability of {name!r} of image {key!r} must be in [0, 1], got {value}.")

    def targets(self, names: Sequence[str]) -> np.ndarray:
        """`(N, L)` float32, the probability of each of the labels `names`; ValueError if no image has one of them."""
        known = {name for own in self.probabilities for name in own}
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0)
                raise ValueError(
                    f"No image has a probability of {name!r}. The nearest label is {close[0]!r}."
                    if close
                    else "No image has a label."
                )
        rows = [[own.get(name, 0.0) for name in names] for own in self.probabilities]
        return np.array(rows, dtype=np.float32).reshape(len(self.keys), len(names))


def read_soft_labels(path: str | Path, separator: str = "|") -> SoftLabelTable:
    """Read the `labels.csv` of a synthetic set: `key`, and `probabilities` such as `Edema=1.0|Nodule=0.25`.

    A table of hard labels, with a column `labels` in place of `probabilities`, gives 1 for each label.

    Raises:
        ValueError: If a column is missing, or something is not a probability. The message names the line.
    """
    keys, rows = [], []
    table = CsvTable(path)
    column = PROBABILITIES if PROBABILITIES in table.header else "labels"
    for line, row in table.rows(["key", column]):
        named = {}
        for text in filter(None, row[column].split(separator)):
            name, sign, value = text.rpartition("=") if column == PROBABILITIES else (text, "=", "1")
            try:
                named[name] = float(value)
            except ValueError:
                sign = ""
            if not sign or not name or not 0 <= named[name] <= 1:
                raise ValueError(f"Line {line} of {str(path)!r} has {text!r}, not NAME=PROBABILITY in [0, 1].")
        keys.append(row["key"])
        rows.append(named)
    return SoftLabelTable(tuple(keys), tuple(rows))


def read_label_table(
    path: str | Path,
    key_column: str = "file",
    label_column: str | None = "findings",
    patient_column: str | None = "patient",
    separator: str = "|",
) -> LabelTable:
    """Read a CSV file with a row for each image; `ValueError` if a key or a patient is blank, or a key comes twice.

    Args:
        path: The file.
        key_column: Column of keys or of file names; the extension of an image file is dropped, folders are kept.
        label_column: Column of the labels of an image, joined by `separator`; may be blank. None leaves labels out.
        patient_column: Column of patients. None makes each image a patient of its own.
        separator: Between labels.
    """
    columns = [column for column in (key_column, patient_column, label_column) if column]
    table = CsvTable(path)
    if label_column and label_column not in table.header and PROBABILITIES in table.header:
        raise ValueError(f"{str(path)!r} {_SOFT}")
    keys, labels, patients = [], [], []
    for line, row in table.rows(columns):
        if blank := [column for column in columns if column != label_column and not row[column].strip()]:
            raise ValueError(f"Line {line} of {str(path)!r} has no {blank[0]!r}.")
        keys.append(image_key(row[key_column].strip()))
        names = (name.strip() for name in (row[label_column] if label_column else "").split(separator))
        labels.append(frozenset(name for name in names if name))
        patients.append(row[patient_column].strip() if patient_column else keys[-1])
    return LabelTable(tuple(keys), tuple(labels), tuple(unify(patients)))


def stored_labels(images: ImageDataset) -> LabelTable:
    """The labels beside the images in `KEY.json`, as shards have them; raises `ValueError` if an image has none."""
    labels, patients, keys = [], [], images.keys
    for place, key in enumerate(keys):
        try:
            facts = facts_beside(images, place)
        except KeyError as error:
            raise ValueError(f"No labels are stored beside image {key!r}: give a table of labels.") from error
        names = facts.get("labels")
        if names is None and PROBABILITIES in facts:
            raise ValueError(f"The set of image {key!r} {_SOFT}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"The facts of image {key!r} have no list of labels: give a table of labels.")
        labels.append(frozenset(names))
        patients.append(patient_in(facts) or key)
    return LabelTable(tuple(keys), tuple(labels), tuple(patients))


def plain_label(name: str) -> str:
    """What different spellings of a label have in common: letters and digits, small."""
    bare = "".join(character for character in name.lower() if character.isalnum())
    return _SPELLINGS.get(bare, bare)
