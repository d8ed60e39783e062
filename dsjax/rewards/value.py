"""What one reward says of one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dsjax.rewards.answer import Answer


class Value(NamedTuple):
    """A number, and why it is none of the verifier's own where the verifier failed."""

    value: float
    reason: str = ""
    """"time", "memory", "crash", "output", "refused: ...", or an exception and its line in the
    user's file; empty where nothing failed. What differs from answer to answer stands in
    parentheses at the end."""


Reward = Callable[[Sequence[Answer]], list[Value]]
"""The signature of them all: values in the answers' order."""
