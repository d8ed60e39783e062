"""What a door knows about the model that it serves, and how it answers a mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsjax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from dsjax.errors import UserError, one_line
from dsjax.serving.bodies import Probability
from dsjax.serving.chat_template import ChatTemplate
from dsjax.small_files import MAX_JSON_BYTES, read_json, read_small


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

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends a turn by generation_config.json; chat models may name more than their eos."""
        named = self.defaults.get("eos_token_id", [])
        ids = named if isinstance(named, list) else [named]
        return tuple(i for i in ids if 0 <= i < self.vocab_size)


def load_served(folder: str | Path, name: str, *, vocab_size: int, context: int) -> Served:
    """Read tokenizer, chat template and defaults from a released folder or a run directory.

    A run keeps its tokenizer in `tokenizer/`. The chat template is chat_template.jinja,
    chat_template.json, or what tokenizer_config.json has, in this order, as in `transformers`.
    Without one the model serves completions alone.

    Raises:
        UserError: a file is missing, damaged or holds what cannot be used; the message names it.
    """
    home = find_tokenizer(folder).parent
    tokenizer = load_tokenizer(home)
    if not tokenizer.byte_level:
        raise UserError(f"{home}: the tokenizer is not byte-level, and only such can be served")
    config = _read_json(home / "tokenizer_config.json")
    return Served(
        name=name,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context=context,
        template=_read_template(home, config, tokenizer),
        defaults=_read_defaults(home / "generation_config.json"),
        add_bos=config.get("add_bos_token") is not False,
        think_start_id=tokenizer.added_tokens.get("<think>"),
        think_end_id=tokenizer.added_tokens.get("</think>"),
    )


def _read_template(
    home: Path, config: Mapping[str, Any], tokenizer: Tokenizer
) -> ChatTemplate | None:
    file = home / "chat_template.jinja"
    source = _read_text(file) if file.is_file() else None
    source = source or _read_json(home / "chat_template.json").get("chat_template")
    source = source or config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = (item for item in source if isinstance(item, dict))
        source = next((i.get("template", i) for i in named if i.get("name") == "default"), None)
    if not source:
        return None
    if not isinstance(source, str):
        raise UserError(f"{home}: chat_template is no text")
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {key: "" if i is None else tokenizer.decode([i]) for key, i in ids.items()}
    try:
        template = ChatTemplate(source, tokenizer, names)
        template.check()
    except UserError as error:
        raise UserError(f"{home}: {error}") from None
    return template


def _read_defaults(path: Path) -> dict[str, Any]:
    try:
        return Defaults.model_validate(_read_json(path)).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"{path}: {problem['loc'][0]}: {one_line(problem['msg'])}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a file that is not there says nothing."""
    return read_json(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return read_small(path, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
