"""Every field of OpenAI's published request schema is used, refused by name, or ignored and listed.

The schema is that of the installed `openai` package: a field that is new there fails this test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from dsjax.serving.bodies import ChatBody, CompletionBody, Message, StreamOptions, TextPart
from dsjax.serving.job import parse
from dsjax.serving.protocol import RequestError
from dsjax.serving.reading import CHAT, COMPLETIONS
from dsjax.serving.unsupported import find_refused
from tests.data.spoken import make_served

SERVED = make_served()
HI = {"role": "user", "content": "hi"}
BASE = {COMPLETIONS: {"model": "r1", "prompt": "hi"}, CHAT: {"model": "r1", "messages": [HI]}}
KINDS = {COMPLETIONS: CompletionBody, CHAT: ChatBody}
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"

PUBLISHED = [
    (chat_create_params.CompletionCreateParamsStreaming, ChatBody),
    (completion_create_params.CompletionCreateParamsStreaming, CompletionBody),
    (chat.ChatCompletionStreamOptionsParam, StreamOptions),
    (chat.ChatCompletionContentPartTextParam, TextPart),
    *(
        (kind, Message)
        for kind in (
            chat.ChatCompletionDeveloperMessageParam,
            chat.ChatCompletionSystemMessageParam,
            chat.ChatCompletionUserMessageParam,
            chat.ChatCompletionAssistantMessageParam,
            chat.ChatCompletionToolMessageParam,
            chat.ChatCompletionFunctionMessageParam,
            chat.ChatCompletionMessage,  # an answer that comes back
        )
    ),
]


@pytest.mark.parametrize(("published", "ours"), PUBLISHED, ids=lambda kind: kind.__name__)
def test_every_published_field_is_known(published: Any, ours: Any):
    names = {name for kind in published.__mro__ for name in getattr(kind, "__annotations__", ())}
    names = {name for name in names if not name.startswith(("_", "model_"))} | (
        {"model"} & ours.model_fields.keys()
    )
    assert len(names) >= 2
    assert names - ours.model_fields.keys() - ours.unsupported.keys() == set()


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody, Message, TextPart, StreamOptions])
def test_a_field_is_either_used_or_listed_as_unsupported(kind: Any):
    assert not kind.model_fields.keys() & kind.unsupported.keys()
    written = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in kind.unsupported if f"`{name}`" not in written] == []


CASES = [(endpoint, name) for endpoint, kind in KINDS.items() for name in kind.unsupported]


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_a_value_that_asks_for_nothing_changes_nothing_and_others_are_refused(
    endpoint: str, name: str
):
    field = KINDS[endpoint].unsupported[name]
    alone = parse(endpoint, BASE[endpoint], SERVED, "x", random_seed=int).requests
    anything = "me", {"a": [1]}, ["b"], 7, True
    for value in (None, *(anything if field.accepted is None else field.accepted)):
        body = {**BASE[endpoint], name: value}
        assert parse(endpoint, body, SERVED, "x", random_seed=int).requests == alone
    if field.accepted is not None:
        assert refused(endpoint, {**BASE[endpoint], name: {"x": "{y}"}}, name).startswith(
            f"{name}: "
        )


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"stop": []},
        {"stop": ["", ""]},
        {"stream_options": {"include_usage": True}},
        {"stream": False, "stream_options": {}},
        {"n": 1, "logit_bias": {}, "best_of": 1, "echo": False},
        {"logprobs": None, "top_logprobs": None},
    ],
    ids=str,
)
def test_a_used_field_that_asks_for_nothing_changes_nothing(endpoint, fields):
    alone, given = (
        parse(endpoint, {**BASE[endpoint], **body}, SERVED, "x", random_seed=int)
        for body in ({}, fields)
    )
    assert given.requests == alone.requests


@pytest.mark.parametrize(
    ("endpoint", "field", "value", "said"),
    [
        (CHAT, "tools", [{}], "tools: tools are not supported; leave it out or send []"),
        (CHAT, "parallel_tool_calls", 1, "leave it out or send true or false"),
        (CHAT, "service_tier", "flex", 'leave it out or send "auto" or "default"'),
        (CHAT, "response_format", {"type": "json_object"}, 'or send {"type": "text"}'),
        (COMPLETIONS, "suffix", "b", "fill-in-the-middle"),
    ],
)
def test_a_refusal_says_what_may_be_sent(endpoint: str, field: str, value: Any, said: str):
    assert said in refused(endpoint, {**BASE[endpoint], field: value}, field)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_calls": [{}]}, "messages[1].tool_calls"),
        ({"refusal": "no"}, "messages[1].refusal"),
        ({"audio": {"id": "a"}}, "messages[1].audio"),
        ({"function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"annotations": [{}]}, "messages[1].annotations"),
    ],
)
def test_a_messages_field_is_refused_by_its_place_and_name(change: dict[str, Any], param: str):
    body = {"model": "r1", "messages": [HI, {"role": "assistant", "content": "a", **change}]}
    assert refused(CHAT, body, param).startswith(f"{param}: ")


def test_a_stream_is_not_padded_and_says_so():
    body = {**BASE[CHAT], "stream": True}
    parse(CHAT, {**body, "stream_options": {"include_obfuscation": False}}, SERVED, "x")
    bad = {**body, "stream_options": {"include_obfuscation": True}}
    name = "stream_options.include_obfuscation"
    assert refused(CHAT, bad, name).startswith(f"{name}: chunks are never padded")


def test_hints_for_a_cache_are_ignored_in_messages_and_parts():
    hint = {"cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "hi", "prompt_cache_breakpoint": {"mode": "explicit"}, **hint}
    body = {"model": "r1", "messages": [{"role": "user", "content": [part], "id": "m1", **hint}]}
    given, alone = (parse(CHAT, b, SERVED, "x", random_seed=int) for b in (body, BASE[CHAT]))
    assert given.requests == alone.requests


def test_true_is_not_one():
    assert find_refused({"parallel_tool_calls": 1}, ChatBody.unsupported)
    assert not find_refused({"priority": 0.0}, ChatBody.unsupported)
    assert find_refused({"priority": False}, ChatBody.unsupported)


def refused(endpoint: str, body: dict[str, Any], param: str) -> str:
    """The message of a 400 that names the field."""
    with pytest.raises(RequestError) as caught:
        parse(endpoint, body, SERVED, "x")
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "\n" not in caught.value.message
    json.dumps(caught.value.body())
    return caught.value.message
