"""Which file belongs to a row, and which files have no row."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..images.reading import is_image_file
from ..keys import respell
from ..stores.archives import split_name
from ..stores.walk import is_junk
from .fields import Row, Template

__all__ = ["FileFinder", "is_image"]


def is_image(root: Path, path: str) -> bool:
    """Whether a path below a folder is of an image that can be read: one of `read_image`, or a headerless `.img`."""
    if is_junk(path) or split_name(path)[1].startswith("mask.") or not os.path.isfile(root / path):
        return False
    try:
        return path.lower().endswith(".img") or is_image_file(root / path)
    except OSError:
        return False


class FileFinder:
    """Finds the file of a row by path templates below a root. The first template that leads to a file counts.

    If a folder of a template holds `*` (`images_*/images/{Image Index}`), the folders that match are listed once.
    """

    def __init__(self, root: Path, patterns: Sequence[str], show: Callable[[str], str] = str) -> None:
        self.root, self._show = root, show
        self._base = os.path.abspath(root)
        self.templates = [Template(pattern) for pattern in patterns]
        self._folders: dict[int, dict[str, str | None]] = {}
        for template in self.templates:
            folder, _, name = template.text.rpartition("/")
            if "*" in name or ("*" in folder and Template(folder).columns):
                raise ValueError(f"{template.text!r}: a wildcard may only be in a folder, before any column")

    def find(self, row: Row) -> str | None:
        """The path below the root, or None; `ValueError` if it leads out of the root or is in several folders.

        Where there is no such file, cells are also read as Windows and spreadsheets write them: see `respell`.
        """
        return self._find(row) or self._find({column: respell(cell) for column, cell in row.items()})

    def _find(self, row: Row) -> str | None:
        for number, template in enumerate(self.templates):
            if "*" in template.text:
                found = self._look_up(number, Template(template.text.rpartition("/")[2]).fill(row))
            else:
                found = self._check(template.fill(row))
            if found is not None:
                return found
        return None

    def all_images(self, inventory: Sequence[str] = ()) -> Iterator[str]:
        """All images, below the root, that match a glob of the inventory; by default those a row could lead to."""
        for pattern in inventory or [template.wildcard() for template in self.templates]:
            for path in glob.iglob(pattern, root_dir=self.root, recursive=True):
                if is_image(self.root, path.replace(os.sep, "/")):
                    yield path.replace(os.sep, "/")

    def _check(self, path: str) -> str | None:
        if not path:
            return None
        path = os.path.normpath(os.path.relpath(path, self._base) if os.path.isabs(path) else path)
        if path.split(os.sep, 1)[0] == os.pardir:
            raise ValueError(
                f"A row leads to {self._show(path)!r}, out of {str(self.root)!r}: give a folder that holds it."
            )
        there = (one for one in _compositions(path) if os.path.isfile(f"{self._base}/{one}"))
        return next((one.replace(os.sep, "/") for one in there), None)

    def _look_up(self, number: int, name: str) -> str | None:
        if number not in self._folders:
            self._folders[number] = self._list(self.templates[number].text.rpartition("/")[0])
        folders = self._folders[number]
        name = next((one for one in _compositions(name) if one in folders), name)
        folder = folders.get(name, "")
        if folder is None:
            places = f"{self.templates[number].text!r} of {str(self.root)!r}"
            raise ValueError(
                f"{self._show(name)!r} is in several of the folders {places}: the table cannot tell which is meant."
            )
        return f"{folder}/{name}" if folder else None

    def _list(self, pattern: str) -> dict[str, str | None]:
        """File name -> the folder it is in; None if it is in several."""
        folders: dict[str, str | None] = {}
        for folder in sorted(glob.glob(pattern, root_dir=self.root)):
            if os.path.isdir(self.root / folder):
                for entry in os.scandir(self.root / folder):
                    if entry.is_file():
                        folders[entry.name] = None if entry.name in folders else folder.replace(os.sep, "/")
        return folders


def _compositions(name: str) -> dict[str, None]:
    """A name as it is, and with accents composed and decomposed: macOS and Linux differ."""
    return dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))))
