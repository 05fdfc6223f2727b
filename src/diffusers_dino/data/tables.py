"""CSV files, row by row."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..files import size_of_regular

__all__ = ["DAMAGE", "CsvTable", "unreadable_table"]

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
DAMAGE = (UnicodeError, csv.Error, EOFError, OSError, zlib.error)  # what reading a damaged table raises


class CsvTable:
    """A CSV file, or one with tabs (`.tsv`), and either as `.gz`.

    Args:
        path: The file.
        delimiter: Separator of the cells; by default a tab in `.tsv`, else a comma.
        encoding: Of the text; byte order marks of UTF-8 and UTF-16 are recognised.
        skip_rows: Lines before the header.
        hint: What an error says to do about text of another encoding.

    Attributes:
        header: The names of the columns.

    Raises:
        ValueError: If the file is empty, cannot be read (also later, when its rows are), or is a pipe. It is named.
    """

    def __init__(
        self,
        path: str | Path,
        delimiter: str | None = None,
        encoding: str = "utf-8",
        skip_rows: int = 0,
        hint: str = "Save it as UTF-8.",
    ) -> None:
        size_of_regular(path)
        self.path, self._encoding, self._skip_rows, self._hint = Path(path), encoding, skip_rows, hint
        self._delimiter = delimiter or ("\t" if ".tsv" in self.path.suffixes else ",")
        try:
            with self._text() as file:
                header = next(self._reader(file), None)
        except DAMAGE as error:
            raise unreadable_table(path, error, hint) from error
        if not header:
            raise ValueError(f"{str(path)!r} is empty: it has no header.")
        self.header = [name.strip() for name in header]

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """The number of the line and the wanted cells of each row; ValueError if a column is missing or comes twice.

        Rows are read one by one. One that is shorter than the wanted columns, or longer than the header, is damaged.
        """
        if missing := [column for column in wanted if column not in self.header]:
            raise ValueError(
                f"{str(self.path)!r} has no column {', '.join(map(repr, missing))}; "
                f"its columns are {', '.join(map(repr, self.header))}."
            )
        try:
            if twice := [column for column in wanted if self.header.count(column) > 1]:
                raise csv.Error(f"it has several columns {twice[0]!r}")
            with self._text() as file:
                yield from self._rows(self._reader(file), wanted)
        except DAMAGE as error:
            raise unreadable_table(self.path, error, self._hint) from error

    def _rows(self, reader: Any, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        next(reader)
        count, places = len(self.header), [self.header.index(column) for column in wanted]
        cells = itemgetter(*places) if len(places) > 1 else lambda row: tuple(row[place] for place in places)
        last = max(places, default=0)
        for row in reader:
            line = reader.line_num + self._skip_rows
            if last < len(row) and not any(row[count:]):
                yield line, dict(zip(wanted, cells(row), strict=True))
            elif row:
                raise csv.Error(f"line {line} has {len(row)} cells, the header {count}: damaged?")

    def _text(self) -> io.TextIOBase:
        opener = gzip.open if self.path.suffix == ".gz" else open
        with opener(self.path, "rb") as file:
            mark = file.read(2)
        encoding = "utf-16" if mark in _UTF16_MARKS else self._encoding
        return opener(self.path, "rt", encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="")

    def _reader(self, file: io.TextIOBase) -> Any:
        for _ in range(self._skip_rows):
            file.readline()
        return csv.reader(file, delimiter=self._delimiter)


def unreadable_table(path: str | Path, error: Exception, encoding_hint: str = "") -> ValueError:
    """An error that names the file, the reason and what to do; the hint is for text of another encoding."""
    hint = encoding_hint if isinstance(error, UnicodeError) else ""
    if "field larger" in str(error):
        hint = f"A cell has more than {csv.field_size_limit():,} characters: is a quote not closed?"
    return ValueError(f"Cannot read {str(path)!r}: {error}. {hint}".rstrip())
