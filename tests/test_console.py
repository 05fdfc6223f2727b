"""How scripts end: one line for what a user can mend, a traceback for what is our fault."""

import errno
import os
from functools import partial

import pytest

from diffusers_dino.cli.console import run
from diffusers_dino.files import lock_folder

run_resumable = partial(run, resumable=True)


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("start", [run, run_resumable])
@pytest.mark.parametrize("error", [ValueError("Give --model."), FileNotFoundError("There is no folder here.")])
def test_what_a_user_can_mend_is_one_line(start, error):
    with pytest.raises(SystemExit, match=f"^error: {error}$"):
        start(failing(error))


@pytest.mark.parametrize("start", [run, run_resumable])
def test_a_fault_of_ours_keeps_its_traceback(start):
    with pytest.raises(TypeError, match="unexpected"):
        start(failing(TypeError("unexpected")))


def test_a_script_says_whether_its_work_stays():
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        run(failing(KeyboardInterrupt()))
    with pytest.raises(SystemExit, match=r"The same command goes on\.$"):
        run_resumable(failing(KeyboardInterrupt()))
    with pytest.raises(SystemExit, match="What is done stays"):
        run_resumable(failing(OSError(errno.ENOSPC, "No space left on device")))


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_libraries_and_folders_do_without_locks_where_there_are_none(tmp_path, monkeypatch, caplog, number):
    fcntl, filelock = pytest.importorskip("fcntl"), pytest.importorskip("filelock")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    def main() -> None:
        with filelock.FileLock(tmp_path / "cache.lock"), lock_folder(tmp_path):
            (tmp_path / "done").touch()

    monkeypatch.setattr(fcntl, "flock", refuse)
    run(main)
    assert (tmp_path / "done").exists()
    assert "There are no locks" in caplog.text
    assert fcntl.flock is refuse
