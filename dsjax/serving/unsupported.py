"""Fields of OpenAI's protocol, and of servers like it, that this server does not act on.

Three cases, and no field is ignored in silence: a field that cannot change the answer is ignored;
one that would change it is refused by name; and null, or a value that asks for nothing, is accepted
everywhere. `docs/serving.md` lists the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Unsupported(NamedTuple):
    """Why a field has no effect, and which of its values are accepted nevertheless."""

    reason: str
    accepted: tuple[Any, ...] | None = ()
    """Values other than null that ask for nothing; None: any value, the field is ignored."""


ANY = None
_LABEL = "kept for the client's own bookkeeping"
_CACHE = "prompts that begin alike always share their cache"
_TOOLS = "tools are not supported"
_REASONING = "thoughts are always separated from the answer"

REQUEST_FIELDS: dict[str, Unsupported] = {
    # Ignored: the answer is the same with and without them.
    "user": Unsupported(_LABEL, ANY),
    "safety_identifier": Unsupported(_LABEL, ANY),
    "metadata": Unsupported(_LABEL, ANY),
    "store": Unsupported("answers are never stored", ANY),
    "prompt_cache_key": Unsupported(_CACHE, ANY),
    "prompt_cache_options": Unsupported(_CACHE, ANY),
    "prompt_cache_retention": Unsupported(_CACHE, ANY),
    "prediction": Unsupported("a hint that could only save time", ANY),
    # Refused, but for values that ask for nothing.
    "service_tier": Unsupported("there is one service tier", ("auto", "default")),
    "tools": Unsupported(_TOOLS, ([],)),
    "tool_choice": Unsupported(_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Unsupported(_TOOLS, (True, False)),
    "functions": Unsupported(_TOOLS, ([],)),
    "function_call": Unsupported(_TOOLS, ("none", "auto")),
    "response_format": Unsupported("only plain text is generated", ({"type": "text"},)),
    "modalities": Unsupported("only text is generated", (["text"],)),
    "audio": Unsupported("only text is generated"),
    "suffix": Unsupported("write the model's own fill-in-the-middle tokens as prompt", ("",)),
    "reasoning_effort": Unsupported("how long the model thinks cannot be set", ("medium",)),
    "verbosity": Unsupported("how much the model writes cannot be set", ("medium",)),
    "web_search_options": Unsupported("there is no web search"),
    "moderation": Unsupported("there is no moderation"),
    # Of vLLM, SGLang and DeepSeek's own API.
    "chat_template": Unsupported("only the checkpoint's own chat template is used"),
    "chat_template_kwargs": Unsupported("the chat template takes no arguments", ({},)),
    "documents": Unsupported("the chat template takes no documents", ([],)),
    "thinking": Unsupported("whether the model thinks cannot be set"),
    "include_reasoning": Unsupported(_REASONING, (True,)),
    "separate_reasoning": Unsupported(_REASONING, (True,)),
    "add_generation_prompt": Unsupported("an answer always begins a new turn", (True,)),
    "continue_final_message": Unsupported("an answer always begins a new turn", (False,)),
    "use_beam_search": Unsupported("there is no beam search", (False,)),
    "length_penalty": Unsupported("there is no beam search", (1.0,)),
    "skip_special_tokens": Unsupported("text never shows special tokens", (True,)),
    "include_stop_str_in_output": Unsupported("text ends before a stop string", (False,)),
    "truncate_prompt_tokens": Unsupported("prompts are never cut"),
    "prompt_logprobs": Unsupported("use a completion with echo and logprobs"),
    "priority": Unsupported("requests are served in their order", (0,)),
}  # fmt: skip
"""Of the bodies of both endpoints."""

CHAT_FIELDS = REQUEST_FIELDS | {
    "echo": Unsupported("a conversation is not repeated", (False,)),
    "best_of": Unsupported("ask for n answers", (1,)),
}
"""Of a chat's body."""

MESSAGE_FIELDS: dict[str, Unsupported] = {
    "id": Unsupported(_LABEL, ANY),
    "cache_control": Unsupported(_CACHE, ANY),
    "tool_calls": Unsupported(_TOOLS, ([],)),
    "function_call": Unsupported(_TOOLS),
    "annotations": Unsupported("a message has no annotations here", ([],)),
    "refusal": Unsupported("write a refusal as content", ("",)),
    "audio": Unsupported("only text is read"),
}
"""Of one message of a conversation."""

PART_FIELDS: dict[str, Unsupported] = {
    "prompt_cache_breakpoint": Unsupported(_CACHE, ANY),
    "cache_control": Unsupported(_CACHE, ANY),
}
"""Of a part of a message's content."""

STREAM_FIELDS: dict[str, Unsupported] = {
    "include_obfuscation": Unsupported("chunks are never padded", (False,)),
    "continuous_usage_stats": Unsupported("usage comes once, at the end", (False,)),
}
"""Of `stream_options`."""


def find_refused(given: Mapping[str, Any], table: Mapping[str, Unsupported]) -> str | None:
    """Find the first field that asks for something that is not supported.

    >>> find_refused({"user": "me", "tools": [], "audio": None}, REQUEST_FIELDS)
    >>> find_refused({"tools": [{}]}, REQUEST_FIELDS)
    'tools'
    """
    for name, value in given.items():
        field = table.get(name)
        if value is None or field is None or field.accepted is None:
            continue
        if not any(_equal(value, accepted) for accepted in field.accepted):
            return name
    return None


def explain_refusal(name: str, field: Unsupported) -> str:
    """Say in one line why a field is refused, and what may be sent instead.

    >>> explain_refusal("tools", REQUEST_FIELDS["tools"])
    'tools: tools are not supported; leave it out or send []'
    """
    values = " or ".join(json.dumps(value) for value in field.accepted or ())
    return f"{name}: {field.reason}; leave it out" + (f" or send {values}" if values else "")


def drop_unset(given: Mapping[str, Any], table: Mapping[str, Unsupported]) -> dict[str, Any]:
    """Remove what asks for nothing: null, and the fields of `table`."""
    return {key: value for key, value in given.items() if value is not None and key not in table}


def schema_of(table: Mapping[str, Unsupported]) -> dict[str, Any]:
    """Describe the fields of `table` as properties of a JSON schema."""
    return {
        name: {} if field.accepted is None else {"enum": [None, *field.accepted]}
        for name, field in table.items()
    }


def _equal(a: Any, b: Any) -> bool:
    """Compare as JSON does, where true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)
