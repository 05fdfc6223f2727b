"""What is known of training images, from a table or from the JSON files beside them, and the words that follow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data import ImageDataset
from ..data.facts import facts_beside
from ..data.keys import match_keys, respell
from ..data.labels import NO_FINDING
from ..data.tables import CsvTable
from .conditions import Condition, PriorConditions

__all__ = ["UNCERTAIN", "Columns", "Facts", "encode_facts", "make_conditions", "read_facts", "stored_facts"]

UNCERTAIN = "?"  # behind a label: it may be there or not


@dataclass(frozen=True)
class Facts:
    """What is known of one image.

    Attributes:
        labels: The labels that it has; all others are absent. None: nothing is known of any label.
        uncertain: Labels that it may have.
        metadata: Values as they are written, by name; blank ones are left out.
        text: Its text, if it has one.
        patient: Its patient, if known.
    """

    labels: frozenset[str] | None = None
    uncertain: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns of a table, or entries of the JSON files, say what; None and () leave a thing out."""

    key: str = "file"
    labels: str | None = "findings"
    patient: str | None = None
    numbers: Sequence[str] = ()
    categories: Sequence[str] = ()
    text: str | None = None
    separator: str = "|"

    @property
    def metadata(self) -> list[str]:
        """Numbers, then categories."""
        return [*self.numbers, *self.categories]

    def read(self, row: Mapping[str, str | None]) -> Facts:
        """The facts of one row."""
        cell = {name: (row.get(name) or "").strip() for name in row if name is not None}
        labels, uncertain = None, frozenset()
        if self.labels is not None:
            names = [name.strip() for name in cell.get(self.labels, "").split(self.separator) if name.strip()]
            uncertain = frozenset(name[:-1].strip() for name in names if name.endswith(UNCERTAIN))
            labels = frozenset(name for name in names if not name.endswith(UNCERTAIN)) - uncertain
        return Facts(
            labels,
            uncertain,
            {name: cell[name] for name in self.metadata if cell.get(name)},
            (self.text and cell.get(self.text)) or None,
            (self.patient and respell(cell.get(self.patient, ""))) or None,
        )


def read_facts(path: str | Path, keys: Sequence[str], columns: Columns) -> list[Facts]:
    """Read a CSV file with a row for each image, or for some of them. Images without a row are unknown in everything.

    A label with a `?` behind it is unknown, and the labels that a row does not name are absent.

    Args:
        path: The file.
        keys: Of the images, in the order of the result.
        columns: What is read.

    Raises:
        ValueError: If a column is missing, an image comes twice, or no row belongs to an image.
    """
    wanted = [columns.key, columns.labels, columns.patient, columns.text, *columns.metadata]
    rows = [row for _, row in CsvTable(path).rows(list(filter(None, wanted)))]
    named = [row[columns.key].strip() for row in rows]
    if twice := [key for key, count in Counter(named).items() if count > 1]:
        raise ValueError(f"{len(twice)} images have several rows in {str(path)!r}, such as {twice[0]!r}.")
    facts = [Facts() for _ in keys]
    found = match_keys(named, keys)
    for row, place in zip(rows, found, strict=True):
        if place is not None:
            facts[place] = columns.read(row)
    if all(place is None for place in found):
        raise ValueError(
            f"No row of {str(path)!r} belongs to one of the {len(keys)} images: column {columns.key!r} names "
            f"{', '.join(map(repr, named[:3])) or 'nothing'}, the images are {', '.join(map(repr, keys[:3]))}."
        )
    return facts


def stored_facts(images: ImageDataset, columns: Columns) -> list[Facts]:
    """The same from the JSON files beside the images, as shards have them; an image without one is unknown.

    Raises:
        ValueError: If no image has one.
    """
    facts, known = [], 0
    for place in range(len(images)):
        try:
            entry = facts_beside(images, place)
        except KeyError:
            facts.append(Facts())
            continue
        known += 1
        labels = entry.get("labels") if columns.labels else None
        listed = isinstance(labels, list)
        row = {name: None if value is None else str(value) for name, value in entry.items()}
        row[columns.labels or ""] = columns.separator.join(map(str, labels)) if listed else ""
        own = columns.read(row)
        facts.append(own if listed or not columns.labels else replace(own, labels=None, uncertain=frozenset()))
    if not known:
        raise ValueError("No facts are stored beside these images (KEY.json in shards): give a table of labels.")
    return facts


def make_conditions(
    facts: Sequence[Facts], columns: Columns, exclusive: Iterable[str] | None = None, text_dim: int | None = None
) -> PriorConditions:
    """The vocabulary of a prior for these images: labels by frequency, statistics of numbers, values of categories.

    Args:
        facts: Of the training images.
        columns: Which of them the prior shall know.
        exclusive: Labels that come without any other; by default "No Finding", where there is one.
        text_dim: Width of the text encoder's tokens.

    Raises:
        ValueError: If labels or metadata are asked for and say nothing: none is there, or all images are alike.
    """
    counts = Counter(label for own in facts for label in own.labels or ())
    labels = sorted(counts, key=lambda name: (-counts[name], name))
    known = sum(own.labels is not None for own in facts)
    if columns.labels is not None:
        if not labels:
            raise ValueError(
                f"No training image has a label in {columns.labels!r}: train without labels, or name them."
            )
        if all(counts[name] == known for name in labels):
            raise ValueError(
                f"All {known} labelled images are {' and '.join(map(repr, labels))}: with one class there is nothing "
                "to ask for. Add images of others, or train an unconditional prior, without labels."
            )
    if exclusive is None:
        exclusive = [NO_FINDING] if NO_FINDING in labels else []
    numbers = {}
    for name in columns.numbers:
        values = torch.tensor([_number(name, own) for own in facts if name in own.metadata], dtype=torch.float64)
        if len(values) < 2 or not values.std() > 0:
            raise ValueError(f"The number {name!r} is the same in all {len(values)} training images that have it.")
        numbers[name] = (values.mean().item(), values.std().item())
    categories = {}
    for name in columns.categories:
        categories[name] = tuple(sorted({own.metadata[name] for own in facts if name in own.metadata}))
        if len(categories[name]) < 2:
            raise ValueError(f"The category {name!r} has no two values in the training images.")
    return PriorConditions(tuple(labels), tuple(exclusive), numbers, categories, text_dim)


def encode_facts(facts: Sequence[Facts], keys: Sequence[str], conditions: PriorConditions) -> Condition:
    """What is known of N images as numbers, without text. `keys` name an image whose facts contradict each other.

    Labels and values that the vocabulary does not have are unknown: held-out images may have some.
    """
    rows = []
    for own, key in zip(facts, keys, strict=True):
        vocabulary = conditions.labels
        present = [name for name in vocabulary if name in (own.labels or ())]
        absent = [] if own.labels is None else [n for n in vocabulary if n not in own.labels | own.uncertain]
        metadata: dict[str, Any] = {name: _number(name, own) for name in conditions.numbers if name in own.metadata}
        metadata |= {n: own.metadata[n] for n, known in conditions.categories.items() if own.metadata.get(n) in known}
        try:
            rows.append(conditions.encode(present, absent, metadata))
        except ValueError as error:
            raise ValueError(f"The facts of image {key!r} contradict each other: {error}") from error
    return Condition(
        *(torch.cat([getattr(row, name) for row in rows]) for name in ("labels", "numbers", "categories"))
    )


def _number(name: str, own: Facts) -> float:
    try:
        value = float(own.metadata[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name!r} must hold numbers, got {own.metadata[name]!r}. Give it as a category, or mend it.")
    return value
