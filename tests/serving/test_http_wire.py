"""Ways in which real clients and proxies write the same request, and what is made of each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.ports import Port, echo, open_port, raw_post, read_until

BODY = {"model": "m", "prompt": "abcdef", "max_tokens": 3}
ROUTE = "/v1/completions"
JSON = "application/json"


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    with open_port() as port:
        yield port


@pytest.fixture
def http(port: Port) -> Iterator[httpx.Client]:
    with port.http() as client:
        yield client


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    "kind", [JSON, "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"]
)
def test_the_charset_of_json_is_accepted(http: httpx.Client, kind: str):
    answer = http.post(ROUTE, content=json.dumps(BODY), headers={"Content-Type": kind})
    assert text(answer) == "fed"


def test_a_byte_order_mark_is_not_part_of_a_body(http: httpx.Client):
    content = b"\xef\xbb\xbf" + json.dumps(BODY).encode()
    assert text(http.post(ROUTE, content=content, headers={"Content-Type": JSON})) == "fed"


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "zstd", "gzip, identity"])
def test_a_compressed_body_is_refused_by_the_name_of_its_encoding(
    http: httpx.Client, encoding: str
):
    content = gzip.compress(json.dumps(BODY).encode())
    headers = {"Content-Type": JSON, "Content-Encoding": encoding}
    answer = http.post(ROUTE, content=content, headers=headers)
    assert answer.status_code == 415
    assert encoding.lower() in answer.json()["error"]["message"]
    headers["Content-Encoding"] = "identity"
    assert "the body is gzip" in http.post(ROUTE, content=content, headers=headers).text
    assert text(http.post(ROUTE, content=json.dumps(BODY), headers=headers)) == "fed"


def test_a_body_may_come_in_chunks_of_unknown_length(http: httpx.Client):
    pieces = (bytes([byte]) for byte in json.dumps(BODY).encode())
    assert text(http.post(ROUTE, content=pieces, headers={"Content-Type": JSON})) == "fed"


def test_a_client_that_waits_for_100_continue_gets_it(port: Port):
    request = raw_post(ROUTE, BODY, "Expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    with port.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert b'"fed"' in read_until(connection, b'"usage"')


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_is_answered_whole_and_closed(port: Port, stream: bool):
    """nginx speaks it to the server behind it, unless it is told otherwise."""
    request = raw_post(ROUTE, {**BODY, "stream": stream}).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with port.connect() as connection:
        connection.sendall(request)
        answer = read_until(connection, b"never")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0] and b"chunked" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)


@pytest.mark.parametrize("accept", ["text/event-stream", JSON, "*/*", "image/png"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_body_alone_says_whether_it_streams(http: httpx.Client, accept: str, stream: bool):
    answer = http.post(ROUTE, json={**BODY, "stream": stream}, headers={"Accept": accept})
    kind = "text/event-stream" if stream else JSON
    assert answer.headers["content-type"].startswith(kind)


def test_headers_of_proxies_and_long_ones_do_not_matter(http: httpx.Client):
    headers = {
        "X-Forwarded-For": "203.0.113.7, 10.0.0.1",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Prefix": "/llm",
        "Forwarded": "for=203.0.113.7;proto=https",
        "X-Request-Id": "1",
        "OpenAI-Organization": "org",
        "Cookie": "a" * 8000,
    }
    assert text(http.post(ROUTE, json=BODY, headers=headers)) == "fed"


def test_a_query_is_ignored(http: httpx.Client):
    """Azure's clients add api-version."""
    assert text(http.post(f"{ROUTE}?api-version=2024-02-01", json=BODY)) == "fed"


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": "a"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "assistant"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    [{"role": "developer", "content": "a"}, {"role": "user", "content": "b", "name": "me"}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=str)
def test_the_template_alone_says_which_conversations_are_possible(
    http: httpx.Client, messages: list[dict[str, Any]]
):
    body = {"model": "m", "messages": messages, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_null_and_empty_fields_are_what_was_left_out(http: httpx.Client):
    """As typed clients and forms write it."""
    unset = dict.fromkeys(
        ["temperature", "top_p", "n", "stop", "seed", "logprobs", "logit_bias", "stream_options"]
    )
    answer = http.post(ROUTE, json={**BODY, **unset, "stop": "", "user": "", "suffix": ""})
    assert text(answer) == echo("abcdef", 3)
