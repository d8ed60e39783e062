"""Tokens a second of training, from the times at which steps' results were received."""

from __future__ import annotations

from collections import deque
from time import monotonic

SECONDS = 10.0
"""Length of the shortest window, once so much time has been measured."""

_ANCHORS = 4
"""Results that a window may begin at, at least, where steps are longer than windows."""


class Throughput:
    """Tokens a second over the last 10 to 20 seconds.

    Results are fetched while the next step runs. After a stall of the host one is received late and
    the next, which was computed meanwhile, at once after it: timed alone, that step would seem to
    take milliseconds. So the rate is taken over windows that begin at an earlier result and end at
    the latest one. A result is received late but never early, so a window that begins at a late
    one is too short, and its rate too high: of all windows the slowest is right.

    Example: steps of 100 tokens take 1 s, and windows at least 2 s. The third and the fourth result
    are received at 4.5 s. The windows that begin at 0, 1 and 2 s then have 4.5, 3.5 and 2.5 s for
    400, 300 and 200 tokens: the rate is 80. Timed alone, the fourth step would take no time.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._paused = 0.0
        self._pause_began: float | None = None
        self._anchors = deque([(monotonic(), 0)])

    def add(self, tokens: int) -> float:
        """Count a step's tokens when its result is received, and return the rate."""
        now = monotonic() - self._paused
        self._tokens += tokens
        anchors = self._anchors
        while len(anchors) > _ANCHORS and now - anchors[1][0] >= 2 * SECONDS:
            anchors.popleft()
        old = [a for a in anchors if now - a[0] >= SECONDS] or [anchors[0]]
        rate = min((self._tokens - before) / max(now - begin, 1e-9) for begin, before in old)
        # A hundredth of a window apart: the steps of small models take milliseconds.
        if now - anchors[-1][0] >= SECONDS / 100:
            anchors.append((now, self._tokens))
        return rate

    def pause(self) -> None:
        """Stop the clock, while no step runs: for an evaluation or a save."""
        self._pause_began = monotonic()

    def resume(self) -> None:
        """Go on after a pause."""
        assert self._pause_began is not None
        self._paused += monotonic() - self._pause_began
        self._pause_began = None
