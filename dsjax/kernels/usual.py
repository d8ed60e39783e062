"""What only the run decides, as it is as a rule: for who plans. Nothing that runs depends on it.

The compiled program keeps such a statement in the names of what was made inside of it, and
`dsjax plan` reads it there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

USUAL_TURNS = "usual_turns_"
"""What stands before the number in the name of a loop."""

USUAL_ROWS = "usual_rows_"
"""What stands before the number in the names of an exchange and of a grouped product."""


def usual_turns(count: int) -> AbstractContextManager[object]:
    """How often the loops that are made inside turn."""
    return jax.named_scope(f"{USUAL_TURNS}{count}")


def usual_rows(count: int) -> AbstractContextManager[object]:
    """How many rows exist, of those that ragged exchanges and grouped products have room for.

    Of an exchange those that a device sends, to itself too.
    """
    return jax.named_scope(f"{USUAL_ROWS}{count}")
