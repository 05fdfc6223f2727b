"""Jobs in processes of their own: those that fail are named, the others are done."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

from diffusers_dino.workers import run_apart


def work(place: int, what: str, folder: Path) -> str:
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exits":
        sys.exit(3)
    if what == "fails":
        raise ValueError("bad image")
    (folder / f"{what}-{place}").touch()
    return "x" * 200_000  # more than a pipe holds


def test_a_worker_that_dies_takes_no_other_with_it(tmp_path):
    jobs = [(what, tmp_path) for what in ("killed", "fails", "a", "exits", "b", "c")]
    outcomes = {outcome.number: outcome for outcome in run_apart(work, iter(jobs), 2)}
    assert sorted(outcomes) == list(range(6))
    assert "SIGKILL" in outcomes[0].error
    assert outcomes[1].error == "ValueError: bad image"
    assert "exit code 3" in outcomes[3].error
    assert all(outcomes[n].value == "x" * 200_000 and not outcomes[n].error for n in (2, 4, 5))
    assert {path.name[-1] for path in tmp_path.iterdir()} <= {"0", "1"}  # places


def test_jobs_in_this_process_are_told_apart_too(tmp_path):
    outcomes = list(run_apart(work, [("fails", tmp_path), ("a", tmp_path)], 0))
    assert [outcome.error for outcome in outcomes] == ["ValueError: bad image", ""]
    assert (tmp_path / "a-0").exists()


def wait_for(place: int, path: Path) -> None:
    path.with_suffix(".pid").write_text(str(os.getpid()))
    while not path.exists():
        time.sleep(0.01)


def test_who_stops_listening_ends_the_workers(tmp_path):
    (tmp_path / "first").touch()
    running = run_apart(wait_for, [(tmp_path / "first",), (tmp_path / "second",)], 2)
    assert next(running).number == 0
    pid_file = tmp_path / "second.pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.close()
    while psutil.pid_exists(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
