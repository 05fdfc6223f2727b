"""Label files as rows: CSV and its variants, COCO's JSON, OpenI's reports."""

from __future__ import annotations

import csv
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from xml.etree import ElementTree

from ...files import read_json, size_of_regular
from .description import Source, Table

__all__ = ["OpenTable", "open_table", "unreadable_table"]

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DAMAGE = (UnicodeError, csv.Error, EOFError, OSError, zlib.error, ElementTree.ParseError)
_MOST_JSON = 1 << 30


class OpenTable:
    """The columns and rows of a file. Raises ValueError, with file and reason, if it cannot be read."""

    def __init__(self, table: Table, path: Path) -> None:
        self.table, self.path = table, path
        if table.format == "csv":
            self.header = [*self._csv_header(), *table.columns]
        elif table.format in _READERS:
            self.header = [*_READERS[table.format][0], *table.columns]
        else:
            raise ValueError(f"A table's format is csv, {' or '.join(_READERS)}, got {table.format!r}")

    def rows(self, wanted: Sequence[str]) -> Iterator[dict[str, str]]:
        """The wanted columns of each row, which must be in `header`; rows are read one by one."""
        added = {column: str(self.table.columns[column]) for column in wanted if column in self.table.columns}
        stored = [column for column in wanted if column not in added]
        try:
            if self.table.format == "csv":
                yield from (row | added for row in self._csv_rows(stored))
            else:
                for row in _READERS[self.table.format][1](self.path):
                    yield {column: row[column] for column in stored} | added
        except _DAMAGE as error:
            raise self._unreadable(error) from error

    def _csv_header(self) -> list[str]:
        try:
            with self._text() as file:
                header = next(self._reader(file), None)
        except _DAMAGE as error:
            raise self._unreadable(error) from error
        if not header:
            raise ValueError(f"{str(self.path)!r} is empty: it has no header.")
        return [name.strip() for name in header]

    def _csv_rows(self, wanted: list[str]) -> Iterator[dict[str, str]]:
        with self._text() as file:
            reader = self._reader(file)
            header = [name.strip() for name in next(reader)]
            if twice := [column for column in wanted if header.count(column) > 1]:
                raise csv.Error(f"it has several columns {twice[0]!r}")
            places = [header.index(column) for column in wanted]
            cells = itemgetter(*places) if len(places) > 1 else lambda row: tuple(row[place] for place in places)
            last = max(places, default=0)
            for row in reader:
                if last < len(row) and not any(row[len(header) :]):
                    yield dict(zip(wanted, cells(row), strict=True))
                elif row:
                    raise csv.Error(f"line {reader.line_num} has {len(row)} cells, the header {len(header)}: damaged?")

    def _text(self) -> io.TextIOBase:
        opener = gzip.open if self.path.suffix == ".gz" else open
        with opener(self.path, "rb") as file:
            mark = file.read(2)
        encoding = "utf-16" if mark in _UTF16_MARKS else self.table.encoding
        return opener(self.path, "rt", encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="")

    def _reader(self, file: io.TextIOBase) -> Iterator[list[str]]:
        for _ in range(self.table.skip_rows):
            file.readline()
        tabs = ".tsv" in self.path.suffixes
        return csv.reader(file, delimiter=self.table.delimiter or ("\t" if tabs else ","))

    def _unreadable(self, error: Exception) -> ValueError:
        hint = f"It is not {self.table.encoding}: name its encoding in the description (encoding: latin-1)."
        return unreadable_table(self.path, error, hint)


def unreadable_table(path: str | Path, error: Exception, encoding_hint: str) -> ValueError:
    """An error that names the file, the reason and what to do; the hint is for text of another encoding."""
    hint = encoding_hint if isinstance(error, UnicodeError) else ""
    if "field larger" in str(error):
        hint = f"A cell has more than {csv.field_size_limit():,} characters: is a quote not closed?"
    return ValueError(f"Cannot read {str(path)!r}: {error}. {hint}".rstrip())


def open_table(table: Table, root: Path, source: Source) -> OpenTable | None:
    """Find and open a table: below the root, or in torchxrayvision's package. None if it is optional and not there."""
    for name in table.files:
        found = sorted(root.glob(name)) or sorted(root.glob(f"{name}.gz"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"Several files in {str(root)!r} match {name!r}: {names}. Keep only the one to read.")
        if found:
            if not found[0].is_dir():  # of OpenI's reports
                size_of_regular(found[0])
            return OpenTable(table, found[0])
    package = find_spec("torchxrayvision") if table.torchxrayvision else None
    if package is not None and package.origin:
        path = Path(package.origin).parent / "data" / str(table.torchxrayvision)
        if path.is_file():
            return OpenTable(table, path)
    if table.optional:
        return None
    names = " or ".join(map(repr, table.files))
    origin = f" It is part of the data set: {source.url}" if source.url else ""
    raise FileNotFoundError(f"{source.name} needs {names} in {str(root)!r}, which is not there.{origin}")


def _coco_rows(path: Path) -> Iterator[dict[str, str]]:
    """A row for each image of a COCO file, with the names of the categories of its boxes."""
    content = read_json(path, _MOST_JSON, csv.Error)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        of_image: dict[int, dict[str, None]] = {}
        for box in content["annotations"]:
            of_image.setdefault(box["image_id"], {})[names[box["category_id"]]] = None
        for image in content["images"]:
            categories = "|".join(of_image.get(image["id"], ()))
            yield {"file_name": image["file_name"], "id": str(image["id"]), "categories": categories}
    except (KeyError, TypeError) as error:
        raise csv.Error(f"it is not a COCO file of images, annotations and categories ({error!r})") from error


def _openi_rows(path: Path) -> Iterator[dict[str, str]]:
    """A row for each image of OpenI's reports (a folder or tar of XML files), with the report's major MeSH terms."""
    for report in _openi_reports(path):
        identifier = report.find("uId")
        terms = "|".join((node.text or "").strip() for node in report.findall(".//MeSH/major"))
        for image in report.findall(".//parentImage"):
            name = identifier.attrib["id"] if identifier is not None else ""
            yield {"image": image.attrib["id"], "report": name, "mesh": terms}


def _openi_reports(path: Path) -> Iterator[ElementTree.Element]:
    if path.is_dir():
        for file in sorted(path.glob("*.xml")):
            yield ElementTree.fromstring(file.read_bytes())
        return
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".xml"):
                    yield ElementTree.fromstring(tar.extractfile(member).read())  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise csv.Error(str(error)) from error


_READERS = {
    "coco": (("file_name", "id", "categories"), _coco_rows),
    "openi": (("image", "report", "mesh"), _openi_rows),
}
