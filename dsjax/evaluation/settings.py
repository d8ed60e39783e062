"""What the command line of `dsjax eval` says of drawing and of the model's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dsjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn; the defaults are R1's, but for k.

    Raises:
        UserError: a value that cannot be.
    """

    k: int = 4
    """Samples of each question."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32_768
    """Of an answer, thought included; less where the model's context ends before."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("--k", self.k), ("--max-tokens", self.max_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"--temperature is {self.temperature}; expected 0 to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; expected more than 0, up to 1")
        if self.temperature == 0 and self.k > 1:
            raise UserError(
                f"--temperature 0 gives --k {self.k} times the same answer; expected --k 1"
            )


@dataclasses.dataclass(frozen=True)
class Room:
    """How a model is held.

    Raises:
        UserError: fewer rows than one.
    """

    rows: int = 8
    """Sequences that run at the same time."""
    context: int | None = None
    """Most tokens of prompt and answer together; None: the model's own limit."""
    dtype: str | None = None
    """float32 or bfloat16; None: as stored."""
    mesh: Mapping[str, int] | None = None
    """Sizes of mesh axes; None: one device."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"--rows is {self.rows}; expected at least 1")
