"""Files by path or URL behind one small interface: which there are, how large they are, and ranges of their bytes."""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from ...files import read_regular

__all__ = ["ByteRange", "FileSystem", "LocalFileSystem", "expand_braces", "is_pattern"]

# Far below the usual limit of 1,024 open files in a process.
_MAX_HANDLES = 128


class ByteRange(NamedTuple):
    """`size` bytes of a file from `offset` on."""

    path: str
    offset: int
    size: int


class FileSystem(Protocol):
    """A place where files are."""

    def glob(self, pattern: str) -> list[str]:
        """The files that a pattern (`*`, `?`, `[...]`) matches, sorted."""

    def size(self, path: str) -> int:
        """Bytes of a file; raises `FileNotFoundError`."""

    def read(self, path: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes; raises `FileNotFoundError`, and `ValueError` if it has more."""

    def open(self, path: str) -> BinaryIO:
        """A file to read from start to end, seekable."""

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterable[bytes]:
        """The bytes of each range; fewer than asked for where a file ends too early or is gone."""

    def show(self, path: str) -> str:
        """A path as a message may show it."""


class LocalFileSystem(FileSystem):
    """Files of this machine. Handles stay open; a copy in another process opens its own."""

    def __init__(self) -> None:
        self._handles: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def glob(self, pattern: str) -> list[str]:
        parts = pattern.split("/")
        for number, part in enumerate(parts):  # a folder may be called `set[1]`
            if os.path.lexists("/".join(pattern.split("/")[: number + 1])):
                parts[number] = glob.escape(part)
        return sorted(path for path in glob.glob("/".join(parts), recursive=True) if Path(path).is_file())

    def size(self, path: str) -> int:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path!r}.")
        return Path(path).stat().st_size

    def read(self, path: str, limit: int) -> bytes:
        return read_regular(path, limit)

    def open(self, path: str) -> BinaryIO:
        return open(path, "rb")

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterable[bytes]:
        return (self._read_range(*one) for one in ranges)  # as they are used, while they are in the cache

    def show(self, path: str) -> str:
        return path

    def _read_range(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:  # threads share the handles, and one may close what another is about to read
            handle = self._handles.pop(path, None)
            if handle is None:
                try:
                    handle = open(path, "rb", buffering=0)  # noqa: SIM115
                except FileNotFoundError:
                    return b""
            self._handles[path] = handle
            if len(self._handles) > _MAX_HANDLES:
                self._handles.popitem(last=False)[1].close()
            if hasattr(os, "pread"):
                return os.pread(handle.fileno(), size, offset)  # forked processes share the position of a handle
            handle.seek(offset)
            return handle.read(size)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files."""
    return any(sign in path for sign in "*?[")


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand `{000..012}` and `{a,b}` as a shell does, but not in names that are there; leading zeros are kept."""
    from braceexpand import braceexpand

    if os.path.isfile(pattern):
        return iter([pattern])
    slashes = (place for place, sign in enumerate(pattern) if sign == "/")
    known = max((place for place in slashes if os.path.isdir(pattern[:place])), default=0)
    return (pattern[:known] + rest for rest in braceexpand(pattern[known:], escape=False))
