"""Being asked to stop: finish the step, save, leave with the signal's own exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from sharding.distributed import gather, is_alone, read_note, write_note

_NOTE = "stop"
_STEPS_APART = 2
"""How many steps later all have heard. Who asks at step s + 2 has seen step s + 1 end, which nobody
does before everybody has begun it; and who noted something at step s began it after that."""


GRACE_SECONDS = 5.0
"""How long after a signal a wait may go on that `Termination.interruptible` marks."""


class Stopped(BaseException):
    """A wait was ended by a signal. No Exception, so that no handler takes it for a failed call."""


class Termination:
    """Which signal has asked the run to stop, if any; in every process the same, at the same step.

    A signal may come to one process, or to several at different steps. `reached` decides for all.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """What has come to this process."""
        self.signal: int | None = None
        """What all obey."""
        self._waits = False

    def reached(self, step: int) -> bool:
        """Whether all stop before this step; every process asks before every step.

        The first to be signalled notes a step that nobody has passed yet. It costs a question to
        process 0 a step, about a millisecond.
        """
        if self.signal is not None:
            return True
        if is_alone():
            self.signal = self.received
            return self.signal is not None
        if self.received is not None:
            write_note(_NOTE, {"step": step + _STEPS_APART, "signal": self.received})
        note = read_note(_NOTE)
        if note is not None and step >= note["step"]:
            self.signal = note["signal"]
        return self.signal is not None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark a wait that may never end: for data, for a reward function.

        A signal is obeyed between two steps, which a process that waits for ever does not reach.

        Raises:
            Stopped: `GRACE_SECONDS` after a signal, where the wait has not ended by itself.
        """
        self._waits = True
        try:
            if self.received is not None:
                self._set_alarm()
            yield
        finally:
            self._waits = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def note(self, number: int) -> None:
        """Take a signal that came to this process."""
        self.received = number
        if self._waits:
            self._set_alarm()

    def end_wait(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGALRM."""
        if self._waits:
            self._waits = False
            raise Stopped

    def _set_alarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def settle(self) -> None:
        """At the end of the steps: what came to anybody, and was not obeyed yet, all obey."""
        if self.signal is None:
            came = [number for number in gather(_NOTE, self.received) if number is not None]
            self.signal = came[0] if came else None

    @property
    def exit_code(self) -> int | None:
        """128 + signal, as a shell reports it: 143 for SIGTERM, 130 for SIGINT."""
        return None if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def catch_termination() -> Iterator[Termination]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once."""
    termination = Termination()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    alarm = signal.signal(signal.SIGALRM, termination.end_wait)

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        termination.note(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGALRM, alarm)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_soon(code: int) -> None:
    """End the process with this exit code in `GRACE_SECONDS`, unless it ends before.

    To leave in order is to join all threads, one of which may be in a call that does not return.
    """
    timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
