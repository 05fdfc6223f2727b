"""Work shared out to processes that do not outlive the script, and a lock against a second script at the same work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["only_one_run", "run_parallel"]

T = TypeVar("T")


def run_parallel(function: Callable[..., T], jobs: Iterable[tuple[Any, ...]], num_workers: int) -> Iterator[T]:
    """Call a function on each job, and yield what it returns, in the order in which jobs are done.

    Args:
        function: A module's function: it must travel to other processes.
        jobs: Its arguments, job by job.
        num_workers: Processes; 0 works in this one.

    Raises:
        BrokenProcessPool: If a process was killed from outside, such as for want of memory.
    """
    if num_workers == 0:
        for job in jobs:
            yield function(*job)
        return
    # Not plain fork: threads of libraries do not survive it. A fork server imports them once for all workers.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    script = Path(getattr(sys.modules["__main__"], "__file__", "")).stem
    context.set_forkserver_preload([function.__module__, script])
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which lets work under way finish
    warnings.simplefilter("ignore")  # libraries quote the files that they warn of
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its workers, which would wait for it without end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def only_one_run(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with this process however that ends.

    Raises:
        RuntimeError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"Another run is at work in {folder}: wait for it, or stop it.") from error
        yield
