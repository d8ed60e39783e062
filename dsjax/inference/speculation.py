"""Whether drafting pays: measured, not assumed.

Drafts cost time at every step and save steps when they are right. How often that is depends on the
text, and what it costs on how many rows run: so both ways of decoding are timed for each number of
rows, and the faster one is used. The slower one is tried again from time to time.
"""

from __future__ import annotations

import dataclasses

TRIAL = 8
"""Steps of one look at a way of decoding."""
PATIENCE = 256
"""Steps until the slower way is looked at again."""


@dataclasses.dataclass
class _Way:
    """Tokens a second of decoding with or without drafts, smoothed over the last steps."""

    steps: int = 0
    rate: float = 0.0

    def saw(self, tokens: int, seconds: float) -> None:
        self.steps += 1
        weight = max(1 / self.steps, 1 / 16)
        self.rate += weight * (tokens / seconds - self.rate)


class Speculation:
    """Chooses the number of drafts of the next step, and counts what became of them."""

    def __init__(self, drafts: int):
        self.drafts = drafts
        self.drafted = 0
        self.accepted = 0
        self._ways: dict[tuple[int, bool], _Way] = {}
        self._since: dict[int, int] = {}

    def choose(self, rows: int) -> int:
        """How many drafts a step of so many rows should carry."""
        if not self.drafts or not rows:
            return 0
        with_drafts, without = self._way(rows, True), self._way(rows, False)
        for way, drafts in ((with_drafts, self.drafts), (without, 0)):
            if way.steps < TRIAL:
                return drafts
        if self._since.setdefault(rows, 0) >= PATIENCE:
            self._since[rows] = 0
            slower = min(with_drafts, without, key=lambda way: way.rate)
            slower.steps = 0
        return self.drafts if with_drafts.rate >= without.rate else 0

    def saw(
        self, rows: int, drafts: int, drafted: int, accepted: int, tokens: int, seconds: float
    ) -> None:
        """A decoding step is done: how many drafts were read, how many were right, what it took."""
        self.drafted += drafted
        self.accepted += accepted
        if self.drafts:
            self._since[rows] = self._since.get(rows, 0) + 1
            self._way(rows, drafts > 0).saw(tokens, seconds)

    def _way(self, rows: int, drafts: bool) -> _Way:
        return self._ways.setdefault((rows, drafts), _Way())
