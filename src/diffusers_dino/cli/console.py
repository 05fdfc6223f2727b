"""How commands end: with one line for what a user can mend."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..files import lock_file, lock_folder, make_writable_folder, tolerate_missing_locks

__all__ = ["hold_output", "outlive_reader", "run", "say_what_failed", "show_messages"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(main: Callable[[], None], resumable: bool = False) -> None:
    """Run a script: end with one line for what a user can mend; what looks like our fault keeps its traceback.

    If it is `resumable`, its work stays when it is stopped, and a RuntimeError ends with one line, too.
    """
    mendable = (ImportError, OSError, ValueError, *([RuntimeError] if resumable else []))
    try:
        with tolerate_missing_locks():  # of caches
            main()
    except mendable as error:
        sys.exit(f"error: {say_what_failed(error) if resumable else error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on." if resumable else "Stopped.")


def say_what_failed(error: Exception) -> str:
    """The message of an error, with what to do about a killed worker or a full disk."""
    if isinstance(error, BrokenProcessPool):
        return "a worker was killed, maybe because memory ran out: use fewer --num_workers. The same command goes on."
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"there is no room ({error.strerror}). What is done stays: make room, and the same command goes on."
    return str(error)


def show_messages(name: str) -> None:
    """Print what the loggers below `name` tell of the work, and the warnings of all others."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def hold_output(folder: str | Path, file: str | None = None) -> Iterator[Path]:
    """Make the folder that a command writes to, and hold it, or only one file in it, against other runs."""
    output = make_writable_folder(folder)
    with lock_folder(output, OSError) if file is None else lock_file(output / file, OSError):
        yield output


class _Outliving:
    """A stream that says nothing more once nobody reads it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._unless_broken(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._unless_broken(self._stream.flush)

    def _unless_broken(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except BrokenPipeError:  # what is left in its buffer, and what libraries in C write, goes nowhere, too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return None


def outlive_reader() -> None:
    """Go on when a reader of the output goes away, as `head` does: long work must not end with it."""
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Outliving) else _Outliving(stream)
        for stream in (sys.stdout, sys.stderr)
    )
