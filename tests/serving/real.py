"""The engine itself, tiny and in little room, as what a port is opened over."""

from __future__ import annotations

import functools

from reference.configs import CONFIGS
from reference.weights import drafting_weights, place

from dsjax.inference.engine import Engine
from dsjax.inference.settings import EngineSettings
from dsjax.model.transformer import Transformer
from dsjax.serving.protocol import Served
from tests.data.spoken import make_served, tokenizer
from tests.serving.ports import Port, until

CONTEXT = 256
ROWS = 8
PAGES = 12
"""Of 32 tokens. Eight long sequences want some thirty: they wait, and give way."""


@functools.cache
def served() -> Served:
    """The model "r1"."""
    return make_served(context=CONTEXT)


@functools.cache
def model() -> Transformer:
    """Its drafts are often right."""
    sizes = {"vocab_size": served().vocab_size, "max_position_embeddings": CONTEXT}
    stops = {"bos_token_id": tokenizer().bos_id, "eos_token_id": tokenizer().eos_id}
    config = CONFIGS["v3"].model_copy(update=sizes | stops | {"num_hidden_layers": 2})
    return place(config, drafting_weights(config, sharpness=2))


@functools.cache
def engine() -> Engine:
    """Warm. Ports are opened over it one after the other."""
    settings = EngineSettings(rows=ROWS, context=CONTEXT, cache_tokens=32 * PAGES, drafts=1)
    engine = Engine(model(), settings, vocab_size=tokenizer().vocab_size)
    engine.warm_up()
    return engine


def quiet_engine() -> Engine:
    """Another one for requests that are alone: no drafts, room for all, and two programs."""
    settings = EngineSettings(rows=1, context=CONTEXT, drafts=0)
    engine = Engine(model(), settings, vocab_size=tokenizer().vocab_size)
    engine._scheduler._shapes = [(1, 32)]
    return engine


def nothing_is_left(port: Port) -> None:
    """Rows, pages and places are free, and nobody remembers a request or a connection."""
    worker = port.server.worker
    until(lambda: not port.server.server_state.connections)
    until(lambda: not (worker._places or worker._subscriptions or worker._thread._running))
    until(lambda: engine().idle)
    scheduler = engine()._scheduler
    assert [sorted(free) for free in scheduler._free_rows] == [list(range(ROWS))]
    assert [(pool.available, pool.count) for pool in scheduler.pools] == [(PAGES, PAGES)]
    assert not any(users for pool in scheduler.pools for users in pool._users)
    assert not scheduler.running and not scheduler.waiting and not engine()._sequences
    until(lambda: worker._thread.stats.running == 0)
