"""What a plan is made of before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from sharding.rules import Layout


@dataclass(frozen=True)
class Job:
    """A step, ready to be compiled.

    Attributes:
        lasting: bytes on a device of what stays from step to step, by kind.
        passing: bytes of what is known to come and go within a step, by kind.
        whole: weights that every device holds whole: name and bytes.
        tokens: what all devices together process in a step.
        useful: model FLOPs of one token.
        remedy: what would help if it does not fit, for a device of so many bytes.
        details: what else is worth saying of it, as JSON.
        read: bytes on a device that a step cannot do without: weights but the embedding, of which
            it looks up a few rows, and the cache; None where other things set the limit.
    """

    lowered: jax.stages.Lowered
    layout: Layout
    lasting: dict[str, float]
    passing: dict[str, float]
    whole: list[tuple[str, float]]
    tokens: int
    useful: float
    remedy: Callable[[float], str]
    details: dict[str, Any]
    read: float | None = None
