"""How a batch shows that it is alive: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Between two lines when there is no terminal."""


class BatchProgress:
    """Progress in requests, with throughput and the time left."""

    def __init__(self, total: int, done: int, console: Console):
        self._console = console
        self._total = total
        self._start: tuple[float, int, int] | None = None
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[text]}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, tokens: int) -> None:
        """Show that `done` requests are answered, and `tokens` made since the beginning."""
        now = time.monotonic()
        if self._start is None:
            if not tokens:
                return
            self._start = now, done, tokens  # the first program is compiled
        began, done_before, tokens_before = self._start
        seconds = max(now - began, 1e-9)
        speed = (tokens - tokens_before) / seconds
        text = f"{done:,} of {self._total:,} requests  {speed:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            rate = (done - done_before) / seconds
            left = f"  {(self._total - done) / rate:,.0f} s left" if rate else ""
            self.say(f"{text}  {done / self._total:.0%}{left}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
