"""How much room an engine has, and what it says of itself."""

from __future__ import annotations

import dataclasses

from dsjax.errors import UserError

READ_AT_ONCE = 512
"""Tokens of prompts that one step reads at most, for each part of the batch."""
PAGE_SIZE = 32
"""Tokens of a page: what sequences that begin alike share is whole pages."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How much room there is.

    Raises:
        UserError: a value that cannot be.
    """

    rows: int = 8
    """Sequences that run at the same time."""
    context: int = 4096
    """Most tokens of a sequence, prompt and output."""
    cache_tokens: int | None = None
    """Tokens that the cache holds in all; None: `rows` sequences of full length."""
    drafts: int = 1
    """Tokens that MTP drafts a step, where the model has MTP; 0: none. How often it drafts depends
    on how long steps take; without drafts the same requests run in the same steps every time."""
    experts: bool = False
    """Whether a request's last update says which experts its tokens went to."""

    def __post_init__(self) -> None:
        for name, low in (("rows", 1), ("context", 2), ("drafts", 0)):
            if (value := getattr(self, name)) < low:
                raise UserError(f"{name} is {value}; expected at least {low}")
        if self.drafts > 4:
            raise UserError(f"drafts is {self.drafts}; expected 0 to 4")


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, and what it has done since it started."""

    running: int
    waiting: int
    cache_usage: float
    """Share of the pages that are in use."""
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    """Tokens of prompts that entered; `prefix_hits` of them were in the cache."""
    prefix_hits: int
    drafted: int
    accepted: int
    preempted: int
