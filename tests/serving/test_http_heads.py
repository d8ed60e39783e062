"""Connections: how long one is waited for that owes a request, and that none holds answers back."""

import socket
import time
from collections.abc import Iterator

import pytest

from tests.serving.ports import Port, open_port, raw_post, read_until
from tests.serving.scripted import ScriptedEngine

SECONDS = 0.4
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    """An answer of 100 tokens takes a second, longer than a head may."""
    with open_port(ScriptedEngine(step_seconds=0.01), head_seconds=SECONDS) as port:
        yield port


def trickle(connection: socket.socket, data: bytes) -> float:
    """Send a byte every few milliseconds until the server closes; the seconds that it took."""
    began = time.monotonic()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for byte in data:
            connection.send(bytes([byte]))
            time.sleep(0.01)
    return time.monotonic() - began


def is_closed(connection: socket.socket) -> bool:
    return connection.recv(65536) == b""


@pytest.mark.parametrize("before", [b"", HEAD])
def test_a_head_that_trickles_is_given_up(port: Port, before: bytes):
    with port.connect() as connection:
        if before:
            connection.sendall(before)
            read_until(connection, b'"ok"}')
        taken = trickle(connection, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 300)
    assert SECONDS / 2 < taken < 10 * SECONDS


def test_who_says_nothing_is_not_waited_for(port: Port):
    with port.connect() as connection:
        began = time.monotonic()
        assert is_closed(connection)
        assert SECONDS / 2 < time.monotonic() - began < 10 * SECONDS


def test_the_rest_of_a_refused_body_is_not_waited_for(port: Port):
    head = raw_post("/nowhere", {"prompt": "x" * 5000}).partition(b"\r\n\r\n")[0]
    with port.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert b"404" in read_until(connection, b"null}}")
        assert trickle(connection, b"x" * 300) < 10 * SECONDS


def test_who_is_answered_is_not_cut_off(port: Port):
    """Neither in an answer that takes longer than a head may, nor between two requests."""
    body = {"model": "m", "prompt": "x", "max_tokens": 100, "stream": True}
    with port.connect() as connection:
        connection.sendall(raw_post("/v1/completions", body))
        began = time.monotonic()
        assert b"[DONE]" in read_until(connection, b"0\r\n\r\n")
        assert time.monotonic() - began > 2 * SECONDS
        time.sleep(2 * SECONDS)
        connection.sendall(HEAD)
        assert read_until(connection, b'"ok"}').startswith(b"HTTP/1.1 200")


def test_pieces_of_an_answer_do_not_wait_for_acknowledgements(port: Port):
    with port.connect() as connection:
        connection.sendall(HEAD)
        read_until(connection, b'"ok"}')
        for there in port.server.server_state.connections:
            mine = there.transport.get_extra_info("socket")
            assert mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_head_may_come_in_pieces(port: Port):
    with port.connect() as connection:
        for start in range(0, len(HEAD), 20):
            connection.sendall(HEAD[start : start + 20])
            time.sleep(0.01)
        assert read_until(connection, b'"ok"}').startswith(b"HTTP/1.1 200")
