"""The files below a folder: one walk for training, evaluation and sharding."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["RECORDS", "WORK", "FolderFiles", "is_junk", "list_files", "printable"]

# What a folder of shards or synthetic images keeps beside its tars; nobody looks for images there.
RECORDS = ".records"  # stays, so that a shard that is lost later can be made again
WORK = ".work"  # until all is complete
_OWN = (RECORDS, WORK)

# What storage servers and operating systems put into folders, and everything that is hidden.
_SYSTEM = (
    *("@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "~snapshot", "__MACOSX", "$RECYCLE.BIN"),
    *("System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"),
)
_JUNK = re.compile(rf"(^|/)(\.|({'|'.join(map(re.escape, _SYSTEM))})(/|$))", re.IGNORECASE | re.MULTILINE)


def is_junk(path: str) -> bool:
    """Whether a part of a path is hidden (`._a.png`, `.Trash-1000`) or a system's (`@eaDir`); of several, by lines."""
    return _JUNK.search(path) is not None


def printable(name: str) -> str:
    """A name with line breaks and the like, and bytes that are not UTF-8, as `%0A` and `%E9`."""
    return re.sub(r"[\x00-\x1f\x7f\udc80-\udcff]", lambda sign: f"%{ord(sign[0]) % 0xDC00:02X}", name)


@dataclass
class FolderFiles:
    """What is below a folder: paths that begin there, with `/`.

    Attributes:
        files: Regular files, sorted.
        left_out: By reason, what was not looked at.
    """

    files: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        """Note a file or folder that is left out."""
        self.left_out.setdefault(reason, []).append(path)

    def counts(self, examples: int = 3) -> list[str]:
        """Each reason with how much it keeps out, and some of the names."""
        return [
            f"{reason}: {len(paths)}"
            + (f", such as {', '.join(map(printable, paths[:examples]))}" if examples else "")
            for reason, paths in self.left_out.items()
        ]


def list_files(root: str | Path) -> FolderFiles:
    """List a folder and the folders below it; raises `OSError` if it cannot be opened.

    Links to folders are followed, but each folder is listed once, and none above `root`. Hidden files and folders,
    those of operating systems and storage servers, folders that may not be opened and dead links are noted. `RECORDS`
    and `WORK` are passed over.
    """
    found = FolderFiles()
    seen = {_identity(parent) for parent in Path(root).resolve().parents}
    folders, links = [""], []
    while folders or links:
        # Links come last, so that a file keeps the path that it has without them.
        path = folders.pop() if folders else links.pop(links.index(min(links)))
        try:
            identity = _identity(f"{root}/{path}")
            if identity in seen:
                found.leave_out("links to folders that are read anyway", path)
                continue
            seen.add(identity)
            with os.scandir(f"{root}/{path}") as entries:
                below = sorted((entry for entry in entries if entry.name not in _OWN), key=lambda entry: entry.name)
        except OSError as error:
            if not path:
                raise
            found.leave_out(f"folders that cannot be opened ({error.strerror})", path)
            continue
        for entry in below:
            inside = f"{path}/{entry.name}" if path else entry.name
            link = entry.is_symlink()  # whose target may be behind a loop, or closed
            if os.path.isdir(entry.path) if link else entry.is_dir():
                if is_junk(entry.name):
                    found.leave_out("hidden folders and those of systems", inside)
                else:
                    (links if link else folders).append(inside)
            elif os.path.isfile(entry.path) if link else entry.is_file():
                if is_junk(entry.name):
                    found.leave_out("hidden files and those of systems", inside)
                else:
                    found.files.append(inside)
            else:
                found.leave_out("links that lead nowhere, pipes and devices", inside)
    found.files.sort()
    return found


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
