"""Tokens a second: what was computed, however late the host hears of it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dsjax.training import throughput
from dsjax.training.throughput import SECONDS, Throughput

TOKENS, STEP = 100, 0.5
RATE = TOKENS / STEP
"""Of the device, without a break between two steps."""


class Clock:
    """A host's clock, and a device that runs the steps it was given in turn."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.finished: list[float] = []

    def dispatch(self) -> None:
        self.finished.append(max(self.now, self.finished[-1] if self.finished else 0) + STEP)

    def fetch(self, step: int) -> None:
        self.now = max(self.now, self.finished[step])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(throughput, "monotonic", lambda: found.now)
    return found


def rates(clock: Clock, steps: int, stall: Callable[[int], float]) -> list[tuple[float, float]]:
    """Run the training loop's order of events.

    Returns:
        Of each step the rate that is reported, and the rate of the step timed alone.
    """
    meter, found, last = Throughput(), [], clock.now
    clock.dispatch()
    for step in range(steps):
        clock.dispatch()
        clock.fetch(step)
        clock.now += stall(step)  # the result is there, and the host is not
        found.append((meter.add(TOKENS), TOKENS / max(clock.now - last, 1e-9)))
        last = clock.now
        clock.now += stall(step)  # writing the record
    return found


@pytest.mark.parametrize("seconds", [0.2, 0.9, 5.0, 60.0])
def test_no_window_has_more_than_was_computed_whenever_the_host_stalls(
    seconds: float, clock: Clock
) -> None:
    draw = random.Random(0)
    found = rates(clock, 2000, lambda _: seconds * (draw.random() < 0.05))
    assert max(rate for rate, _ in found) <= RATE * (1 + 1e-9)
    if seconds > STEP:
        assert max(alone for _, alone in found) > 1000 * RATE  # what a step alone would say


def test_a_stall_counts_while_it_is_in_the_window_and_no_longer(clock: Clock) -> None:
    found = [rate for rate, _ in rates(clock, 200, lambda step: 5.0 * (step == 100))]
    assert found[99] == pytest.approx(RATE)
    assert RATE / 3 < found[100] < 0.8 * RATE
    assert found[101 + int(2 * SECONDS / STEP)] == pytest.approx(RATE)


def test_steps_longer_than_a_window_are_not_believed_one_by_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "SECONDS", STEP / 4)
    found = rates(clock, 50, lambda step: 0.6 * (step % 10 == 5))
    assert max(rate for rate, _ in found) <= RATE * (1 + 1e-9)


def test_pauses_between_steps_do_not_count(clock: Clock) -> None:
    meter = Throughput()
    for step in range(100):
        clock.now += STEP
        assert meter.add(TOKENS) == pytest.approx(RATE)
        if step % 7 == 0:
            meter.pause()
            clock.now += 100
            meter.resume()


def test_the_example_of_the_documentation(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 2.0)
    meter, began, found = Throughput(), clock.now, []
    for received in (1, 2, 4.5, 4.5):
        clock.now = began + received
        found.append(meter.add(100))
    assert found == pytest.approx([100, 100, 40, 80])
