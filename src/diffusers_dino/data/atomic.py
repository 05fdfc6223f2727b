"""Files that are whole or not there at all, also after a kill or a loss of power."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["PARTIAL", "atomic_write", "sha256_of", "sync", "write_json"]

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file aside, force it to disk, then give it its name. On an error nothing is left behind.

    Args:
        path: The file; one of that name is replaced.

    Yields:
        A file to write bytes to.

    Raises:
        OSError: If the disk is full, or the folder is not writable.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write JSON as `atomic_write` does; the same content gives the same bytes."""
    with atomic_write(path) as file:
        separators = (",", ":") if indent is None else None
        file.write(json.dumps(content, indent=indent, separators=separators).encode() + b"\n")


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """Force a file, or a folder's list of names, to disk: a rename is lost in a power cut without the latter."""
    if os.name != "posix" and Path(path).is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
