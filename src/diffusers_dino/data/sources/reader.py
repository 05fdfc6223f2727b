"""The records of a source."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..keys import read_keys, respell
from ..splits import SPLITS
from .description import Source
from .fields import Finding, Template, combine, is_one_of, normalize_split, normalize_view
from .finder import FileFinder
from .records import Record, salted_key
from .rows import Row, RowReader, SourceReport, without_extension

__all__ = ["OpenSource"]

logger = logging.getLogger(__name__)


class OpenSource:
    """The records of a data set. Each iteration reads its tables anew.

    `report` says what did not fit in the latest iteration, also images without a row, which are looked for at its end;
    it is then logged as warnings, too.

    Raises:
        FileNotFoundError: If the folder or a required table is not there; during iteration, if there is no image.
        ValueError: If a table cannot be read or lacks a column; during iteration, if a cell has an unknown value.
    """

    def __init__(self, source: Source, root: str | Path) -> None:
        self.source, self.root = source, Path(root)
        self.report = SourceReport()
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {str(root)!r} to find {source.name} in.")
        self._salt: str | None = None
        self._rows = RowReader(source, self.root, self._shown)
        self._masks = [FileFinder(self.root, [mask], self._shown) for mask in source.masks]
        self._id = Template(source.id) if source.id else None
        self._patient, self._view, self._split = map(source.value, ("patient", "view", "split"))

    def __iter__(self) -> Iterator[Record]:
        return self.records()

    def records(self, salt: str | None = None) -> Iterator[Record]:
        """The records. With a salt, messages name `salted_key`s in place of files and ids, which may name patients."""
        self._salt = salt
        labels = any(not rule.constant for rule in self.source.labels)
        self.report = report = SourceReport(expects_labels=labels)
        self._lists = self._load_lists()
        seen = array("q")  # hashes: 868,000 paths would take twenty times as much memory
        for record in self._grouped(seen) if self.source.repeats else self._single(seen):
            report.add(record)
            yield record
        for path in self._rows.unlisted(seen):
            report.unlisted.add(path)
        if self._lists and not report.in_lists:
            report.lost_lists = len(self._lists)
        for line in report.lines(self._shown):
            logger.warning("%s: %s.", self.source.name, line)

    def _shown(self, name: str) -> str:
        return name if self._salt is None or not name.strip() else salted_key(self.source.name, name, self._salt)

    def _single(self, seen: array[int]) -> Iterator[Record]:
        ids: set[int] = set()
        for row in self._rows.read(self.report):
            seen.append(hash(row["path"]))
            record = self._record(row, self._finding(row))
            if hash(record.image_id) in ids:
                self.report.repeated.add(record.image_id)
                continue
            ids.add(hash(record.image_id))
            yield record

    def _grouped(self, seen: array[int]) -> Iterator[Record]:
        """Records of images with several rows each. All rows are kept in memory: sets with many raters are small."""
        rows: dict[str, Row] = {}
        raters: dict[str, dict[str, list[Finding]]] = {}
        for row in self._rows.read(self.report):
            path = row["path"]
            seen.append(hash(path))
            rows.setdefault(path, row)
            rater = row[self.source.rater] if self.source.rater else ""
            raters.setdefault(path, {}).setdefault(rater or f"row {row['row']}", []).append(self._finding(row))
        for path, row in rows.items():
            findings = [combine(of_one) for of_one in raters[path].values()]
            yield self._record(row, combine(findings, majority=self.source.repeats == "majority"))

    def _finding(self, row: Row) -> Finding:
        try:
            rules = zip(self.source.labels, self._rows.label_columns, strict=True)
            return combine([rule.read(row, columns) for rule, columns in rules])
        except ValueError as error:
            raise ValueError(f"{self.source.name}, {self._shown(row['path'])}: {error}") from error

    def _record(self, row: Row, finding: Finding) -> Record:
        path = row["path"]
        image_id = (self._id.fill(row) if self._id else "") or without_extension(path)
        patient = self._patient.read(row) if self._patient else ""
        if self._patient and not patient:
            self.report.no_patient.add(image_id)
        masks = (finder.find(row) for finder in self._masks)
        rule = self.source.invert
        polarity = row[rule["from"]].strip() if rule else ""
        return Record(
            source=self.source.name,
            image=self.root / path,
            image_id=image_id,
            patient=patient or image_id,
            labels=finding.present if finding.labelled else None,
            uncertain=finding.uncertain,
            view=normalize_view(self._view.read(row)) if self._view else None,
            split=self._read_split(row, image_id),
            masks=tuple(self.root / mask for mask in masks if mask is not None),
            raw=self.source.raw,
            invert=is_one_of(polarity, rule["values"]) if rule and polarity else None,
        )

    def _read_split(self, row: Row, image_id: str) -> str | None:
        if self._lists is not None:
            key = self.source.split.get("key")
            split = self._lists.get(respell(Template(key).fill(row) if key else image_id))
            self.report.in_lists += split is not None
            return split
        try:
            return normalize_split(self._split.read(row)) if self._split else None
        except ValueError as error:
            raise ValueError(f"{self.source.name}, {self._shown(row['path'])}: {error}") from error

    def _load_lists(self) -> dict[str, str | None] | None:
        """Image -> split, from files that name one image on each line; of several, the last one of `SPLITS`."""
        if not isinstance(self.source.split, Mapping) or "lists" not in self.source.split:
            return None
        splits: dict[str, str | None] = {}
        lists = [(normalize_split(split), name) for split, name in self.source.split["lists"].items()]
        for split, name in sorted(lists, key=lambda one: (None, *SPLITS).index(one[0])):
            path = self.root / name
            if path.is_file():
                splits.update(dict.fromkeys(map(respell, read_keys(path)), split))
            else:
                self.report.absent.append(name)
        return splits
