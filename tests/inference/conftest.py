"""One small model whose logits are far apart, and one way to run requests over it."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, Update
from dsjax.model.transformer import Transformer

CONTEXT = 128


@pytest.fixture(scope="session")
def random_model() -> Transformer:
    """V3 at its smallest, with an MTP layer and a context of 128."""
    config = CONFIGS["v3"]
    return place(config, random_weights(config))


class Finished:
    """All that the updates of one request said."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list = []
        self.updates: list[Update] = []

    def add(self, update: Update) -> None:
        assert not self.finish, "an update after the last one"
        self.updates.append(update)
        self.tokens += update.tokens
        self.logprobs += update.logprobs

    @property
    def finish(self) -> str | None:
        return self.updates[-1].finish if self.updates else None


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, Finished]:
    """Submit all, step until nothing is left, and check that nothing is left behind."""
    requests = list(requests)
    for request in requests:
        engine.submit(request)
    found = {request.id: Finished() for request in requests}
    while not engine.idle:
        for update in engine.step():
            found[update.request_id].add(update)
    assert all(one.finish for one in found.values())
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0)
    return found


@jax.jit
def _logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens).logits[0]


def whole_logits(model: Transformer, tokens: list[int]) -> np.ndarray:
    """Logits of one pass over everything, [len(tokens), V]."""
    row = np.zeros((1, CONTEXT), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_logits(model, jnp.asarray(row)))[: len(tokens)]
