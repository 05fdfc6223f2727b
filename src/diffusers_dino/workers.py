"""Work shared out to processes that do not outlive their parent, and a bar that shows how far it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from tqdm.auto import tqdm

__all__ = ["Outcome", "progress_bar", "run_apart", "run_parallel"]

T = TypeVar("T")


def progress_bar(title: str, unit: str, total: int, done: int = 0, show: bool = True) -> tqdm:
    """A bar with the rate and the time left, on stderr; without a terminal it writes a line now and then."""
    options = {"mininterval": 0.2 if sys.stderr.isatty() else 30, "smoothing": 0.05}
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=not show, **options)


def run_parallel(function: Callable[..., T], jobs: Iterable[tuple[Any, ...]], num_workers: int) -> Iterator[T]:
    """Call a module's function, which can be pickled, on each job, and yield the results as they are done.

    With 0 workers it works in this process. `BrokenProcessPool`: a process was killed, such as when memory ran out.
    """
    if num_workers == 0:
        for job in jobs:
            yield function(*job)
        return
    context = _context()
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Outcome(NamedTuple):
    """What became of a job: what the function returned, or what went wrong (empty if nothing did)."""

    number: int
    value: Any
    error: str


def run_apart(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], num_workers: int) -> Iterator[Outcome]:
    """Call a module's function on each job, each in its own process: if one fails or is killed, the others go on.

    Its first argument is the number, in [0, num_workers), of its place, such as a GPU; two calls at a time never have
    the same place. With 0 workers it works in this process.
    """
    if num_workers == 0:
        for number, job in enumerate(jobs):
            yield Outcome(number, *_attempt(function, 0, job))
        return
    context = _context()
    waiting, running = enumerate(jobs), {}
    try:
        while True:
            for place in set(range(num_workers)) - {place for place, *_ in running.values()}:
                if (numbered := next(waiting, None)) is not None:
                    number, job = numbered
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_work_apart, args=(theirs, function, place, job), daemon=True)
                    process.start()
                    theirs.close()  # else the pipe would stay open after the process ends
                    running[ours] = place, number, process
            if not running:
                return
            for ours in wait(list(running)):
                _, number, process = running.pop(ours)
                yield Outcome(number, *_receive(ours, process))
    finally:
        for _, _, process in running.values():
            process.terminate()


def _work_apart(pipe: Connection, function: Callable[..., Any], place: int, job: tuple[Any, ...]) -> None:
    _start_worker()
    pipe.send(_attempt(function, place, job))
    pipe.close()


def _attempt(function: Callable[..., Any], place: int, job: tuple[Any, ...]) -> tuple[Any, str]:
    try:
        return function(place, *job), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _receive(pipe: Connection, process: Any) -> tuple[Any, str]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return None, f"its process ended with {how}" + (", maybe because memory ran out" if code == -9 else "")
    finally:
        pipe.close()
        process.join()


def _context() -> Any:
    """Not plain fork, which breaks the threads of libraries. A fork server imports them once for all workers."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    # Only libraries: before Python 3.14 the server looks for modules in the current folder, not beside the script, and
    # would take a folder there for a module of the same name.
    loaded = [name for name in sys.modules if name == "timm" or name.split(".")[0] == "diffusers_dino"]
    context.set_forkserver_preload(loaded)
    return context


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets running jobs finish
    warnings.simplefilter("ignore")  # libraries quote the files that they warn of
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Workers of a parent that was killed would wait for it forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
