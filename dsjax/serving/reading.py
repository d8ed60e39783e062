"""A client's body, checked against the model, and the engine's settings that it asks for."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from dsjax.inference.request import LARGEST_SEED, MAX_STOP_TOKENS, SamplingParams
from dsjax.serving.bodies import (
    ID_PATTERN,
    ChatBody,
    CompletionBody,
    bad_text,
    explain,
)
from dsjax.serving.protocol import RequestError, Served

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LEAST_TOP_P = 1e-30
"""Of OpenAI's range, 0 to 1, the engine excludes 0: this too leaves the likeliest token alone."""
CONTEXT_EXCEEDED = "context_length_exceeded"
"""OpenAI's code of a prompt and an answer that do not fit into the context."""
COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions; a chat's is what the context leaves."""


def read_body(endpoint: str, body: Any, served: Served) -> CompletionBody | ChatBody:
    """Check a body by itself and against the model, all but what its prompt's length decides.

    Raises:
        RequestError: with the first problem.
    """
    kinds: dict[str, type[CompletionBody | ChatBody]] = {
        COMPLETIONS: CompletionBody,
        CHAT: ChatBody,
    }
    if endpoint not in kinds:
        message = f"there is no {endpoint[:80]!a}; there are {COMPLETIONS} and {CHAT}"
        raise RequestError(404, message)
    if not isinstance(body, dict):
        raise RequestError(400, f"the body is a {type(body).__name__}; expected a JSON object")
    if (bad := bad_text(body)) is not None:
        name = ascii(bad)[1:-1][:80]
        raise RequestError(400, f"{name}: half of a surrogate pair is no text", name)
    try:
        asked = kinds[endpoint].model_validate(body)
    except ValidationError as error:
        raise RequestError(400, *explain(kinds[endpoint], error)) from None
    check_model(asked.model, served)
    _check(asked, served)
    return asked


def check_model(name: str, served: Served) -> None:
    """Raise the 404 of a model that is not served."""
    if name != served.name:
        message = f"there is no model {name[:80]!r}; {served.name!r} is served"
        raise RequestError(404, message, "model", "model_not_found")


def _check(asked: CompletionBody | ChatBody, served: Served) -> None:
    """What fields say of each other and of the vocabulary."""
    size = served.vocab_size
    keys = asked.logit_bias or {}
    below = f"expected token ids below {size}"
    _require(all(_is_id(key, size) for key in keys), "logit_bias", below)
    _require(all(0 <= i < size for i in asked.stop_token_ids or ()), "stop_token_ids", below)
    if isinstance(asked, ChatBody):
        top, limits = asked.top_logprobs or 0, (asked.max_tokens, asked.max_completion_tokens)
        _require(asked.logprobs or not top, "top_logprobs", "needs logprobs: true")
        _require(top <= size, "top_logprobs", f"there are only {size} tokens")
        one = None in limits or limits[0] == limits[1]
        _require(one, "max_completion_tokens", "contradicts max_tokens")
        _require(served.template, "messages", "this model has no chat template; use completions")
    else:
        ids = (i for prompt in asked.prompt if isinstance(prompt, list) for i in prompt)
        _require(all(0 <= i < size for i in ids), "prompt", below)
        _require((asked.logprobs or 0) <= size, "logprobs", f"there are only {size} tokens")
        _require(asked.best_of in (None, asked.n or 1), "best_of", "is supported only equal to n")


def _require(holds: object, param: str, message: str) -> None:
    if not holds:
        raise RequestError(400, f"{param}: {message}", param)


def _is_id(key: str, vocab_size: int) -> bool:
    """Whether `key` is the decimal spelling of a token id."""
    return re.fullmatch(ID_PATTERN, key) is not None and int(key) < vocab_size


def sampling(
    asked: CompletionBody | ChatBody, served: Served, prompt_tokens: int, seed: int
) -> SamplingParams:
    """How the engine is to continue a prompt of so many tokens.

    What the client leaves out is what generation_config.json says, else OpenAI's default.

    Raises:
        RequestError: prompt and output do not fit into the context, or settings into each other.
    """
    tokens = _max_tokens(asked, served, prompt_tokens)
    fewest = asked.min_tokens or 0
    _require(fewest <= tokens, "min_tokens", f"{fewest} is above max_tokens, {tokens}")
    own = () if asked.ignore_eos else served.stop_tokens
    stops = tuple(dict.fromkeys([*(asked.stop_token_ids or ()), *own]))
    too_many = f"at most {MAX_STOP_TOKENS}, of which the model has {len(own)}"
    _require(len(stops) <= MAX_STOP_TOKENS, "stop_token_ids", too_many)

    def chosen(name: str, otherwise: float) -> Any:
        value = getattr(asked, name)
        return served.defaults.get(name, otherwise) if value is None else value

    top = logprobs(asked)
    return SamplingParams(
        max_tokens=max(tokens, 1),
        min_tokens=fewest,
        temperature=chosen("temperature", 1.0),
        top_k=max(chosen("top_k", 0), 0),
        top_p=max(chosen("top_p", 1.0), LEAST_TOP_P),
        min_p=chosen("min_p", 0.0),
        repetition_penalty=chosen("repetition_penalty", 1.0),
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        logit_bias={int(key): value for key, value in (asked.logit_bias or {}).items()},
        stop_tokens=stops,
        ignore_eos=bool(asked.ignore_eos),
        seed=seed % (LARGEST_SEED + 1),
        logprobs=top,
        prompt_logprobs=top if isinstance(asked, CompletionBody) and asked.echo else None,
    )


def logprobs(asked: CompletionBody | ChatBody) -> int | None:
    """How many likeliest tokens are to be told of beside the chosen one; None: no probabilities."""
    if isinstance(asked, CompletionBody):
        return asked.logprobs
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _max_tokens(asked: CompletionBody | ChatBody, served: Served, prompt_tokens: int) -> int:
    """The most tokens to show. 0 is the prompt alone: the engine makes one all the same."""
    chat = isinstance(asked, ChatBody)
    left = served.context - prompt_tokens
    name, limit = "max_tokens", asked.max_tokens
    if chat and limit is None:
        name, limit = "max_completion_tokens", asked.max_completion_tokens
    if left < 1 or (limit or 0) > left:
        raise _overflow(served.context, prompt_tokens, limit, chat, name if left >= 1 else None)
    if limit is None:
        default = served.defaults.get("max_new_tokens", left if chat else COMPLETION_TOKENS)
        return min(default, left)
    if limit == -1:
        return left
    alone = isinstance(asked, CompletionBody) and asked.echo
    _require(limit or alone, name, "0 is for a completion with echo: true; expected 1 or more")
    return limit


def _overflow(
    context: int, prompt: int, limit: int | None, chat: bool, param: str | None
) -> RequestError:
    """Say that a request does not fit, in OpenAI's words.

    LiteLLM looks for "This model's maximum context length is" in the message, LangChain for the
    code, also in the message: OpenAI's client since version 3 shows it nothing else.

    Args:
        context: the model's, in tokens.
        prompt: tokens of the prompt.
        limit: the client's max_tokens, if it set one.
        chat: whether the prompt is a conversation.
        param: the field that is too large; None: the prompt.
    """
    where = "messages" if chat else "prompt"
    answer = max(limit or 1, 1)
    message = (
        f"This model's maximum context length is {context} tokens. However, you requested "
        f"{prompt + answer} tokens ({prompt} in the {where}, {answer} in the completion). "
        f"Please reduce the length of the {where} or completion ({CONTEXT_EXCEEDED})."
    )
    return RequestError(400, message, param or where, CONTEXT_EXCEEDED)
