"""What a position says depends on nothing behind it, and on no other document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.architecture import DeepSeekConfig
from dsjax.model.layers import RouterBias, variables
from dsjax.model.transformer import Transformer

from .conftest import LENGTH

PLACE = 20

Influence = Callable[[jax.Array, int | None, int | None], Transformer]


@pytest.fixture(scope="module")
def distinct(config: DeepSeekConfig) -> jax.Array:
    """One row without a repeated token: an embedding row's gradient is that of one place."""
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.permutation(config.vocab_size)[None, :LENGTH].astype(np.int32))


@pytest.fixture(scope="module")
def influence(model: Transformer, distinct: jax.Array) -> Influence:
    """Gradient of a random direction of one place's output, of the main model and of MTP."""
    direction = jax.random.normal(jax.random.key(5), (model.config.hidden_size,))

    @jax.jit
    @jax.grad
    def gradient(model: Transformer, segments: jax.Array, main: Any, ahead: Any) -> jax.Array:
        out = model(distinct, segment_ids=segments)
        mtp = model.look_ahead(out).hidden[0]
        return main @ out.hidden[0] @ direction + ahead @ mtp[0] @ direction

    def at(segments: jax.Array, main: int | None, ahead: int | None) -> Transformer:
        places = np.arange(LENGTH)
        one_hot = (jnp.asarray((places == place).astype(np.float32)) for place in (main, ahead))
        return gradient(model, segments, *one_hot)

    return at


def reached(gradient: Transformer, tokens: jax.Array) -> np.ndarray:
    """Which places the output depends on at all, exactly."""
    return np.asarray(gradient.embed.weight[...][tokens[0]] != 0).any(axis=1)


def test_gradient_is_zero_after_the_token(influence: Influence, distinct: jax.Array) -> None:
    found = reached(influence(jnp.ones_like(distinct), PLACE, None), distinct)
    assert found[: PLACE + 1].all()
    assert not found[PLACE + 1 :].any()


def test_mtp_looks_one_token_further_and_no_more(influence: Influence, distinct: jax.Array) -> None:
    found = reached(influence(jnp.ones_like(distinct), None, PLACE), distinct)
    assert found[: PLACE + 2].all()
    assert not found[PLACE + 2 :].any()


def test_gradient_is_zero_across_documents(influence: Influence, distinct: jax.Array) -> None:
    begin = 12
    segments = jnp.ones_like(distinct).at[:, begin:].set(2)
    for main, ahead in ((PLACE, None), (None, PLACE)):
        found = reached(influence(segments, main, ahead), distinct)
        assert not found[:begin].any()
        assert found[begin : PLACE + 1].all()


def test_router_biases_get_no_gradient_and_all_else_does(
    influence: Influence, distinct: jax.Array
) -> None:
    for name, leaf in variables(influence(jnp.ones_like(distinct), PLACE, PLACE)):
        # The head makes no hidden state.
        silent = isinstance(leaf, RouterBias) or name.startswith("head.")
        assert bool((leaf[...] != 0).any()) != silent, name
