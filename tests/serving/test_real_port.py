"""A crowd at the port of a real engine, of whom many leave: nobody is lost, and nothing is left.

The engine has so little room that sequences wait, give way and share their beginnings.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jax
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsjax.inference.engine import Engine
from dsjax.inference.request import Request
from dsjax.inference.speculation import Speculation
from dsjax.serving.job import parse
from dsjax.serving.reading import CHAT, COMPLETIONS
from tests.data.spoken import TEXTS, ids
from tests.serving.ports import DIRECT, Port, open_port, raw_post
from tests.serving.real import engine, nothing_is_left, quiet_engine, served

pytestmark = pytest.mark.slow

PARTS = (1000, 500, 500)
CLIENTS = 32
"""At the same time; each has up to three sequences."""
KINDS = 60
LEAVING = 0.4
"""The share of clients that do not wait for the end."""
GROWTH, MORE_OBJECTS = 32 * 2**20, 150
"""Bytes and objects of Python's that 500 requests may leave: the second or the third part of all.

Both would leave them if requests did; what is imported or cached late comes once. Measured: 0 to
11 MiB, and at most 25 objects. The bytes are scratch memory of XLA's threads, which
come to take theirs one after the other; eight devices have many. On one device nine thousand more
requests took 2 MiB and no object.
"""

Body = dict[str, Any]
Said = dict[int, dict[str, Any]]
"""What a response says, choice by choice, however it was sent."""


# ---------------------------------------------------------------------------------------------
# What is asked, and what should be said
# ---------------------------------------------------------------------------------------------


class Ask:
    """A request, and what it gives alone on an engine of its own."""

    def __init__(self, route: str, body: Body, engine: Engine):
        self.route, self.body = route, body
        response = alone(engine, route, body)
        self.said = gathered(response["choices"])
        self.usage = tokens_of(response["usage"])


def alone(engine: Engine, route: str, body: Body) -> Body:
    """The response, from an engine that has nothing else to do."""
    job = parse(route, body, served(), "alone")
    for request in job.requests:
        engine.submit(request)
        while not engine.idle:
            for update in engine.step():
                job.feed(update)
            for stopped in job.stopped:
                engine.cancel(stopped)
    return job.response()


def gathered(choices: Iterable[dict[str, Any]]) -> Said:
    """Texts, log-probabilities and the reason to end, of whole choices or of a stream's pieces."""
    found: Said = {}
    for choice in choices:
        one = found.setdefault(choice["index"], {"finish": None})
        told = choice.get("message", choice.get("delta", {"text": choice.get("text")}))
        for field, text in told.items():
            if field != "role" and text:
                one[field] = one.get(field, "") + text
        for name, scores in (choice["logprobs"] or {}).items():
            one.setdefault(f"{name} logprobs", []).extend(scores)
        one["finish"] = choice["finish_reason"] or one["finish"]
    return found


def tokens_of(usage: dict[str, Any]) -> tuple[int, int]:
    """Without those that were cached, which depend on what was asked before."""
    return usage["prompt_tokens"], usage["completion_tokens"]


def agree(one: Any, other: Any) -> bool:
    """Equal, but log-probabilities only nearly: batches of other sizes are other programs."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-3
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return one == other


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    """Of all kinds, no two alike; half of them stop at a string that they would have said."""
    quiet, dice, found = quiet_engine(), random.Random(7), []
    for number in range(KINDS):
        route, body = make_body(number, dice)
        ask = Ask(route, body, quiet)
        text = ask.said[0].get("text") or ask.said[0].get("content", "")
        if dice.random() < 0.5 and len(text) > 2:
            place = dice.randrange(1, len(text) - 1)
            ask = Ask(route, body | {"stop": ["never", text[place : place + 2]]}, quiet)
        found.append(ask)
    ends = Counter(one["finish"] for ask in found for one in ask.said.values())
    print(f"\n  {KINDS} kinds of requests, whose choices end by {dict(ends)}", end="")
    assert min(ends["stop"], ends["length"]) >= KINDS // 6
    return found


def make_body(number: int, dice: random.Random) -> tuple[str, Body]:
    """A request whose answer is certain: greedy, or with a seed."""
    beginning = ("".join(TEXTS) * 2)[: dice.choice((0, 0, 100, 160))]
    text = f"{beginning}{number} {TEXTS[number % 3][: dice.randint(0, 40)]}"
    body: Body = {"model": "r1", "max_tokens": dice.choice((1, 2, 6, 12, 20, 40))}
    body["n"] = dice.choice((1, 1, 1, 2, 3))
    if dice.random() < 0.5:
        body |= {"temperature": 0}
    else:
        body |= {"seed": number, "temperature": dice.choice((0.7, 1, 1.3)), "top_p": 0.95}
        fewest = body["max_tokens"] // 2
        body |= dice.choice(({}, {"top_k": 20}, {"frequency_penalty": 0.5, "min_tokens": fewest}))
    scored = dice.random() < 0.3
    if number % 4 == 0:
        body |= {"messages": [{"role": "user", "content": text}]}
        return CHAT, body | ({"logprobs": True, "top_logprobs": 2} if scored else {})
    body |= {"prompt": ids(text) if number % 4 == 1 else text}
    return COMPLETIONS, body | ({"logprobs": 2, "echo": dice.random() < 0.5} if scored else {})


# ---------------------------------------------------------------------------------------------
# Who asks
# ---------------------------------------------------------------------------------------------


async def stay(http: httpx.AsyncClient, ask: Ask) -> None:
    """Wait for the whole answer; it is the right one."""
    answer = await http.post(ask.route, json=ask.body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert agree(gathered(said["choices"]), ask.said), ask.body
    assert tokens_of(said["usage"]) == ask.usage


async def listen(http: httpx.AsyncClient, ask: Ask) -> None:
    """Read the whole stream; it says what the answer would."""
    body = ask.body | {"stream": True, "stream_options": {"include_usage": True}}
    answer = await http.post(ask.route, json=body)
    assert answer.status_code == 200, answer.text
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    *chunks, last = (json.loads(event.removeprefix("data: ")) for event in events)
    assert agree(gathered(choice for c in chunks for choice in c["choices"]), ask.said), ask.body
    assert tokens_of(last["usage"]) == ask.usage


async def leave(port: Port, ask: Ask, dice: random.Random) -> None:
    """Ask, and go: before the answer or in the midst of it, closing one side, or without a word."""
    stream, how = dice.random() < 0.6, dice.choice(("close", "half", "reset"))
    reader, writer = await asyncio.open_connection(*port.address)
    writer.write(raw_post(ask.route, ask.body | {"stream": stream}, "Connection: close"))
    await asyncio.sleep(dice.random() ** 3 * 0.2)
    try:
        for _ in range(dice.randint(0, 6) if stream else 0):
            await reader.readuntil(b"\n\n")
        if how == "half":
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 20)  # the server closes its own side
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # it had said all before
    if how == "reset":
        linger = b"\1\0\0\0\0\0\0\0"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()


async def crowd(port: Port, asks: list[Ask], count: int, dice: random.Random) -> Counter[str]:
    """So many requests, some at the same time; how many sequences were waited for and left."""
    fates: Counter[str] = Counter()
    plans = iter(range(count))

    async def client(http: httpx.AsyncClient) -> None:
        for _ in plans:
            ask = dice.choice(asks)
            fate = dice.random()
            fates["left" if fate < LEAVING else "kept"] += len(ask.said)
            if fate < LEAVING:
                await leave(port, ask, dice)
            else:
                await (stay if dice.random() < 0.5 else listen)(http, ask)

    async with httpx.AsyncClient(base_url=port.url, timeout=60, **DIRECT) as http:
        await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
    return fates


# ---------------------------------------------------------------------------------------------
# What is left when they are gone
# ---------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """What this process holds, garbage collected."""

    resident: int
    """Bytes; 0 where nobody tells."""
    objects: int
    arrays: int


def held() -> Held:
    gc.collect()
    told, pages = Path("/proc/self/statm"), 0
    if told.exists():
        # glibc keeps what is freed, in an arena for each thread, and takes more now and then.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        pages = int(told.read_text().split()[1])
    objects, arrays = len(gc.get_objects()), len(jax.live_arrays())
    return Held(pages * os.sysconf("SC_PAGESIZE"), objects, arrays)


def samples(port: Port) -> Counter[str]:
    """What /metrics says: every sample by its name, and by how requests ended."""
    found: Counter[str] = Counter()
    with port.http() as http:
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                reason = sample.labels.get("finished_reason", "")
                found[f"{sample.name} {reason}".strip()] += int(sample.value)
    return found


def test_two_thousand_clients_of_whom_many_leave(
    asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is lost or gets what another asked for, nothing is left, and the counts add up."""
    submitted: list[str] = []

    take = engine().submit

    def submit(request: Request) -> None:
        take(request)
        submitted.append(request.id)

    monkeypatch.setattr(engine(), "submit", submit)
    # pytest keeps what is logged, and at some levels that is every request.
    for name in ("httpx", "uvicorn.access"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)
    coin = random.Random(2)
    monkeypatch.setattr(Speculation, "choose", lambda self, rows: coin.randint(0, self.drafts))
    dice, fates, holds = random.Random(1), Counter(), []
    before, began = engine().stats(), time.monotonic()
    with open_port(engine(), served()) as port:
        for count in PARTS:
            fates += asyncio.run(crowd(port, asks, count, dice))
            nothing_is_left(port)
            holds.append(held())
        told, stats = samples(port), engine().stats()
    ended = {end: told[f"vllm:request_success_total {end}"] for end in ("stop", "length", "abort")}
    seconds = time.monotonic() - began
    print(f"\n  {seconds:.0f} s; {len(submitted)} sequences: {dict(fates)}, {ended}")
    print(f"  after each part: {holds}\n  {stats}")
    assert len(submitted) == len(set(submitted)) == sum(ended.values())
    assert told["vllm:request_success_total error"] == 0
    # Who left may have been answered before; who stayed was.
    assert fates["kept"] <= ended["stop"] + ended["length"] <= fates["kept"] + fates["left"]
    assert fates["left"] / 4 < ended["abort"] <= fates["left"]
    generated = stats.generated_tokens - before.generated_tokens
    assert told["vllm:request_generation_tokens_sum"] == generated
    assert told["vllm:time_to_first_token_seconds_count"] <= len(submitted)
    for happened in ("preempted", "accepted", "prefix_hits"):
        assert getattr(stats, happened) - getattr(before, happened) > 50, happened
    for what, bound in (("resident", GROWTH), ("objects", MORE_OBJECTS), ("arrays", 1)):
        sizes = [getattr(one, what) for one in holds]
        assert min(after - before for before, after in pairwise(sizes)) < bound, (what, sizes)
