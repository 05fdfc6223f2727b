"""Kills of a run in this process, before a chosen rename or unlink or before each of them in turn.

To unlink what is not there changes nothing: a kill before it leaves the files that a kill before the next change does,
so it does not count.
"""

import builtins
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch

CHANGES = ("replace", "rename", "unlink", "remove", "rmdir")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Death:
    """Whether the kill has come."""

    def __init__(self) -> None:
        self.happened = False


@contextmanager
def killed_before(number: int) -> Iterator[Death]:
    """Kill what runs inside before its rename or unlink of this number, from 0.

    After that nothing changes a file any more: what `finally` and `except` would clean up stays, as after a real kill.
    """
    left, death = iter(range(number, -1, -1)), Death()

    def dies(function: Callable, counts: bool = True) -> Callable:
        def call(path, *args, **options):
            if counts and not death.happened and _exists(path, options.get("dir_fd")):
                death.happened = next(left) == 0
            if death.happened:
                raise Killed
            return function(path, *args, **options)

        return call

    def open_file(file, mode="r", *args, original=builtins.open, **options):
        if death.happened and set(mode) & set("wax+"):
            raise Killed
        return original(file, mode, *args, **options)

    with (
        patch.multiple(os, **{name: dies(getattr(os, name)) for name in CHANGES}, mkdir=dies(os.mkdir, counts=False)),
        patch("builtins.open", open_file),
        patch("io.open", open_file),
        suppress(Killed),
    ):
        yield death


def _exists(path: str | os.PathLike[str], folder: int | None) -> bool:
    try:
        os.stat(path, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def kills(run: Callable[[], object], at_most: int = 1000) -> Iterator[int]:
    """Call `run` again and again, killed before its first rename or unlink, its second, ..., until none is left.

    Gives the number of each kill: go on with what the kill left, compare, and make the state anew from which the next
    run starts.
    """
    for number in itertools.islice(itertools.count(), at_most):
        with killed_before(number) as death:
            run()
        if not death.happened:
            return
        yield number
