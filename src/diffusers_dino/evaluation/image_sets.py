"""A collection of images and what is known of them, from whatever they are kept in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import ImageDataset, Preprocessing, open_images, read_label_table, stored_labels
from ..data.keys import respell
from ..data.sources import open_source, source_names
from ..data.stores.folder import image_key
from ..data.tables import CsvTable

__all__ = ["STORED", "ImageSet", "open_image_set"]

STORED = "stored"

logger = logging.getLogger(__name__)


class ImageSet(NamedTuple):
    """Images to score, and what is known of them.

    Attributes:
        labels: Of each key. An image that is not there is unlabelled; None: all are.
        patients: Of each key; None: unknown.
        place: Where the images come from, for reports.
    """

    images: ImageDataset
    labels: Mapping[str, frozenset[str]] | None = None
    patients: Mapping[str, str] | None = None
    place: str = ""

    def select(self, keys: Sequence[str]) -> ImageSet:
        """The images of these keys."""
        return self._replace(images=self.images.select(keys))

    @property
    def patient_list(self) -> list[str] | None:
        """The patient of each image, in their order; None: unknown."""
        return None if self.patients is None else [self.patients[key] for key in self.images.keys]

    @property
    def label_names(self) -> set[str]:
        """All labels that an image has."""
        return set().union(*(self.labels.get(key, ()) for key in self.images.keys)) if self.labels else set()


def open_image_set(
    source: str | Path,
    preprocessing: Preprocessing,
    table: str | Path | None = None,
    key_column: str = "file",
    label_column: str | None = "findings",
    patient_column: str | None = "patient",
    max_unreadable: float = 0.05,
) -> ImageSet:
    """Open images with their labels and patients.

    Args:
        source: What `data.open_images` takes, or `NAME=FOLDER`: a data set of the catalogue, with what its own tables
            say of the images.
        preprocessing: How images are prepared.
        table: CSV file with a row for each image, or `"stored"`: in the JSON files beside the images of shards.
        key_column, label_column, patient_column: Columns of the CSV file. Labels are joined by `|`. Labels or patients
            are unknown where the column is None or not there.
        max_unreadable: See `data.ImageDataset`.

    Errors are those of `open_images` and `read_label_table`; ValueError also if an image has no row.
    """
    name, equals, folder = str(source).partition("=")
    if equals and (name in source_names() or name.endswith((".yaml", ".yml"))):
        return _of_catalogue(name, folder, preprocessing, max_unreadable)
    images = open_images(source, preprocessing, max_unreadable=max_unreadable, local_files_only=True)
    if table is None:
        return ImageSet(images, place=str(source))
    if str(table) == STORED:
        found = stored_labels(images)
        has_patients = any(patient != key for key, patient in zip(found.keys, found.patients, strict=True))
    else:
        header = CsvTable(table).header
        for column in filter(None, (label_column, patient_column)):
            if column not in header:
                logger.warning("%s has no column %r; its columns are %s.", table, column, ", ".join(header))
        label_column, patient_column = (
            column if column in header else None for column in (label_column, patient_column)
        )
        found = read_label_table(table, key_column, label_column, patient_column).select(images.keys)
        has_patients = patient_column is not None
    labels = dict(zip(found.keys, found.labels, strict=True)) if label_column else None
    patients = dict(zip(found.keys, found.patients, strict=True)) if has_patients else None
    return ImageSet(images, labels, patients, str(source))


def _of_catalogue(name: str, folder: str, preprocessing: Preprocessing, max_unreadable: float) -> ImageSet:
    labels, patients = {}, {}
    for record in open_source(name, folder):
        key = image_key(record.image.relative_to(folder).as_posix())
        patients[key] = respell(record.patient)
        if record.labels is not None:
            labels[key] = frozenset(record.labels)
    images = open_images(folder, preprocessing, max_unreadable=max_unreadable, local_files_only=True)
    return ImageSet(images.select(list(patients)), labels or None, patients, f"{name}={folder}")
