"""What only the run decides, as it is as a rule: for who plans. Nothing that runs depends on it.

The compiled program keeps such a statement in the names of what was made inside of it, and
`dsjax plan` reads it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import jax

USUAL_TURNS = "usual_turns_"
"""What stands before the number in the name of a loop."""

USUAL_ROWS = "usual_rows_"
"""What stands before the number in the names of an exchange and of a grouped product."""


def usual_turns(count: int) -> AbstractContextManager[object]:
    """How often the loops that are made inside turn."""
    return jax.named_scope(f"{USUAL_TURNS}{count}")


_rows: ContextVar[int | None] = ContextVar("rows", default=None)


@contextmanager
def usual_rows(count: int) -> Iterator[None]:
    """How many rows exist, of those that exchanges and kernels which are made inside have room for.

    Of an exchange those that a device sends, to itself too.
    """
    token = _rows.set(count)
    try:
        with jax.named_scope(f"{USUAL_ROWS}{count}"):
            yield
    finally:
        _rows.reset(token)


def as_a_rule(room: int) -> int:
    """How many of so many rows exist, for the estimate of a kernel that leaves out the others."""
    return min(_rows.get() or room, room)
