"""Steps that were not finite, and when there have been too many of them."""

from __future__ import annotations

from dsjax.training.progress import Display


class BadSteps:
    """Counts such steps in a row; those change nothing but the step's number."""

    def __init__(self, most: int, display: Display) -> None:
        self._most = most
        self._display = display
        self._count = 0

    def has_diverged(self, step: int, finite: bool) -> bool:
        """Count a finished step; whether the run had better end now. Says so, either way."""
        self._count = 0 if finite else self._count + 1
        if not finite:
            self._display.say(f"step {step}: loss or gradient is not finite; nothing was changed")
        if self._count < self._most:
            return False
        self._display.say(
            f"error: {self._count} steps in a row were not finite; the state before them "
            "is saved. Lower optimizer.learning_rate or look at the data, then resume"
        )
        return True
