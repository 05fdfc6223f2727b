"""The images of a provider as its label files describe them, and which of their labels are frequent enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..images.dicom_header import salted_hash

if TYPE_CHECKING:
    from ..images.reading import RawLayout

__all__ = ["Record", "label_prevalence", "salted_key", "select_labels"]


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what its provider says of it.

    Attributes:
        source: Name of the data set in the catalogue, such as `"padchest"`.
        image: The file.
        image_id: The provider's name of the image, unique within the source; may hold dots and slashes.
        patient: The provider's patient id, **not hashed**: hash it before you write it anywhere. The image's id if the
            provider gives none.
        labels: Findings stated as present. An empty tuple: looked at, and none present. None: unlabelled.
        uncertain: Findings that the provider marks as uncertain; they are not in `labels`.
        view: `"PA"`, `"AP"`, `"LATERAL"`, `"FRONTAL"` or the provider's own word; None if unknown.
        split: The official split: `"train"`, `"validation"` or `"test"`; None if the provider has none.
        masks: Files that together are the segmentation mask, such as those of the left and the right lung. They have
            the image's size unless `Source.notes` says otherwise.
        raw: How to read a file without a header; None if it has one.
        invert: Whether bone is dark in the file, so that the values must be inverted. None: as the file's header says.
    """

    source: str
    image: Path
    image_id: str
    patient: str
    labels: tuple[str, ...] | None = None
    uncertain: tuple[str, ...] = ()
    view: str | None = None
    split: str | None = None
    masks: tuple[Path, ...] = ()
    raw: RawLayout | None = None
    invert: bool | None = None

    @property
    def names_patient(self) -> bool:
        """Whether the provider says whose the image is."""
        return self.patient != self.image_id


def salted_key(source: str, image_id: str, salt: str) -> str:
    """The name of an image that does not tell its id: that of its source, and a salted hash."""
    return f"{source}-{salted_hash(f'{source}/{image_id}', salt)}"


def label_prevalence(records: Iterable[Record]) -> dict[str, float]:
    """Label -> fraction of the labelled records that have it, in (0, 1]; the most frequent first."""
    counts: Counter[str] = Counter()
    labelled = 0
    for record in records:
        if record.labels is not None:
            labelled += 1
            counts.update(set(record.labels))
    return {label: count / labelled for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def select_labels(records: Iterable[Record], minimum_prevalence: float = 0.04) -> Iterator[Record]:
    """Each record with only its frequent labels, as the paper does for MIMIC-CXR (4 % or more).

    An image whose findings are all rare becomes unlabelled: it is not an image without findings. `minimum_prevalence`
    is a fraction of the labelled records, in [0, 1]. They are iterated over twice: an iterator raises `TypeError`.
    """
    if not 0 <= minimum_prevalence <= 1:
        raise ValueError(f"minimum_prevalence is a fraction in [0, 1], got {minimum_prevalence}")
    if iter(records) is records:
        raise TypeError("select_labels iterates over the records twice: give a source or a list, not an iterator")
    kept = {label for label, share in label_prevalence(records).items() if share >= minimum_prevalence}
    return (_keep(record, kept) for record in records)


def _keep(record: Record, kept: set[str]) -> Record:
    if not record.labels and not record.uncertain:
        return record
    labels = tuple(label for label in record.labels or () if label in kept)
    uncertain = tuple(label for label in record.uncertain if label in kept)
    return replace(record, labels=labels if labels or not record.labels else None, uncertain=uncertain)
