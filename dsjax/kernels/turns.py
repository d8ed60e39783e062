"""How often a loop turns as a rule, where only the run decides."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

USUAL_TURNS = "usual_turns_"
"""What stands before the number in the name of such a loop."""


def usual_turns(count: int) -> AbstractContextManager[object]:
    """State it of the loops that are made inside: the compiled program keeps it in their names.

    Nothing that runs depends on it. `dsjax plan` counts such a loop so often.
    """
    return jax.named_scope(f"{USUAL_TURNS}{count}")
