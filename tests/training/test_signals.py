"""A wait that a signal ends, and one that it leaves alone."""

import os
import queue
import signal
import threading
import time

import pytest

from dsjax.training import signals
from dsjax.training.signals import Stopped, catch_termination


def send_later(seconds: float) -> None:
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGTERM])
    timer.daemon = True
    timer.start()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)


@pytest.mark.parametrize("before", [True, False])
def test_a_marked_wait_ends_after_a_signal(before):
    """A signal that came before the wait, or in it."""
    with catch_termination() as termination:
        if before:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            send_later(0.1)
        begin = time.monotonic()
        with pytest.raises(Stopped), termination.interruptible():
            queue.Queue().get()
        assert 0.15 < time.monotonic() - begin < 5
        assert termination.received == signal.SIGTERM and termination.reached(0)


def test_a_wait_that_ends_by_itself_is_not_interrupted():
    with catch_termination() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        with termination.interruptible():
            time.sleep(0.05)
        time.sleep(0.3)  # unmarked: nothing ends it
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_a_signal_a_wait_takes_its_time():
    with catch_termination() as termination, termination.interruptible():
        time.sleep(0.3)
