"""How scripts end: one line for what a user can mend, a traceback for what is our fault."""

import errno

import pytest

from diffusers_dino.cli.console import run, run_resumable


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
