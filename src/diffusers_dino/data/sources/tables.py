"""Label files as rows: CSV and its variants, COCO's JSON, OpenI's reports."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from ...files import read_json, size_of_regular
from ..tables import DAMAGE, CsvTable, unreadable_table
from .description import Source, Table

__all__ = ["OpenTable", "open_table"]

_MOST_JSON = 1 << 30


class OpenTable:
    """The columns and rows of a file. Raises ValueError, with file and reason, if it cannot be read."""

    def __init__(self, table: Table, path: Path) -> None:
        self.table, self.path = table, path
        self._csv: CsvTable | None = None
        if table.format == "csv":
            hint = f"It is not {table.encoding}: name its encoding in the description (encoding: latin-1)."
            self._csv = CsvTable(path, table.delimiter, table.encoding, table.skip_rows, hint)
            stored = self._csv.header
        elif table.format in _READERS:
            stored = _READERS[table.format][0]
        else:
            raise ValueError(f"A table's format is csv, {' or '.join(_READERS)}, got {table.format!r}")
        self.header = [*stored, *table.columns]

    def rows(self, wanted: Sequence[str]) -> Iterator[dict[str, str]]:
        """The wanted columns of each row, which must be in `header`; rows are read one by one."""
        added = {column: str(self.table.columns[column]) for column in wanted if column in self.table.columns}
        stored = [column for column in wanted if column not in added]
        if self._csv is not None:
            yield from (row | added for _, row in self._csv.rows(stored))
            return
        try:
            for row in _READERS[self.table.format][1](self.path):
                yield {column: row[column] for column in stored} | added
        except (*DAMAGE, ElementTree.ParseError) as error:
            raise unreadable_table(self.path, error) from error


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
