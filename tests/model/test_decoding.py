"""Decoding over pages of latents says what one pass over the whole text says."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.architecture import DeepSeekConfig
from dsjax.kernels.paged_attention import places_of
from dsjax.model.decoder import Decoder, Pages, make_pages, take_apart
from dsjax.model.layers import count_parameters, variables
from dsjax.model.transformer import Transformer

from .conftest import LENGTH, forward, off

EXACT = 1e-5
PAGE, COUNT = 8, 16
TABLE = np.array([[3, 9, 1, 14, 0, 7], [2, 5, 15, 4, 11, 8]], np.int32)
"""Pages of two rows, in no order."""


@partial(jax.jit, static_argnames="ahead")
def extend(
    decoder: Decoder,
    pages: Pages,
    tokens: Any,
    starts: Any,
    follow: Any = None,
    ahead: bool = False,
) -> Any:
    counts = jnp.full(tokens.shape[0], tokens.shape[1])
    places = places_of(
        starts, counts, jnp.asarray(TABLE), queries=tokens.shape[1], pages=COUNT, page_size=PAGE
    )
    hidden, pages, _ = decoder.extend(tokens, pages, places)
    if ahead:
        hidden, pages = decoder.look_ahead(follow, hidden, pages, places)
    return hidden, pages


def dirty_pages(decoder: Decoder, *, mtp: bool = False) -> Pages:
    """What lies in pages that are not filled yet must not matter."""
    pages = make_pages(decoder.config, 1, COUNT, PAGE, jnp.float32, mtp=mtp)
    return jax.tree.map(lambda page: page + 9.0, pages)


@pytest.fixture(scope="module")
def decoder(model: Transformer) -> Decoder:
    return take_apart(model)


def test_a_decoder_holds_the_weights_of_its_model(model: Transformer, decoder: Decoder) -> None:
    assert sum(array.size for array in jax.tree.leaves(decoder)) == count_parameters(model)


def test_the_cache_holds_only_latents(decoder: Decoder) -> None:
    config = decoder.config
    pages = make_pages(config, 1, COUNT, PAGE, jnp.bfloat16, mtp=False)
    a_token = config.kv_lora_rank + config.qk_rope_head_dim
    held = sum(page.nbytes for page in pages)
    assert held == 2 * a_token * config.num_hidden_layers * COUNT * PAGE


@pytest.mark.parametrize("name", ["v3", "v2_lite", "no_shared_experts_no_dense_layers"])
def test_absorbed_and_expanded_attention_say_what_one_pass_says(
    name: str, tokens: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk with keys expanded, and in chunks of 12 in the latent space."""
    config = CONFIGS[name]
    model = place(config, random_weights(config))
    expected = forward(model, tokens).hidden
    decoder = take_apart(model)
    for worth_expanding, chunk in ((1, LENGTH), (LENGTH, 12)):
        monkeypatch.setattr(
            "dsjax.model.mla._queries_worth_expanding", lambda _, least=worth_expanding: least
        )
        run = jax.jit(extend.__wrapped__)
        pages = dirty_pages(decoder)
        for begin in range(0, LENGTH, chunk):
            part = tokens[:, begin : begin + chunk]
            hidden, pages = run(decoder, pages, part, jnp.full(2, begin))
            assert off(hidden, expected[:, begin : begin + chunk]) < EXACT


@pytest.mark.parametrize("at_once", [1, 3])
def test_decoding_step_by_step_equals_one_pass(
    model: Transformer, decoder: Decoder, tokens: jax.Array, at_once: int
) -> None:
    """Rows of unequal length, continued by the text's own tokens."""
    expected = np.asarray(forward(model, tokens).hidden)
    lengths = np.array([5, 21])
    # What stands behind a row's length is written over.
    _, pages = extend(decoder, dirty_pages(decoder), tokens[:, :24], jnp.zeros(2, jnp.int32))
    for begin in range(0, 24, at_once):
        places = lengths[:, None] + begin + np.arange(at_once)[None]
        part = jnp.take_along_axis(tokens, places, axis=1)
        hidden, pages = extend(decoder, pages, part, jnp.asarray(lengths + begin))
        assert off(hidden, np.take_along_axis(expected, places[:, :, None], axis=1)) < EXACT


def test_looking_ahead_over_a_cache_equals_one_pass(
    model: Transformer, decoder: Decoder, tokens: jax.Array
) -> None:
    expected = forward(model, tokens).mtp_hidden[0]
    pages = dirty_pages(decoder, mtp=True)
    for begin, end in ((0, 20), (20, 40), (40, 41)):
        follow = tokens[:, begin + 1 : end + 1]
        part, starts = tokens[:, begin:end], jnp.full(2, begin)
        hidden, pages = extend(decoder, pages, part, starts, follow, ahead=True)
        assert off(hidden, expected[:, begin:end]) < EXACT


def test_a_decoder_computes_in_the_models_dtype_but_scores_in_float32(
    config: DeepSeekConfig, tokens: jax.Array
) -> None:
    """Matrices are cast once; routers and norms keep what is stored, logits are never rounded."""
    model = place(config, random_weights(config))
    model.dtype = jnp.dtype(jnp.bfloat16)
    decoder = take_apart(model)
    kinds = {name: str(weight.dtype) for name, weight in variables(decoder)}
    kept = {name for name, dtype in kinds.items() if dtype == "float32"}
    assert {name.split(".")[-2] for name in kept} <= {
        "norm", "attn_norm", "ffn_norm", "q_a_norm", "kv_a_norm", "enorm", "hnorm", "router",
    }  # fmt: skip
    assert set(kinds.values()) == {"float32", "bfloat16"}
    hidden = jax.random.normal(jax.random.key(0), (2, config.hidden_size)).astype(jnp.bfloat16)
    found, expected = decoder.logits(hidden), model.logits(hidden[:, None])[:, 0]
    assert found.dtype == jnp.float32
    assert off(found, expected) < EXACT
