"""Files and folders that are complete or not there at all, also after a kill or a power cut; a lock on a folder."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from weakref import WeakSet

__all__ = [
    "PARTIAL",
    "atomic_write",
    "beside",
    "csv_text",
    "is_csv_of",
    "lock_file",
    "lock_folder",
    "make_writable_folder",
    "mark_of",
    "open_private",
    "read_json",
    "read_regular",
    "recover_folder",
    "refuse_other_folder",
    "remove_partials",
    "save_atomically",
    "sha256_of",
    "size_of_regular",
    "sync",
    "tolerate_missing_locks",
    "work_folder",
    "write_csv",
    "write_json",
]

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
_PIECE = 4096
# What pipelines, their parts, LoRA, training runs and synthetic sets are known by.
_NOT_TO_BE_MIXED = (
    "model_index.json",
    "config.json",
    "pytorch_lora_weights.safetensors",
    "run.json",
    "training_arguments.json",
    "plan.json",
)
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def atomic_write(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a file aside, force it to disk, then give it its name. On an error nothing is left behind."""
    path = Path(path)
    _refuse_folder(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            _force(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is needed: move it away, or give another path.")


def remove_partials(folder: Path) -> None:
    """Remove what killed runs of `atomic_write` left in a folder. Other runs must not be at work there."""
    for leftover in folder.glob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write JSON as `atomic_write` does."""
    with atomic_write(path) as file:
        separators = (",", ":") if indent is None else None
        file.write(json.dumps(content, indent=indent, separators=separators).encode() + b"\n")


def read_regular(path: str | Path, limit: int = 64 << 20, error: type[Exception] = ValueError) -> bytes:
    """The content of a file of at most `limit` bytes; `error` for larger ones, and for pipes and devices."""
    size = size_of_regular(path, error)
    with open(path, "rb") as file:
        content = file.read(limit + 1) if size <= limit else None
    if content is None or len(content) > limit:
        raise error(f"{path} has more than {limit:,} bytes: it is damaged, or not the file that is meant.")
    return content


def size_of_regular(path: str | Path, error: type[Exception] = ValueError) -> int:
    """Bytes of a file; `error` for pipes and devices, which could be read forever."""
    status = os.stat(path)
    _refuse_folder(Path(path))
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is a pipe or a device, not a file.")
    return status.st_size


def read_json(path: str | Path, limit: int = 64 << 20, error: type[Exception] = ValueError) -> Any:
    """The content of a JSON file. `error` names the file if it is damaged, or as `read_regular` says."""
    content = read_regular(path, limit, error)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as damage:
        reason = "it is nested too deeply" if isinstance(damage, RecursionError) else damage
        raise error(f"{path} is damaged: {reason}.") from damage


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write(csv_text(header, rows, for_people=False).encode())


def is_csv_of(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Whether a file is a table of exactly this header and these rows; False if it cannot be read."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            pairs = itertools.zip_longest(csv.reader(file), itertools.chain([header], rows))
            return all(None not in pair and list(pair[0]) == list(pair[1]) for pair in pairs)
    except (OSError, ValueError, csv.Error):  # such as a field that does not end
        return False


def csv_text(header: Sequence[Any], rows: Iterable[Sequence[Any]], for_people: bool = True) -> str:
    """A table as CSV. For people, cells that a spreadsheet would take for a formula get a `'` before them."""
    text = io.StringIO(newline="")
    table = [header, *rows]
    csv.writer(text, lineterminator="\n").writerows([map(_as_text, row) for row in table] if for_people else table)
    return text.getvalue()


def _as_text(cell: Any) -> str:
    """A cell that no spreadsheet runs: numbers, also with signs, percent or brackets, stay as they are."""
    text = "" if cell is None else str(cell).replace("\r", " ")  # which csv does not quote
    is_number = re.fullmatch(r"[-+\d.,%±()[\]\s]+(e[-+]?\d+)?|[-+](nan|inf)", text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) and not is_number else text


@contextmanager
def open_private(path: str | Path) -> Iterator[TextIO]:
    """Write a text file that no other user may read, as `atomic_write` does, also where there was one for all."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):  # of a killed run
        leftover.unlink(missing_ok=True)
    with atomic_write(path, 0o600) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        try:
            yield text
        finally:
            text.detach()


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def mark_of(paths: Iterable[str | Path]) -> str:
    """Sizes of files, and a checksum of three pieces of each: when other files take their places, it is another."""
    checksum, sizes = 0, []
    for path in paths:
        try:
            with open(path, "rb") as file:
                sizes.append(file.seek(0, os.SEEK_END))
                for place in (0, sizes[-1] // 2, sizes[-1] - _PIECE):
                    file.seek(max(0, place))
                    checksum = zlib.crc32(file.read(_PIECE), checksum)
        except OSError:
            sizes.append(-1)
    return f"{'+'.join(map(str, sizes))} {checksum:08x}"


def sync(path: str | Path) -> None:
    """Force a file, or a folder's list of names, to disk. Without the latter, a power cut may undo a rename."""
    if os.name != "posix" and Path(path).is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _force(descriptor)
    finally:
        os.close(descriptor)


def _force(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems have nothing to force
            raise


@contextmanager
def save_atomically(final: str | Path) -> Iterator[Path]:
    """Write a folder under another name and rename it when it is complete. On an error, what was there stays.

    After a kill, `recover_folder` brings back what was there; the next call does so first.
    """
    final = Path(final)
    recover_folder(final)
    partial = beside(final, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = beside(final, "old")
    if final.exists():  # no portable call replaces a folder that is not empty; at each moment one of the two is there
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(final: str | Path) -> None:
    """Undo a `save_atomically` that was killed, and remove what it left. Other runs must not be at work there."""
    final = Path(final)
    old, partial = beside(final, "old"), beside(final, "partial")
    if old.exists() and partial.exists() and not final.exists():  # killed between the two renames
        old.rename(final)
    for leftover in (old, partial):
        shutil.rmtree(leftover, ignore_errors=True)


def make_writable_folder(path: str | Path) -> Path:
    """Make a folder and try to write to it, so that a run that could not save anything ends before it starts."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"The output folder {path} cannot be made: there is a file of that name.") from error
    except OSError as error:
        raise PermissionError(f"The output folder {path} is not writable: {error.strerror}.") from error


def refuse_other_folder(folder: Path, error: type[Exception] = FileExistsError) -> None:
    """Raise `error` if a folder is that of a model, a training or a synthetic set, with which nothing may be mixed."""
    for name in _NOT_TO_BE_MIXED:
        if (folder / name).exists():
            raise error(f"{folder} holds something else ({name}): give another output folder.")


@contextmanager
def lock_folder(folder: Path, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """Hold a lock on a folder, by a file `lock` in it; raise `error` if another process holds it.

    It ends with this process, even if that is killed and its forked workers live on. Where the file system has no
    locks, as on some networks, a warning says so.
    """
    with open(folder / "lock", "w") as file:
        _hold(file, f"in {folder}", error)
        yield


@contextmanager
def work_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder, hold it as `lock_folder` does, and clear what killed runs left."""
    folder = make_writable_folder(path)
    with lock_folder(folder):
        remove_partials(folder)
        yield folder


@contextmanager
def lock_file(path: str | Path, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """Hold a lock on a file that is to be written, as `lock_folder` does, by a hidden file beside it."""
    lock = beside(Path(path), "lock")
    with open(lock, "w") as file:
        _hold(file, f"on {path}", error)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _hold(file: TextIO, place: str, error: type[Exception]) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as held:
        raise error(f"Another run is at work {place}: wait for it, or stop it.") from held
    except (ImportError, OSError) as missing:  # not on Windows, nor on every network's file system
        logger.warning("There are no locks (%s): see to it that no other run is at work %s.", missing, place)
    _locks.add(file)


def _close_locks() -> None:
    for file in list(_locks):
        file.close()


_locks: WeakSet[TextIO] = WeakSet()
if hasattr(os, "register_at_fork"):  # a worker that lives on for some seconds must not keep a lock of its dead parent
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def tolerate_missing_locks() -> Iterator[None]:
    """Let libraries that lock files with `filelock` go on where the file system has no locks.

    It knows one of the errors that such file systems give, so within this context all of them become that one.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    original = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        try:
            original(file, operation)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, *_UNSUPPORTED):
                raise
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error

    fcntl.flock = flock
    try:
        yield
    finally:
        fcntl.flock = original


def beside(path: Path, suffix: str) -> Path:
    """The hidden name beside a file or folder under which another version of it is kept for a moment."""
    return path.with_name(f".{path.name}.{suffix}")
