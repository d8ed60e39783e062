"""What a door knows about the model that it serves, and how it answers a mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsjax.data.chat_template import ChatTemplate
from dsjax.data.language import read_language
from dsjax.data.thinking import CLOSED, OPENED
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError, one_line
from dsjax.serving.bodies import Probability
from dsjax.small_files import read_json_if_there


class RequestError(Exception):
    """A request that is answered with an error; the message is one line."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The answer's body, as OpenAI's."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Defaults(BaseModel):
    """What generation_config.json may say of settings that a client leaves out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)

    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=1 << 31)] = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    max_new_tokens: Annotated[int | None, Field(ge=1, lt=1 << 31)] = None
    eos_token_id: int | list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """The model behind a door, as far as the protocol needs it."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    """The model's, which may be larger than the tokenizer's."""
    context: int
    """The most tokens of prompt and output together."""
    template: ChatTemplate | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Those of `Defaults` that are set."""
    add_bos: bool = True
    """Whether a completion's prompt that is text begins with bos."""
    think_start_id: int | None = None
    think_end_id: int | None = None
    """<think> and </think>, where each is one token: never hidden, even if it is a special one."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends a turn by generation_config.json; chat models may name more than their eos."""
        named = self.defaults.get("eos_token_id", [])
        ids = named if isinstance(named, list) else [named]
        return tuple(i for i in ids if 0 <= i < self.vocab_size)


def load_served(folder: str | Path, name: str, *, vocab_size: int, context: int) -> Served:
    """Read tokenizer, chat template and defaults from a released folder or a run directory.

    A run keeps its tokenizer in `tokenizer/`. Without a chat template the model serves completions
    alone.

    Raises:
        UserError: a file is missing, damaged or holds what cannot be used; the message names it.
    """
    language = read_language(folder)
    tokenizer, home = language.tokenizer, language.home
    assert home is not None
    if not tokenizer.byte_level:
        raise UserError(f"{home}: the tokenizer is not byte-level, and only such can be served")
    return Served(
        name=name,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context=context,
        template=language.template,
        defaults=_read_defaults(home / "generation_config.json"),
        add_bos=language.add_bos,
        think_start_id=tokenizer.added_tokens.get(OPENED),
        think_end_id=tokenizer.added_tokens.get(CLOSED),
    )


def _read_defaults(path: Path) -> dict[str, Any]:
    try:
        return Defaults.model_validate(read_json_if_there(path)).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"{path}: {problem['loc'][0]}: {one_line(problem['msg'])}") from None
