"""How a run shows that it is alive: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Between two lines when there is no terminal."""


Shown = TypeVar("Shown", bound="Display")


def say(console: Console, text: str) -> None:
    """One line, as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Display:
    """A bar with a text of its own, where there is a terminal; a context."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self._console = console
        self._total = total
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._start: tuple[float, int] | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[text]}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, text="")

    def __enter__(self: Shown) -> Shown:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        say(self._console, text)

    def show(self, done: int, text: str, remark: str = "") -> None:
        """How much is done; without a terminal a line with the time left, now and then.

        A remark is said at once, in a line that stays.
        """
        if remark:
            self.say(f"{text}  ({remark})")
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        if self._bar or remark:
            return
        now = time.monotonic()
        if self._start is None:  # compiling is over, and so is the first, slow step
            self._start = now, done
        if now - self._last_line >= PLAIN_SECONDS or done >= self._total:
            self._last_line = now
            began, first = self._start
            speed = (done - first) / max(now - began, 1e-9)
            left = f"  {max(self._total - done, 0) / speed:.0f} s left" if speed else ""
            self.say(f"{text}  {done / self._total:.0%}{left}")


class ThroughputDisplay(Display):
    """Progress in requests or samples, with tokens a second and the time left."""

    def __init__(self, noun: str, total: int, done: int, console: Console) -> None:
        super().__init__(total, done, console)
        self._noun = noun
        self._first: tuple[float, int] | None = None
        self.tokens_per_second = 0.0
        """From the first tokens on: what was compiled before them does not count."""

    def update(self, done: int, tokens: int) -> None:
        """Show that so many are done, and `tokens` made since the beginning."""
        if not tokens:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now, tokens
        began, before = self._first
        self.tokens_per_second = (tokens - before) / max(now - began, 1e-9)
        speed = f"{self.tokens_per_second:,.0f} tokens/s"
        self.show(done, f"{done:,} of {self._total:,} {self._noun}  {speed}")


class ProgressDisplay(Display):
    """Progress in tokens, with loss, throughput, MaxVio and the time left."""

    def update(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Show a finished step."""
        worst = values.get("max_violation_worst")
        balance = "" if worst is None else f"MaxVio {worst:.2f}  "
        self.show(
            tokens,
            f"step {step}  loss {values['loss']:.3f}  {balance}"
            f"{values['tokens_per_second']:,.0f} tokens/s",
        )
