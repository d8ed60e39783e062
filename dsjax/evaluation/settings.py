"""What the command line of `dsjax eval` says of drawing and of the model's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

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
        if self.k < 1:
            raise UserError(f"--k is {self.k}; expected at least 1")
        _check_sampling(self.temperature, self.top_p, self.max_tokens)
        if self.temperature == 0 and self.k > 1:
            raise UserError(
                f"--temperature 0 gives --k {self.k} times the same answer; expected --k 1"
            )


@dataclasses.dataclass(frozen=True)
class HarnessSettings:
    """Prompt format and sampling for tasks of lm-evaluation-harness; None: the task's own.

    Where the model thinks, None is `Settings`' default: no task's limit has room for a thought,
    and the likeliest tokens repeat themselves in it.

    Raises:
        UserError: a value that cannot be.
    """

    few_shot: int | None = None
    """Examples before each question."""
    chat: bool = False
    """Questions are put into the chat template."""
    think: bool | None = None
    """Whether answers begin with a thought; None: as the chat template has it."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    """Of an answer, thought included."""

    def __post_init__(self) -> None:
        _check_sampling(self.temperature, self.top_p, self.max_tokens)
        if self.think is not None and not self.chat:
            raise UserError("--think and --no-think are settings of a chat; add --chat")

    def gen_kwargs(self, thinks: bool) -> dict[str, Any]:
        """What the harness is to change in the tasks' generation settings."""
        defaults = Settings()
        given = {
            "max_gen_toks": (self.max_tokens, defaults.max_tokens),
            "temperature": (self.temperature, defaults.temperature),
            "top_p": (self.top_p, defaults.top_p),
        }
        found: dict[str, Any] = {
            name: default if value is None else value
            for name, (value, default) in given.items()
            if thinks or value is not None
        }
        if "temperature" in found:
            found["do_sample"] = found["temperature"] > 0
        return found


Chosen = TypeVar("Chosen", Settings, HarnessSettings)


def chosen(kind: type[Chosen], options: Mapping[str, Any]) -> Chosen:
    """The settings of one kind of tasks; an option that is not given is None.

    Raises:
        UserError: a value that cannot be, or an option that only the other kind has.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := [name for name in given if name not in known]:
        whose = "of our own tasks" if kind is HarnessSettings else "of lm-evaluation-harness's"
        option = unknown[0].replace("_", "-")
        raise UserError(f"--{option} is a setting {whose}, and none of them is named; leave it out")
    return kind(**given)


def _check_sampling(temperature: float | None, top_p: float | None, max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}; expected at least 1")
    if temperature is not None and not 0 <= temperature <= 100:
        raise UserError(f"--temperature is {temperature}; expected 0 to 100")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; expected more than 0, up to 1")


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
