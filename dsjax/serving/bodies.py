"""The two bodies of OpenAI's protocol, as far as they can be checked without the model.

Fields, ranges and defaults are those of OpenAI's API reference; top_k, min_p, repetition_penalty,
min_tokens, stop_token_ids and ignore_eos are vLLM's. What else there is, `unsupported.py` says.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import TypeAliasType

from dsjax.errors import one_line
from dsjax.inference.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS
from dsjax.serving.unsupported import (
    CHAT_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    REQUEST_FIELDS,
    STREAM_FIELDS,
    Unsupported,
    drop_unset,
    explain_refusal,
    find_refused,
    schema_of,
)
from dsjax.small_files import is_text

MAX_N = 128
MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
LARGEST = 2**31 - 1

REFUSED = "refused"
"""pydantic's type of error for a field of `unsupported.py`."""

ID_PATTERN = "^(0|[1-9][0-9]{0,8})$"
"""The one decimal spelling of a token id."""


def _whole(value: Any) -> Any:
    """JSON has one kind of number, and 74.0 is as much an integer there as 74 is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _prompts(value: Any) -> list[Any]:
    """Any form of `prompt` as a list of texts, or one of lists of ids."""
    if isinstance(value, str):
        return [value]
    forms = str | list | int | float
    if not isinstance(value, list) or not value or not isinstance(value[0], forms):
        raise ValueError("expected a string, a list of strings, or one or more lists of ids")
    prompts = [value] if isinstance(value[0], int | float) else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts; at most {MAX_PROMPTS} go into one request")
    if not all(isinstance(prompt, type(prompts[0])) for prompt in prompts):
        raise ValueError("strings and token ids are mixed")
    return prompts if isinstance(prompts[0], str) else [_ids(prompt) for prompt in prompts]


def _ids(prompt: list[Any]) -> list[int]:
    """One prompt's token ids; how large they may be is the model's matter."""
    ids = [_whole(found) for found in prompt]
    if not ids or not all(type(found) is int for found in ids):
        raise ValueError("a list of token ids is empty, or holds something else")
    return ids


def _stops(value: Any) -> Any:
    """A list of stop strings. An empty one, of a form field left empty, stops nothing."""
    if isinstance(value, str):
        value = [value]
    return [stop for stop in value if stop != ""] if isinstance(value, list) else value


def _content(value: Any) -> Any:
    """Text parts as one text, a line for each as in vLLM."""
    if not isinstance(value, list):
        return value
    return "\n".join(map(_text, value))


def _text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text":
        raise ValueError(f"a part of type {kind!r} is not supported; only text is")
    fields = drop_unset(part, PART_FIELDS)
    if fields.keys() != {"type", "text"} or not isinstance(fields["text"], str):
        raise ValueError('a text part is {"type": "text", "text": "..."}')
    return fields["text"]


Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Whole = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=0, le=LARGEST), Whole]
Limit = Annotated[int, Field(ge=-1, le=LARGEST), Whole]
"""-1: what the context leaves, as llama.cpp's server and LM Studio have it."""
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Whole]
Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"propertyNames": {"pattern": ID_PATTERN}}),
]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]

# Named, so that /openapi.json can say in one place how many tokens the model has.
TokenId = TypeAliasType("TokenId", Annotated[int, Whole])

# What is written here beside a validator is what a client may send; it alone is published.
Ids = Annotated[list[TokenId], Field(min_length=1)]
AnyPrompt = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class _Closed(BaseModel):
    """Strict: a boolean is no number, a string neither, and infinity is not one to compute with.

    Null is a field that was left out, whatever the field: typed clients write all that they know.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if name := find_refused(given, cls.unsupported):
            message = explain_refusal(name, cls.unsupported[name])
            # A brace in a message would be a placeholder.
            raise PydanticCustomError(REFUSED, "{message}", {"message": message, "field": name})
        return drop_unset(given, cls.unsupported)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Publish also what `_drop_unset` lets through."""
        schema = handler.resolve_ref_schema(handler(core))
        schema["properties"] |= schema_of(cls.unsupported)
        schema["additionalProperties"] = {"type": "null"}
        return schema


class StreamOptions(_Closed):
    """How a stream ends. A whole answer always has its usage, and needs no such option."""

    unsupported = STREAM_FIELDS

    include_usage: bool | None = None


class TextPart(_Closed):
    """The one kind of part that a message's content may have."""

    unsupported = PART_FIELDS

    type: Literal["text"]
    text: str


AnyContent = str | list[TextPart] | None


class Message(_Closed):
    """One message of a conversation; an answer of ours may come back as it was."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"role": {"not": {"const": "assistant"}}}},
            "then": {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
        }
    )
    unsupported = MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content, AnyContent)] = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class Body(_Closed):
    """What both endpoints know; None is a field that was left out."""

    unsupported = REQUEST_FIELDS

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_N), Whole] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST), Whole] | None = None
    """0 and -1: all tokens."""
    min_p: Probability | None = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = None
    stop: Annotated[Stops | None, BeforeValidator(_stops, Stop | Stops | None)] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None


class CompletionBody(Body):
    """A body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts, AnyPrompt)]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Whole] | None = None


class ChatBody(Body):
    """A body of /v1/chat/completions."""

    unsupported = CHAT_FIELDS

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None


# ---------------------------------------------------------------------------------------------
# What is wrong with it
# ---------------------------------------------------------------------------------------------


def bad_text(body: Mapping[str, Any]) -> str | None:
    """The first field that holds half of a surrogate pair: JSON can spell one, UTF-8 cannot."""
    for name, value in body.items():
        waiting = [name, value]
        while waiting:
            found = waiting.pop()
            if isinstance(found, dict):
                waiting += [*found.keys(), *found.values()]
            elif isinstance(found, list):
                waiting += found
            elif isinstance(found, str) and not is_text(found):
                return name
    return None


def explain(kind: type[Body], error: ValidationError) -> tuple[str, str]:
    """The first problem in one line, and the field that it is in."""
    problems = error.errors(include_url=False)
    # A misspelled field is unknown under its own name and missing under the right one.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = problem["loc"]
    if problem["type"] == REFUSED:
        loc = (*loc, problem.get("ctx", {})["field"])
    # A key is the client's, and may hold anything.
    names = (f"[{p}]" if isinstance(p, int) else f".{repr(p)[1:-1]}" for p in loc)
    where = "".join(names)[1:80]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        inside = {"messages": Message, "stream_options": StreamOptions}.get(str(loc[0]), kind)
        return f"{where}: no such field{_nearest(str(loc[-1]), inside)}", where
    if problem["type"] == "missing":
        return f"{where} is missing", where
    if problem["type"] == REFUSED:
        parent = where.rpartition(".")[0]
        return one_line(f"{parent}.{message}" if parent else message)[:400], where
    if problem["type"] in ("model_type", "dict_type"):
        message = f"expected an object, not {_shown(problem['input'])}"
    elif problem["type"] not in ("value_error", "too_long", "too_short"):
        message = f"{message[0].lower()}{message[1:]}, not {_shown(problem['input'])}"
    return one_line(f"{where}: {message}")[:400], where


def _nearest(name: str, kind: type[_Closed]) -> str:
    """The field that was probably meant, if one is really alike."""
    near = difflib.get_close_matches(name[:80].lower(), kind.model_fields, n=1, cutoff=0.75)
    return f"; the nearest is {near[0]}" if near else ""


def _shown(value: Any) -> str:
    """A value in a few words; a huge integer has no decimal form in Python."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 2**64:
        return "an integer beyond 64 bits"
    return repr(value)[:80]
