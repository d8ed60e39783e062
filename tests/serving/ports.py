"""A real port in front of the scripted engine, and ways to speak to it."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai

from dsjax.serving.http import HttpServer, HttpSettings, listen
from dsjax.serving.protocol import Served
from tests.serving.scripted import ScriptedEngine, make_served, tokenizer

DIRECT: dict[str, Any] = {"trust_env": False, "verify": ssl.create_default_context()}
"""For httpx: no proxy; and not each client reads the certificates that none of them needs."""


def echo(prompt: str, tokens: int) -> str:
    """What `scripted.backwards` says to a completion's prompt of ASCII characters."""
    assert tokens <= len(prompt), "then comes bos"
    return prompt[::-1][:tokens]


class Port:
    """A server in a thread of its own, and ways to speak to it."""

    def __init__(self, engine: ScriptedEngine, served: Served, settings: HttpSettings):
        self.engine = engine
        self.key = settings.keys[0] if settings.keys else "none"
        self.server = HttpServer(engine, served, settings)
        listener = listen(settings)
        self.address = listener.getsockname()[:2]
        self.url = "http://{}:{}".format(*self.address)
        self.thread = threading.Thread(target=self._run, args=[listener])

    def _run(self, listener: socket.socket) -> None:
        with listener:
            self.server.run([listener])

    def http(self, **headers: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} | headers
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **DIRECT)

    def openai(self) -> openai.OpenAI:
        client = httpx.Client(timeout=20, **DIRECT)
        base = f"{self.url}/v1"
        return openai.OpenAI(base_url=base, api_key=self.key, max_retries=0, http_client=client)

    def health(self) -> int:
        with self.http() as client:
            return client.get("/health").status_code

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def open_port(
    engine: ScriptedEngine | None = None,
    served: Served | None = None,
    *,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Port]:
    """A port on loopback that is closed in the end; `wait` until it is warm."""
    engine = engine or ScriptedEngine(eos=tokenizer().eos_id)
    settings = HttpSettings(port=0, **settings)
    port = Port(engine, served or make_served(), settings)
    port.thread.start()
    try:
        if wait:
            until(lambda: port.server.started and port.health() == 200)
        yield port
    finally:
        port.stop()


def until(true: Callable[[], object], seconds: float = 10) -> None:
    """Wait for it, and not longer."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


def raw_post(path: str, body: dict[str, Any], *headers: str) -> bytes:
    """A request as it goes over the wire."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """What the server sends, up to `mark` or its end."""
    data = b""
    while mark not in data and (more := connection.recv(65536)):
        data += more
    return data
