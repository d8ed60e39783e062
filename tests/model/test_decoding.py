"""Decoding over the latent cache says what one pass over the whole text says."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.model.mla import Latent
from dsjax.model.rope import rotary_table
from dsjax.model.transformer import Cache, DeepSeek

from .conftest import LENGTH, forward, off, random_tokens

EXACT = 1e-5

prefill = partial(jax.jit, static_argnums=3)(DeepSeek.prefill)
decode = jax.jit(DeepSeek.decode)


@pytest.mark.parametrize("name", ["v3", "moonlight"])
def test_absorbed_attention_equals_expanded(name: str) -> None:
    config = CONFIGS[name]
    attn = jax.tree.map(lambda a: a[0], place(config, random_weights(config)).moe_layers).attn
    x = jax.random.normal(jax.random.key(0), (2, 40, config.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(40)[None], (2, 40))
    known, slots = 25, 32

    @jax.jit
    def both(attn: Any, x: jax.Array) -> tuple[Any, ...]:
        table = rotary_table(config, positions)
        expanded, latent = attn.expanded(x, table, None)
        room = ((0, 0), (0, slots - known), (0, 0))
        # What lies in the empty slots must not matter.
        cache = Latent(*(jnp.pad(part[:, :known], room, constant_values=9.0) for part in latent))
        filled = jnp.broadcast_to(jnp.arange(slots)[None] < known, (2, slots))
        rest = tuple(part[:, known:] for part in table)
        absorbed, new = attn.absorbed(x[:, known:], rest, cache, filled)
        return expanded, absorbed, latent, new

    expanded, absorbed, latent, new = both(attn, x)
    assert off(absorbed, expanded[:, known:]) < EXACT
    for made, kept in zip(new, latent, strict=True):
        assert off(made, kept[:, known:]) < EXACT


def test_the_cache_holds_only_latents(model: DeepSeek, tokens: jax.Array) -> None:
    config = model.config
    _, cache = jax.eval_shape(partial(model.prefill, slots=LENGTH), tokens, jnp.zeros(2, jnp.int32))
    held = sum(part.size for stack in (cache.dense, cache.moe) for part in stack)
    a_token = config.kv_lora_rank + config.qk_rope_head_dim
    assert held == a_token * config.num_hidden_layers * tokens.size


def test_prefill_equals_the_forward_pass(model: DeepSeek, tokens: jax.Array) -> None:
    hidden, cache = prefill(model, tokens, jnp.array([5, 21]), LENGTH)
    assert off(hidden, forward(model, tokens).hidden) < EXACT
    assert (cache.lengths == jnp.array([5, 21])).all()


@pytest.mark.parametrize("at_once", [1, 3])
def test_decoding_step_by_step_equals_prefill(
    model: DeepSeek, tokens: jax.Array, at_once: int
) -> None:
    """Prompts of unequal length, continued by the text's own tokens."""
    expected = np.asarray(forward(model, tokens).hidden)
    lengths = np.array([5, 21])
    # What stands behind a prompt's end is something else.
    behind = np.arange(LENGTH)[None] >= lengths[:, None]
    prompts = jnp.where(behind, random_tokens(model.config, (2, LENGTH), seed=7), tokens)
    _, cache = prefill(model, prompts, jnp.asarray(lengths), LENGTH)
    for begin in range(0, 24, at_once):
        places = lengths[:, None] + begin + np.arange(at_once)[None]
        hidden, cache = decode(model, jnp.take_along_axis(tokens, places, axis=1), cache)
        assert off(hidden, np.take_along_axis(expected, places[:, :, None], axis=1)) < EXACT
    assert (cache.lengths == lengths + 24).all()


def test_decoding_from_nothing_equals_the_forward_pass(model: DeepSeek, tokens: jax.Array) -> None:
    shapes = jax.eval_shape(partial(model.prefill, slots=LENGTH), tokens, jnp.zeros(2, jnp.int32))
    cache: Cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1])
    expected = forward(model, tokens).hidden
    for i in range(6):
        hidden, cache = decode(model, tokens[:, i : i + 1], cache)
        assert off(hidden[:, 0], expected[:, i]) < EXACT
