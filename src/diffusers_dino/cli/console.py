"""How commands end: with one line for what a user can mend."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TextIO

from ..files import tolerate_missing_locks

__all__ = ["outlive_reader", "run", "run_resumable", "say_what_failed", "show_messages"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(main: Callable[[], None]) -> None:
    """Run a script: end with one line for what a user can mend; what looks like our fault keeps its traceback."""
    try:
        with tolerate_missing_locks():  # of caches
            main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")


def run_resumable(main: Callable[[], None]) -> None:
    """Like `run`, for a script whose work stays when it is stopped; a RuntimeError ends with one line, too."""
    try:
        with tolerate_missing_locks():
            main()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {say_what_failed(error)}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on.")


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
