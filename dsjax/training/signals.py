"""Being asked to stop: finish the step, save, leave with the signal's own exit code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Termination:
    """Which signal has asked the run to stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def exit_code(self) -> int | None:
        """128 + signal, as a shell reports it: 143 for SIGTERM, 130 for SIGINT."""
        return None if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def catch_termination() -> Iterator[Termination]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once."""
    termination = Termination()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        termination.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield termination
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
