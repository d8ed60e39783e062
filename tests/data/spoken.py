"""A tokenizer, a template and a served model that behave as R1's; and what an engine may say."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from dsjax.data.chat_template import ChatTemplate
from dsjax.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from dsjax.inference.request import FinishReason, Request, TokenLogprob, Update
from dsjax.serving.job import Job
from dsjax.serving.protocol import Served

ADDED = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"]
"""Not called special, as in DeepSeek's file."""

TEMPLATE = r"""
{{- bos_token }}
{%- set first = namespace(system=true) %}
{%- for message in messages if message.role == 'system' %}
    {{- message.content if first.system else '\n\n' + message.content }}
    {%- set first.system = false %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'tool' %}
        {{- '<｜User｜>' + message.content | tojson }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}
"""

TEXTS = ["hello world, is it raining? ", "naïve 中文字 😀 test ", "stop here and there\n\n"] * 3


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level, with some merges, so that tokens and characters have no common borders."""
    trained = train_tokenizer(TEXTS, vocab_size=300)
    backend = tokenizers.Tokenizer.from_str(trained._backend.to_str())
    backend.add_tokens(ADDED)
    return Tokenizer(backend, BOS, EOS)


@functools.cache
def _parsing() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer()._backend.to_str())
    backend.encode_special_tokens = False
    return backend


@functools.cache
def _one_byte() -> dict[bytes, int]:
    return {tokenizer().token_bytes(i): i for i in range(tokenizer().vocab_size)}


def byte_ids(data: bytes) -> list[int]:
    """A token for each byte."""
    return [_one_byte()[bytes([byte])] for byte in data]


@functools.cache
def template(source: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, tokenizer(), {"bos_token": BOS, "eos_token": EOS})


def make_served(**changes: Any) -> Served:
    """The model "r1"; its vocabulary is a little larger than the tokenizer's, as DeepSeek's."""
    settings = {
        "name": "r1",
        "tokenizer": tokenizer(),
        "vocab_size": tokenizer().vocab_size + 8,
        "context": 400,
        "template": template(),
        "think_start_id": tokenizer().added_tokens["<think>"],
        "think_end_id": tokenizer().added_tokens["</think>"],
    }
    return Served(**{**settings, **changes})


def ids(text: str) -> list[int]:
    """What `tokenizers` makes of a text if every added token in it means the token."""
    return _parsing().encode(text, add_special_tokens=False).ids


def scored(token: int, count: int) -> TokenLogprob:
    """Log-probabilities that name their token: the likeliest ones are those that follow it."""
    top = tuple((token + place, -0.5 - place) for place in range(count))
    return TokenLogprob(token, -0.5, top)


def speak(
    request: Request, tokens: Sequence[int], finish: FinishReason = "stop", seed: int = 0
) -> Iterator[Update]:
    """Updates that say `tokens` in random pieces, with what the request asks for.

    A stop adds eos, as an engine does.
    """
    draw = random.Random(seed)
    said = [*tokens, *([tokenizer().eos_id] if finish == "stop" else [])]
    sampling = request.sampling
    at = 0
    while at < len(said) or at == 0:
        piece = said[at : at + draw.choice((1, 1, 2, 3))]
        prompt = []
        if at == 0 and sampling.prompt_logprobs is not None:
            prompt = [None, *(scored(i, sampling.prompt_logprobs) for i in request.tokens[1:])]
        asked = sampling.logprobs is not None
        yield Update(
            request.id,
            tuple(piece),
            finish if at + len(piece) >= len(said) else None,
            logprobs=tuple(scored(i, sampling.logprobs) for i in piece) if asked else (),
            prompt_logprobs=tuple(prompt),
            cached_tokens=3 if at == 0 else 0,
        )
        at += len(piece) or 1


def run(job: Job, *texts: str, finish: FinishReason = "stop", seed: int = 0) -> list[dict]:
    """Let each request of the job say its text; returns the chunks."""
    chunks = []
    for request, text in zip(job.requests, texts, strict=True):
        for update in speak(request, ids(text), finish, seed):
            chunks += job.feed(update)
    return chunks
