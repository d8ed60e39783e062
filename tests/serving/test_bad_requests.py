"""The port of a real engine refuses bad requests, and who is beside them does not notice."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from typing import Any

import httpx
import pytest

from dsjax.inference.speculation import Speculation
from dsjax.serving.reading import CHAT, COMPLETIONS
from tests.data.spoken import ids
from tests.serving.ports import DIRECT, Port, open_port, raw_post, read_until
from tests.serving.real import CONTEXT, engine, nothing_is_left, served

pytestmark = pytest.mark.slow

Body = dict[str, Any]

UNKNOWN = served().vocab_size
BAD: dict[str, Body] = {
    "a million choices": {"n": 10**6},
    "more log-probabilities than tokens": {"logprobs": UNKNOWN + 1},
    "more of them in a chat": {"logprobs": True, "top_logprobs": UNKNOWN + 1},
    "a bias beyond float32": {"logit_bias": {"5": 1e39}},
    "a bias that is no number": {"logit_bias": {"5": float("nan")}},
    "a bias that is a word": {"logit_bias": {"5": "NaN"}},
    "the bias of an unknown token": {"logit_bias": {str(UNKNOWN): 1}},
    "the bias of no token": {"logit_bias": {"-1": 1}},
    "an unknown token": {"prompt": [1, 2, UNKNOWN]},
    "a negative token": {"prompt": [-1]},
    "a token beyond 64 bits": {"prompt": [2**70]},
    "a prompt beyond the context": {"prompt": "a b " * CONTEXT},
    "ids beyond the context": {"prompt": [1] * (CONTEXT + 1)},
    "an answer beyond the context": {"prompt": [1] * 9, "max_tokens": CONTEXT},
    "a template": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
    "the best of five": {"best_of": 5},
    "a beam search": {"use_beam_search": True},
    "a suffix": {"suffix": "x"},
    "a frequency penalty beyond 2": {"frequency_penalty": 2.5},
    "a presence penalty below -2": {"presence_penalty": -2.01},
    "a repetition penalty of nothing": {"repetition_penalty": 0},
}
BAD_BYTES = {
    "invalid UTF-8": b'{"model": "r1", "prompt": "\xc3\x28"}',
    "half of a surrogate pair": b'{"model": "r1", "prompt": "\\ud800"}',
    "UTF-16": '{"model": "r1", "prompt": "x"}'.encode("utf-16"),
}


async def refused(http: httpx.AsyncClient) -> None:
    """Every bad body is answered with 400, on both routes, whole and streamed."""
    headers = {"Content-Type": "application/json"}
    for name, change in BAD.items():
        for route, stream in itertools.product((COMPLETIONS, CHAT), (False, True)):
            if route == CHAT and "prompt" in change:
                continue
            asked = {"prompt": "x"} if route == COMPLETIONS else {"messages": [HELLO]}
            body = {"model": "r1", "max_tokens": 4, "stream": stream} | asked | change
            answer = await http.post(route, content=json.dumps(body), headers=headers)
            assert (answer.status_code, name) == (400, name)
            assert answer.json()["error"]["type"] == "invalid_request_error"
    for name, content in BAD_BYTES.items():
        answer = await http.post(COMPLETIONS, content=content, headers=headers)
        assert (answer.status_code, name) == (400, name)


def endless_head(port: Port) -> None:
    """A header of a gigabyte: it is answered with 400 long before its end, and cut off."""
    with port.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ")
        sent, piece = 0, b"a" * 2**16
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while sent < 2**30:
                sent += connection.send(piece)
        assert sent < 2**26
        assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 400")


def half_closed(port: Port) -> None:
    """Who closes the sending side, at whatever point, has left: the other side is closed too."""
    whole = raw_post(COMPLETIONS, {"model": "r1", "prompt": "half", "max_tokens": 200})
    head = whole.index(b"\r\n\r\n")
    for end in (0, 9, head, head + 4, len(whole) - 5, len(whole)):
        with port.connect() as connection:
            connection.sendall(whole[:end])
            connection.shutdown(socket.SHUT_WR)
            answer = read_until(connection, b"never")
        assert answer == b""


HELLO = {"role": "user", "content": "hello world"}
NEIGHBOURS: list[tuple[str, Body]] = [
    (COMPLETIONS, {"prompt": "hello", "temperature": 0}),
    (COMPLETIONS, {"prompt": ids("naïve 中文字 😀"), "seed": 3, "logit_bias": {"40": 5}}),
    (CHAT, {"messages": [HELLO], "seed": 5, "top_p": 0.9, "presence_penalty": 1}),
]


STREAMS = 12
"""Of each neighbour, one after the other."""


async def neighbour(port: Port, number: int) -> bytes:
    """What a client streams, byte by byte, but for the ids and times of its answer."""
    route, body = NEIGHBOURS[number]
    body = body | {"model": "r1", "max_tokens": 30, "stream": True, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=port.url, timeout=60, **DIRECT) as http:
        answer = await http.post(route, json=body)
    return re.sub(rb'"id":"[\w-]+","created":\d+,', b"", answer.content)


def test_bad_requests_are_refused_and_neighbours_do_not_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their streams have the same bytes as in a quiet hour."""
    # Whether to draft is decided by the clock, and with it how many tokens an event brings.
    monkeypatch.setattr(Speculation, "choose", lambda self, rows: self.drafts)
    before = engine().stats()

    async def alone(port: Port) -> list[bytes]:
        return [await neighbour(port, number) for number in range(len(NEIGHBOURS))]

    async def steady(port: Port, number: int, quiet: bytes) -> None:
        for _ in range(STREAMS):
            assert await neighbour(port, number) == quiet

    async def beside(port: Port, quiet: list[bytes]) -> int:
        good = asyncio.gather(*(steady(port, *one) for one in enumerate(quiet)))
        rounds = 0
        async with httpx.AsyncClient(base_url=port.url, timeout=60, **DIRECT) as http:
            while not good.done():
                head, half = (asyncio.to_thread(way, port) for way in (endless_head, half_closed))
                await asyncio.gather(refused(http), head, half)
                rounds += 1
        await good
        return rounds

    with open_port(engine(), served()) as port:
        quiet = asyncio.run(alone(port))
        assert all(found.endswith(b"data: [DONE]\n\n") for found in quiet)
        rounds = asyncio.run(beside(port, quiet))
        nothing_is_left(port)
    print(f"\n  all that is bad {rounds} times beside {STREAMS * len(quiet)} streams")
    assert rounds > 1
    assert engine().stats().preempted == before.preempted
    assert engine().stats().accepted > before.accepted
