"""The records of a source."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from .description import Source
from .fields import Finding, Template, combine, normalize_split, normalize_view
from .finder import FileFinder
from .records import Record
from .rows import Row, RowReader, SourceReport

__all__ = ["OpenSource"]

logger = logging.getLogger(__name__)


class OpenSource:
    """The records of a data set. Each iteration reads its tables anew.

    With `find_unlisted`, images without a row are looked for at the end, which takes a while on a network drive.
    `report` says what did not fit in the latest iteration; it is also logged as warnings at its end.

    Raises:
        FileNotFoundError: If the folder or a required table is not there; during iteration, if there is no image.
        ValueError: If a table cannot be read or lacks a column; during iteration, if a cell has an unknown value.
    """

    def __init__(self, source: Source, root: str | Path, find_unlisted: bool = True) -> None:
        self.source, self.root, self.find_unlisted = source, Path(root), find_unlisted
        self.report = SourceReport()
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {str(root)!r} to find {source.name} in.")
        self._rows = RowReader(source, self.root)
        self._masks = [FileFinder(self.root, [mask]) for mask in source.masks]
        self._id = Template(source.id) if source.id else None
        self._patient, self._view, self._split = map(source.value, ("patient", "view", "split"))

    def __iter__(self) -> Iterator[Record]:
        self.report = report = SourceReport()
        self._lists = self._load_lists()
        seen = array("q")  # hashes: 868,000 paths would take twenty times as much memory
        yield from self._grouped(seen) if self.source.repeats else self._single(seen)
        if self.find_unlisted:
            for path in self._rows.unlisted(seen):
                report.unlisted.add(path)
        for line in report.lines():
            logger.warning("%s: %s.", self.source.name, line)

    def _single(self, seen: array[int]) -> Iterator[Record]:
        ids: set[int] = set()
        for row in self._rows.read(self.report):
            seen.append(hash(row["path"]))
            record = self._record(row, self._finding(row))
            if hash(record.image_id) in ids:
                self.report.repeated.add(record.image_id)
                continue
            ids.add(hash(record.image_id))
            self.report.records += 1
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
            self.report.records += 1
            yield self._record(row, combine(findings, majority=self.source.repeats == "majority"))

    def _finding(self, row: Row) -> Finding:
        try:
            rules = zip(self.source.labels, self._rows.label_columns, strict=True)
            return combine([rule.read(row, columns) for rule, columns in rules])
        except ValueError as error:
            raise ValueError(f"{self.source.name}, {row['path']}: {error}") from error

    def _record(self, row: Row, finding: Finding) -> Record:
        path = row["path"]
        image_id = (self._id.fill(row) if self._id else "") or str(PurePosixPath(path).with_suffix(""))
        patient = self._patient.read(row) if self._patient else ""
        if self._patient and not patient:
            self.report.no_patient.add(image_id)
        masks = (finder.find(row) for finder in self._masks)
        rule = self.source.invert
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
            invert=row[rule["from"]] in rule["values"] if rule and row[rule["from"]] else None,
        )

    def _read_split(self, row: Row, image_id: str) -> str | None:
        if self._lists is not None:
            key = self.source.split.get("key")
            return self._lists.get(Template(key).fill(row) if key else image_id)
        try:
            return normalize_split(self._split.read(row)) if self._split else None
        except ValueError as error:
            raise ValueError(f"{self.source.name}, {row['path']}: {error}") from error

    def _load_lists(self) -> dict[str, str | None] | None:
        """Image -> split, from files that name one image on each line."""
        if not isinstance(self.source.split, Mapping) or "lists" not in self.source.split:
            return None
        splits: dict[str, str | None] = {}
        for split, name in self.source.split["lists"].items():
            path = self.root / name
            if path.is_file():
                lines = path.read_text(encoding="utf-8-sig").splitlines()
                splits.update(dict.fromkeys(filter(None, map(str.strip, lines)), normalize_split(split)))
            else:
                self.report.absent.append(name)
        return splits
