"""The rows of a source, each with all its columns and the path of its image, and what did not fit."""

from __future__ import annotations

import glob
import itertools
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ...files import read_json
from ..keys import respell
from ..stores.archives import parent_of, split_name
from ..stores.walk import is_junk
from .description import Source, Table
from .fields import Template, as_list, is_one_of
from .finder import FileFinder, is_image
from .records import Record
from .tables import OpenTable, open_table

__all__ = ["Row", "RowReader", "SourceReport", "without_extension"]

Row = dict[str, str]

Joined = tuple[Template, list[str], dict[str, tuple[str, ...]]]

PATH_COLUMNS = ("path", "folder", "stem")
_EXAMPLES = 10


@dataclass
class Named:
    """A count, and the first few of what was counted."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(name)


@dataclass
class SourceReport:
    """What was read of a source, and what did not fit (see `lines`). Complete once its records were iterated over.

    `absent` are optional files that were not there.
    `expects_labels`: the description says which column holds labels.
    """

    expects_labels: bool = False
    records: int = 0
    label_sets: set[tuple[str, ...] | None] = field(default_factory=set)  # at most two
    missing: Named = field(default_factory=Named)
    unlisted: Named = field(default_factory=Named)
    repeated: Named = field(default_factory=Named)
    no_patient: Named = field(default_factory=Named)
    no_sidecar: Named = field(default_factory=Named)
    unjoined: Named = field(default_factory=Named)
    companions: Named = field(default_factory=Named)
    hidden: Named = field(default_factory=Named)
    in_lists: int = 0  # images that the lists of splits name
    lost_lists: int = 0  # names in those lists, if none of them is an image's
    absent: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count an image, and note whether all have the same labels."""
        self.records += 1
        if len(self.label_sets) < 2:
            self.label_sets.add(record.labels)

    def lines(self, show: Callable[[str], str] = str) -> list[str]:
        """What did not fit, one sentence each, with a few names as `show` gives them; empty if all did."""
        sentences = {
            "rows have no image": self.missing,
            "images have no row that is used, and were left out": self.unlisted,
            "rows repeat an image, and only its first was kept": self.repeated,
            "images have no patient id, and count as a patient each": self.no_patient,
            "images have no JSON file beside them": self.no_sidecar,
            "rows have no counterpart in a joined table": self.unjoined,
            "pictures accompany an image, as KEY.seg.png does KEY.png, and were left out": self.companions,
            "files are hidden or those of systems, and were left out": self.hidden,
        }
        told = {text: (n.count, ", ".join(map(show, n.examples[:3]))) for text, n in sentences.items() if n.count}
        lines = [f"{count} {text}, such as {names}" for text, (count, names) in told.items()]
        if self.expects_labels and self.records > 1 and len(self.label_sets) == 1:
            labels = next(iter(self.label_sets))
            what = "no label" if labels is None else " and ".join(map(repr, labels)) or "no finding"
            lines.append(f"all {self.records} images have the same label: {what}. Is the column of the labels right?")
        if self.lost_lists:
            lines.append(f"none of the {self.lost_lists} names in the lists of splits is an image's")
        return lines + [f"{name!r} is not there; what it says is unknown" for name in self.absent]


class RowReader:
    """Reads the tables of a source, or the names of its files, and finds the image of each row.

    Messages name files as `show` gives them.
    """

    def __init__(self, source: Source, root: Path, show: Callable[[str], str]) -> None:
        self.source, self.root, self._show = source, root, show
        self._images = FileFinder(root, source.patterns, show) if source.table else None
        self._expressions = {
            column: [re.compile(one) for one in as_list(several)] for column, several in source.derive.items()
        }
        self._tables = [opened for table in source.table if (opened := open_table(table, root, source)) is not None]
        self._joins = [(table, open_table(table, root, source)) for table in source.join]
        header = [column for table in self._tables for column in table.header if column not in table.table.columns]
        self.label_columns = [rule.findings_columns(dict.fromkeys(header)) for rule in source.labels]
        self._needed = self._named_columns()
        self._sidecar_columns = self._check_columns()
        self._early, self._late = self._split_conditions()
        self._blank = dict.fromkeys(self._needed, "")

    def read(self, report: SourceReport) -> Iterator[Row]:
        """Each row whose image is there, with its `path`; what does not fit goes to the report."""
        report.absent += [table.files[0] for table, opened in self._joins if opened is None]
        joined = self._load_joins()
        added = [name for _, columns, _ in joined for name in columns if name in self._expressions]
        rows = self._table_rows() if self._tables else self._file_rows(report)
        empty = True
        for row in rows:
            _join(row, joined, report)
            self._derive(row, added)
            if self._is_wanted(row, self._early) and self._locate(row, report) and self._is_wanted(row, self._late):
                empty = False
                yield row
        if empty:
            missing, looked = report.missing, " or ".join(map(repr, self.source.patterns))
            first = f"the first {self._show(missing.examples[0])!r}" if missing.count else ""
            few = f" {missing.count} rows have none there, {first}." if missing.count else ""
            raise FileNotFoundError(f"No image of {self.source.name} in {str(self.root)!r}: looked for {looked}.{few}")

    def unlisted(self, seen: array[int]) -> Iterator[str]:
        """The images to which a row could lead, but whose path's hash is not in `seen`."""
        hashes = np.unique(np.asarray(seen, np.int64))
        found: set[str] = set()
        for path in self._images.all_images(self.source.inventory) if self._images is not None else ():
            place = np.searchsorted(hashes, hash(path))
            if (place == len(hashes) or hashes[place] != hash(path)) and path not in found:
                found.add(path)
                yield path

    def _named_columns(self) -> list[str]:
        """The columns that some part of the description names."""
        source = self.source
        names: list[str] = [*source.where, *self._expressions]
        templates = [*source.patterns, *source.masks, source.id or ""]
        templates += [table.match or "" for table in source.join]
        templates += [str(source.split.get("key", ""))] if isinstance(source.split, Mapping) else []
        for value in (*map(Template, templates), *map(source.value, ("patient", "view", "split"))):
            names += value.columns if value is not None else ()
        for rule, columns in zip(source.labels, self.label_columns, strict=True):
            names += [*rule.needs, *columns]
        names += [source.invert["from"]] if source.invert else []
        names += [source.rater] if source.rater else []
        return list(dict.fromkeys(names))

    def _check_columns(self) -> list[str]:
        """Refuse columns that no table has. Those that a sidecar has to give are returned."""
        derived = [name for several in self._expressions.values() for one in several for name in one.groupindex]
        opened = [*self._tables, *(table for _, table in self._joins if table is not None)]
        given = {*derived, *PATH_COLUMNS, "row"}.union(*(table.header for table in opened))
        unknown = [name for name in self._needed if name not in given]
        for table, joined in self._joins:
            keys = Template(table.key or table.match or "").columns
            lost = [name for name in keys if joined is not None and name not in joined.header]
            if joined is not None and (lost or not keys):
                known = ", ".join(filter(None, joined.header))
                raise ValueError(f"{str(joined.path)!r} is joined by {keys}; give match, and key, from {known}.")
        if self.source.sidecar:
            return unknown
        if unknown and all(table is not None for _, table in self._joins):
            files = ", ".join(repr(str(table.path)) for table in opened) or "the file names"
            columns = ", ".join(filter(None, sorted(given)))
            raise ValueError(f"{self.source.name} needs the column {unknown[0]!r}. From {files} there are {columns}.")
        return []

    def _split_conditions(self) -> tuple[list[str], list[str]]:
        """The columns of `where` that are known before an image is looked for, and those that come with it."""
        late = {*self._sidecar_columns, *(PATH_COLUMNS if self._images is not None else ())}
        for column in late & {*self._expressions}:
            late |= {name for expression in self._expressions[column] for name in expression.groupindex}
        names = list(self.source.where)
        return [name for name in names if name not in late], [name for name in names if name in late]

    def _load_joins(self) -> list[Joined]:
        """What each joined table adds: the columns that are needed and that no table before it has."""
        left = [name for name in self._needed if not any(name in table.header for table in self._tables)]
        joined = []
        for table, opened in self._joins:
            if opened is not None:
                joined.append(_load_join(table, opened, [name for name in left if name in opened.header]))
                left = [name for name in left if name not in opened.header]
        return joined

    def _table_rows(self) -> Iterator[Row]:
        number = itertools.count()
        for table in self._tables:
            wanted = [column for column in dict.fromkeys(table.header) if column in self._blank]
            for cells in table.rows(wanted):
                row = self._blank | cells
                row["row"] = str(next(number))
                self._derive(row, [column for column in self._expressions if column not in PATH_COLUMNS])
                yield row

    def _file_rows(self, report: SourceReport) -> Iterator[Row]:
        """A row for each file of a source without a table, sorted by path."""
        found = (glob.iglob(pattern, root_dir=self.root, recursive=True) for pattern in self.source.patterns)
        every = {path.replace(os.sep, "/") for path in itertools.chain(*found)}
        for path in filter(is_junk, sorted(every)):
            report.hidden.add(path)
        paths = sorted(path for path in every if is_image(self.root, path))
        keys = {split_name(path)[0] for path in paths}
        accompanying = {path for path in paths if parent_of(split_name(path)[0], keys) is not None}
        for path in sorted(accompanying):
            report.companions.add(path)
        for number, path in enumerate(path for path in paths if path not in accompanying):
            row = self._blank | _path_columns(path) | {"row": str(number)}
            self._derive(row, self._expressions)
            yield row

    def _derive(self, row: Row, columns: Collection[str]) -> None:
        for column in columns:
            for expression in self._expressions[column]:
                row.update(dict.fromkeys(expression.groupindex, ""))
            matches = (expression.search(row[column]) for expression in self._expressions[column])
            match = next(filter(None, matches), None)
            row.update(match.groupdict("") if match else {})

    def _is_wanted(self, row: Row, columns: Iterable[str]) -> bool:
        return all(is_one_of(row[column].strip(), self.source.where[column]) for column in columns)

    def _locate(self, row: Row, report: SourceReport) -> bool:
        """Find the image of a row and complete its columns; False, and counted, if it is not there."""
        if self._images is not None:
            path = self._images.find(row)
            if path is None:
                report.missing.add(self._images.templates[0].fill(row) or f"row {row['row']}")
                return False
            row.update(_path_columns(path))
            self._derive(row, [column for column in self._expressions if column in PATH_COLUMNS])
        if self._sidecar_columns:
            row.update(self._read_sidecar(row["path"], report))
            self._derive(row, [column for column in self._sidecar_columns if column in self._expressions])
        return True

    def _read_sidecar(self, image: str, report: SourceReport) -> Row:
        try:
            content = read_json(self.root / f"{without_extension(image)}{self.source.sidecar}")
        except FileNotFoundError:
            report.no_sidecar.add(image)
            content = {}
        except ValueError as error:
            reason = error.__cause__ or "it is not a file of a sensible size"
            raise ValueError(f"The {self.source.sidecar} beside {self._show(image)} is damaged: {reason}") from error
        return {column: _dig(content, column) for column in self._sidecar_columns}


def _load_join(table: Table, opened: OpenTable, columns: list[str]) -> Joined:
    """The key of a row, the columns that a joined table adds, and their cells for each key."""
    match, key = Template(table.match or ""), Template(table.key or table.match or "")
    same: dict[tuple[str, ...], tuple[str, ...]] = {}  # most rows say the same few things: keep each once
    rows: dict[str, tuple[str, ...]] = {}
    for row in opened.rows(list(dict.fromkeys([*columns, *key.columns]))):
        cells = tuple(row[column] for column in columns)
        if name := key.fill(row):  # a blank is no counterpart of another blank
            rows.setdefault(name, same.setdefault(cells, cells))
    for name in [name for name in rows if respell(name) != name]:
        rows.setdefault(respell(name), rows[name])
    return match, columns, rows


def _join(row: Row, joined: Iterable[Joined], report: SourceReport) -> None:
    for match, columns, rows in joined:
        key = match.fill(row)
        if (cells := rows.get(key) or rows.get(respell(key))) is not None:
            row.update(zip(columns, cells, strict=True))
        else:
            report.unjoined.add(key or "a blank")


def _path_columns(path: str) -> Row:
    folder, _, name = path.rpartition("/")
    return {"path": path, "folder": folder or ".", "stem": without_extension(name)}


def without_extension(path: str) -> str:
    """A path without its extension; the last number of a DICOM UID is none."""
    suffix = PurePosixPath(path).suffix
    return path if suffix[1:].isdigit() else path.removesuffix(suffix)


def _dig(content: object, path: str) -> str:
    """`a.b.0` of nested mappings and lists, as text; `""` if there is none."""
    for key in path.split("."):
        if isinstance(content, list) and key.isdigit() and int(key) < len(content):
            content = content[int(key)]
        elif isinstance(content, dict) and key in content:
            content = content[key]
        else:
            return ""
    return str(content)
