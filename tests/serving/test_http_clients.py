"""Clients that leave, dawdle, crowd or attack: nobody else may notice, and nothing may be left."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serving.ports import DIRECT, Port, echo, open_port, raw_post, read_until, until
from tests.serving.scripted import ScriptedEngine

LONG = {"model": "m", "prompt": "x", "max_tokens": 500}
ROUTE = "/v1/completions"


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    """Slow enough that a long answer takes seconds."""
    with open_port(ScriptedEngine(step_seconds=0.005), max_open=400) as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_is_left(port: Port) -> Iterator[None]:
    """After each test the engine has forgotten everything, long before it could have finished."""
    yield
    until(lambda: port.engine.open == 0, seconds=1)
    until(lambda: not port.server.worker._places, seconds=1)
    assert not port.server.worker._subscriptions


def submitted(port: Port, n: int) -> None:
    """Wait until the engine has got so many."""
    until(lambda: len(port.engine.submitted) >= n)


# ---------------------------------------------------------------------------------------------
# Leaving
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["closed", "half-closed"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_is_cancelled(port: Port, stream: bool, half: bool):
    before, cancelled = len(port.engine.submitted), len(port.engine.cancelled)
    with port.connect() as connection:
        connection.sendall(raw_post(ROUTE, LONG | {"stream": stream, "n": 3}))
        submitted(port, before + 3)
        if stream:
            read_until(connection, b"data: ")
        if half:
            connection.shutdown(socket.SHUT_WR)
            until(lambda: len(port.engine.cancelled) == cancelled + 3, seconds=1)
    until(lambda: len(port.engine.cancelled) == cancelled + 3, seconds=1)


def test_a_reset_is_leaving_too(port: Port):
    before = len(port.engine.submitted)
    with port.connect() as connection:
        connection.sendall(raw_post(ROUTE, LONG | {"stream": True}))
        submitted(port, before + 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_leaving_with_half_a_body_starts_nothing(port: Port):
    before = len(port.engine.submitted)
    with port.connect() as connection:
        connection.sendall(raw_post(ROUTE, LONG)[:-10])
        time.sleep(0.02)
    assert port.health() == 200
    assert len(port.engine.submitted) == before


def test_leaving_while_waiting_for_a_place_in_the_engine():
    with open_port(ScriptedEngine(rows=1, step_seconds=0.005)) as port, port.connect() as first:
        first.sendall(raw_post(ROUTE, LONG | {"stream": True}))
        read_until(first, b"data: ")
        with port.connect() as second:
            second.sendall(raw_post(ROUTE, LONG))
            submitted(port, 2)
        until(lambda: port.engine.cancelled == port.engine.submitted[1:], seconds=1)
        assert port.engine.open == 1


def test_two_hundred_clients_of_whom_many_leave(port: Port):
    """None is lost, none gets what another asked for, and who leaves is cancelled."""
    before = len(port.engine.submitted)
    dice = random.Random(1)
    plans = [(f"client {i} says {i * 7919}", dice.random(), dice.randint(1, 9)) for i in range(200)]

    async def one(client: httpx.AsyncClient, prompt: str, fate: float, pieces: int) -> str:
        tokens = len(prompt)
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "stream": fate < 0.7}
        if fate < 0.35:  # leaves in the middle of a stream
            body["max_tokens"] = 450
            async with client.stream("POST", ROUTE, json=body) as answer:
                async for _ in answer.aiter_lines():
                    pieces -= 1
                    if pieces == 0:
                        return "left"
        if fate < 0.7:
            async with client.stream("POST", ROUTE, json=body) as answer:
                data = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
            text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in data)
            assert text == echo(prompt, tokens)
            return "read"
        if fate < 0.85:  # leaves before there is an answer
            with pytest.raises(httpx.ReadTimeout):
                body["max_tokens"] = 450
                await client.post(ROUTE, json=body, timeout=httpx.Timeout(20, read=0.1))
            return "left"
        text = (await client.post(ROUTE, json=body)).json()["choices"][0]["text"]
        assert text == echo(prompt, tokens)
        return "read"

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=port.url, limits=limits, timeout=20, **DIRECT
        ) as client:
            return await asyncio.gather(*(one(client, *plan) for plan in plans))

    fates = asyncio.run(all_of_them())
    assert len(fates) == 200 and 50 < fates.count("left") < 150
    assert len(port.engine.submitted) - before == 200
    until(lambda: port.engine.open == 0, seconds=1)
    mine = set(port.engine.submitted[before:])
    assert len(mine & set(port.engine.finished)) == fates.count("read")
    assert len(mine & set(port.engine.cancelled)) == fates.count("left")


# ---------------------------------------------------------------------------------------------
# Crowding
# ---------------------------------------------------------------------------------------------


def test_beyond_the_bound_is_429_and_a_place_comes_free():
    with open_port(ScriptedEngine(step_seconds=0.01), max_open=2) as port, port.openai() as client:
        with port.connect() as crowd:
            crowd.sendall(raw_post(ROUTE, LONG | {"n": 2}))
            submitted(port, 2)
            with pytest.raises(openai.RateLimitError, match="2 of 2 places") as refused:
                client.completions.create(model="m", prompt="x")
            assert refused.value.response.headers["retry-after"] == "1"
            with pytest.raises(openai.BadRequestError, match="3 sequences; 2 at once"):
                client.completions.create(model="m", prompt="x", n=3)
        until(lambda: port.engine.open == 0)
        answer = client.with_options(max_retries=3).completions.create(model="m", prompt="xy")
        assert answer.choices[0].text.startswith("yx")


# ---------------------------------------------------------------------------------------------
# Dawdling and attacking
# ---------------------------------------------------------------------------------------------


def neighbour_is_served(port: Port) -> None:
    with port.http() as http:
        body = {"model": "m", "prompt": "abc", "max_tokens": 3}
        answer = http.post(ROUTE, json=body, timeout=2)
    assert answer.json()["choices"][0]["text"] == "cba"


def test_a_body_that_trickles_is_given_up():
    with open_port(body_seconds=0.3) as port, port.connect() as connection:
        began = time.monotonic()
        connection.sendall(raw_post(ROUTE, LONG)[:-10])
        answer = read_until(connection, b"never")  # to the end: the connection is closed
        assert answer.startswith(b"HTTP/1.1 408") and b'"timeout"' in answer
        assert 0.2 < time.monotonic() - began < 2


def test_a_reader_that_does_not_read_holds_up_nobody(port: Port):
    prompt = "z" * 400
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(port.address)
        body = {"model": "m", "prompt": prompt, "max_tokens": 100, "logprobs": 20, "stream": True}
        connection.sendall(raw_post(ROUTE, body))
        neighbour_is_served(port)
        until(lambda: port.engine.open == 0)  # it did not hold up the engine either
        data = read_until(connection, b"[DONE]")
        assert data.count(b'"text":"z"') == 100


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"a"),
        (b"GET / HTTP/1.1\r\nHost: ", b"a"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"a"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"a: b\r\n"),
    ],
)
def test_an_endless_head_is_cut_off(port: Port, start: bytes, more: bytes):
    with port.connect() as connection:
        connection.sendall(start)
        sent = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while sent < 2**30:
                sent += connection.send(more * 50000)
        assert sent < 2**26
    neighbour_is_served(port)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0\r\n\r\n",
        b"\r\n" * 1000 + b"\0" * 1000 + b"\r\n\r\n",
    ],
)
def test_garbage_is_answered_with_400(port: Port, garbage: bytes):
    with port.connect() as connection:
        connection.sendall(garbage)
        assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 4")
    neighbour_is_served(port)


def test_many_idle_connections_hold_up_nobody(port: Port):
    connections = [port.connect() for _ in range(100)]
    try:
        for connection in connections[::2]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: lo")
        neighbour_is_served(port)
    finally:
        for connection in connections:
            connection.close()


def test_the_body_may_wait_for_a_word(port: Port):
    """`Expect: 100-continue`, which curl sends with a large body."""
    head, _, body = raw_post(ROUTE, LONG | {"max_tokens": 1}, "Expect: 100-continue").partition(
        b"\r\n\r\n"
    )
    with port.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert read_until(connection, b'"usage"').startswith(b"HTTP/1.1 200")
