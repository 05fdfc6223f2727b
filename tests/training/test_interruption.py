import os
import signal
import time

import pytest

from diffusers_dino.training.interruption import Interruption


@pytest.fixture(autouse=True)
def handlers():
    """The signals mean afterwards what they meant before."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_wish_to_leave(number):
    interruption = Interruption()
    assert interruption.wishes() == (0, 0)
    os.kill(os.getpid(), number)
    assert interruption.wishes() == (1, 0)
    interruption.saved()
    assert interruption.wishes() == (1, 0)


def test_the_clock_runs_from_the_last_checkpoint():
    interruption = Interruption(minutes=0.1 / 60)
    assert interruption.wishes() == (0, 0)
    time.sleep(0.11)
    assert interruption.wishes() == (0, 1)
    interruption.saved()
    assert interruption.wishes() == (0, 0)
