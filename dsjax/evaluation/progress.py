"""How an evaluation shows that it is alive."""

from __future__ import annotations

import time

from rich.console import Console

from dsjax.training.progress import PLAIN_SECONDS, Display


class EvaluationProgress(Display):
    """Progress in samples, with throughput and the time left."""

    def __init__(self, total: int, done: int, console: Console):
        super().__init__(total, done, console)
        self._start: tuple[float, int, int] | None = None
        self._last_line = time.monotonic()
        self.tokens_per_second = 0.0
        """From the first tokens on: what was compiled before them does not count."""

    def update(self, done: int, tokens: int) -> None:
        """Show that `done` samples are there, and `tokens` made since the beginning."""
        now = time.monotonic()
        if self._start is None:
            if not tokens:
                return
            self._start = now, done, tokens  # the first program is compiled
        began, done_before, tokens_before = self._start
        seconds = max(now - began, 1e-9)
        self.tokens_per_second = (tokens - tokens_before) / seconds
        text = f"{done:,} of {self._total:,} samples  {self.tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            rate = (done - done_before) / seconds
            left = f"  {(self._total - done) / rate:,.0f} s left" if rate else ""
            self.say(f"{text}  {done / self._total:.0%}{left}")
