"""The routes, spoken to with OpenAI's own client and with plain HTTP."""

import dataclasses
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from dsjax.serving.json_body import parse_object
from dsjax.serving.wire import dump
from tests.serving.ports import Port, echo, open_port, raw_post, read_until, until
from tests.serving.scripted import ScriptedEngine, make_served, tokenizer

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    with open_port(max_body=4096) as port:
        yield port


@pytest.fixture
def client(port: Port) -> Iterator[openai.OpenAI]:
    with port.openai() as client:
        yield client


@pytest.fixture
def http(port: Port) -> Iterator[httpx.Client]:
    with port.http() as client:
        yield client


# ---------------------------------------------------------------------------------------------
# OpenAI's client
# ---------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert model.id == "m" and model.max_model_len == 512 and model.chat_template is True
    assert client.models.retrieve("m") == model
    with pytest.raises(openai.NotFoundError, match="'m' is served") as error:
        client.models.retrieve("other/m")
    assert error.value.code == "model_not_found"


def test_a_models_name_may_have_slashes():
    name = "deepseek-ai/DeepSeek-R1"
    with open_port(served=dataclasses.replace(make_served(), name=name)) as port:
        with port.openai() as client:
            assert client.models.retrieve(name).id == name
        with port.http() as http:
            for path in (name, name.replace("/", "%2F")):
                assert http.get(f"/v1/models/{path}").json()["id"] == name


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/m", "/metrics"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str):
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_is_not_there(http: httpx.Client):
    assert [http.head(path).status_code for path in ("/nowhere", "/v1/completions")] == [404, 405]


def test_a_completion(client: openai.OpenAI):
    answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=9, n=2)
    assert [choice.text for choice in answer.choices] == [echo(PROMPT, 9)] * 2
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 18


def test_a_streamed_completion_is_the_same_in_pieces(client: openai.OpenAI):
    stream = client.completions.create(
        model="m",
        prompt=PROMPT,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, usage = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == echo(PROMPT, 9)
    assert len(chunks) > 1 and chunks[-1].choices[0].finish_reason == "length"
    assert usage.usage.completion_tokens == 9 and usage.choices == []


def test_a_chat_that_thinks():
    words = "<think>hm</think>yes"
    text = words.replace("<think>", "\0").replace("</think>", "\1")
    tags = {"\0": tokenizer().added_tokens["<think>"], "\1": tokenizer().added_tokens["</think>"]}
    script = [tags.get(c) or tokenizer().encode(c)[0] for c in text] + [tokenizer().eos_id]
    engine = ScriptedEngine(lambda _: script, eos=tokenizer().eos_id)
    with open_port(engine) as port, port.openai() as client:
        asked = [{"role": "user", "content": "well?"}]
        whole = client.chat.completions.create(model="m", messages=asked)
        message = whole.choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "yes")
        assert whole.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(model="m", messages=asked, stream=True)
        deltas = [chunk.choices[0].delta for chunk in stream]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.content or "" for delta in deltas) == "yes"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cancels_in_the_engine(port: Port, client: openai.OpenAI, stream: bool):
    before = len(port.engine.cancelled)
    answer = client.completions.create(
        model="m", prompt=PROMPT * 9, max_tokens=170, stop=["brown"[::-1]], stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "xof "
    assert choices[-1].finish_reason == "stop"
    until(lambda: len(port.engine.cancelled) == before + 1)


def test_errors_have_their_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="m", prompt="x", temperature=1000, stream=True)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context_length_exceeded") as error:
        client.completions.create(model="m", prompt="x" * 600)
    assert error.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens" in error.value.message


def test_what_the_engine_refuses_is_a_400_also_of_a_stream():
    engine = ScriptedEngine(context=10)
    with open_port(engine) as port, port.openai() as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="at most 10"):
                client.completions.create(model="m", prompt="x" * 20, stream=stream)


def test_a_model_without_a_template_says_so():
    with open_port(served=make_served(chat=False)) as port, port.openai() as client:
        assert client.models.list().data[0].chat_template is False
        with pytest.raises(openai.BadRequestError, match="no chat template; use completions"):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])


# ---------------------------------------------------------------------------------------------
# Plain HTTP
# ---------------------------------------------------------------------------------------------


def test_a_stream_is_server_sent_events_to_the_end(http: httpx.Client):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    *events, done, nothing = answer.text.split("\n\n")
    assert nothing == "" and done == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events)


def test_silence_is_filled_with_comments():
    engine = ScriptedEngine(step_seconds=0.25)
    with open_port(engine, keep_alive_seconds=0.05) as port, port.http() as http:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 2, "stream": True}
        text = http.post("/v1/completions", json=body).text
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_comments_also_come_while_there_is_nothing_to_show():
    """What may become a stop string is held back, however many steps it takes."""
    engine = ScriptedEngine(lambda _: tokenizer().encode("aaaaaaaaaab"), step_seconds=0.03)
    with open_port(engine, keep_alive_seconds=0.05) as port, port.http() as http:
        body = {"model": "m", "prompt": PROMPT, "stream": True, "stop": "aaaaaaaaaac"}
        text = http.post("/v1/completions", json=body).text
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b"", "application/json", 400, "not JSON"),
        (b"\xff\xfe{\x00}\x00", "application/json", 400, "the body is UTF-16; expected UTF-8"),
        (b'{"model": "\xe9"}', "application/json", 400, "utf-8"),
        (b"[1]", "application/json", 400, "is a JSON array; expected an object"),
        (b'{"model": NaN}', "application/json", 400, "NaN is no number"),
        (b'{"model": "m", "n": ' + b"9" * 4000 + b"}", "application/json", 400, "n: "),
        # Too deep for some Pythons; others find out that it does not end.
        (b"[" * 4000, "application/json", 400, "the body is n"),
        (b"[" * 4097, "application/json", 413, "larger than 4096 bytes"),
        (b'{"model": "\\ud800", "prompt": "x"}', "application/json", 400, "surrogate"),
        (b"{}", "text/plain", 415, "text/plain; expected application/json"),
        (b"model=m", "application/x-www-form-urlencoded", 415, "expected application/json"),
    ],
)
def test_bodies_that_are_none(
    http: httpx.Client, content: bytes, kind: str, status: int, message: str
):
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = http.post(path, content=content, headers={"Content-Type": kind})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert message in error["message"] and "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"


def test_a_key_that_stands_twice_counts_as_it_stands_last(http: httpx.Client):
    content = b'{"model": "x", "prompt": "ab", "max_tokens": 1, "model": "m"}'
    headers = {"Content-Type": "application/json; charset=utf-8"}
    answer = http.post("/v1/completions", content=content, headers=headers)
    assert answer.json()["choices"][0]["text"] == "b"


def test_a_body_too_large_is_refused_before_it_is_there(port: Port):
    announced = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    announced += b"Content-Type: application/json\r\n"
    with port.connect() as connection:
        connection.sendall(announced + b"Content-Length: 99999999999\r\n\r\n")
        assert b"413" in read_until(connection, b"body_too_large")
    with port.connect() as connection:  # without an announcement: as soon as it is too much
        connection.sendall(announced + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            connection.sendall(b"400\r\n" + b" " * 0x400 + b"\r\n")
        assert b"413" in read_until(connection, b"body_too_large")


def test_the_connection_survives_a_body_that_was_too_large(http: httpx.Client):
    for _ in range(3):
        headers = {"Content-Type": "application/json"}
        answer = http.post("/v1/completions", content=b" " * 10**6, headers=headers)
        assert answer.status_code == 413
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("BREW", "/v1/completions", 405),
    ],
)
def test_wrong_routes_have_the_shape_of_errors(
    http: httpx.Client, method: str, path: str, status: int
):
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/models", "/v1/models"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/v1/health", "/health"),
        ("/v1/embeddings", None),
        ("//", None),
    ],
)
def test_a_wrong_base_url_is_told_the_right_one(http: httpx.Client, path: str, meant: str | None):
    for method in ("GET", "POST"):
        answer = http.request(method, http.base_url.copy_with(raw_path=path.encode()))
        assert answer.status_code == 404
        hint = f"; you may mean {meant}" if meant else ""
        assert answer.json()["error"]["message"] == f"there is no {path}{hint}"


def test_other_sites_get_no_permission(http: httpx.Client):
    answer = http.get("/v1/models", headers={"Origin": "https://example.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "server" not in answer.headers


def test_metrics_count_what_was_answered(port: Port, http: httpx.Client):
    with port.openai() as client:
        client.completions.create(model="m", prompt=PROMPT, max_tokens=2)
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'vllm:request_success_total{finished_reason="length",model_name="m"}' in answer.text
    assert "vllm:num_requests_running" in answer.text


def test_the_description_is_whole(http: httpx.Client):
    """Every reference in /openapi.json leads somewhere, and every route is there."""
    schema = http.get("/openapi.json").json()
    assert schema["paths"].keys() == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/health",
        "/metrics",
    }
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schema["components"]["schemas"]


def test_a_fault_of_ours_is_a_500(monkeypatch: pytest.MonkeyPatch, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("dsjax.serving.http.parse", broken)
    answers = pytest.raises(openai.InternalServerError, match="its log says more")
    with open_port() as port, port.openai() as client, answers:
        client.completions.create(model="m", prompt="x")
    assert "ZeroDivisionError: ours" in caplog.text


def test_a_fault_in_a_stream_is_an_event(monkeypatch: pytest.MonkeyPatch, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("dsjax.serving.job.Job.feed", broken)
    with open_port() as port:
        with port.openai() as client, pytest.raises(openai.APIError, match="its log says more"):
            list(client.completions.create(model="m", prompt="x", stream=True))
        until(lambda: port.engine.open == 0)
    assert "ZeroDivisionError: ours" in caplog.text


def test_pipelined_requests_are_answered_in_order(port: Port):
    body = {"model": "m", "max_tokens": 3}
    with port.connect() as connection:
        asked = [raw_post("/v1/completions", {**body, "prompt": p}) for p in ("abc", "xyz")]
        connection.sendall(b"".join(asked))
        data = b""
        while data.count(b'"usage"') < 2:
            data += connection.recv(65536)
    assert data.index(b'"cba"') < data.index(b'"zyx"')


def test_json_goes_out_as_it_is():
    assert dump({"a": "é\n", "b": [1.5, None]}) == '{"a":"é\\n","b":[1.5,null]}'.encode()
    assert json.loads(dump({"a": "\ud800"})) == {"a": "\ud800"}
    assert parse_object(b'{"a": 1}') == {"a": 1}
