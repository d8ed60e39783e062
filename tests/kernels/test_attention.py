import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.attention import causal_attention, causal_attention_reference
from dsjax.kernels.attention_blocks import (
    BLOCK,
    Gathered,
    Keys,
    Queries,
    attend,
    attend_backward,
    heads_first,
    inner_products,
    nothing_yet,
)

pytestmark = pytest.mark.usefixtures("thorough_compiler")

HEADS, QK, V = 2, 12, 8


def inputs(length, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k = (jax.random.normal(key, (2, length, HEADS, QK), dtype) for key in keys[:2])
    v = jax.random.normal(keys[2], (2, length, HEADS, V), dtype)
    segments = jnp.sort(jax.random.randint(keys[3], (2, length), 1, 4), axis=1)
    return q, k, v, segments


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(attention, q, k, v, ids):
    def loss(q, k, v):
        return (attention(q, k, v, ids, 0.3) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
def test_blocks_equal_the_whole_score_matrix_in_values_and_gradients(length):
    q, k, v, segments = inputs(length)
    for ids in (segments, jnp.ones_like(segments)):
        want = loss_and_gradients(causal_attention_reference, q, k, v, ids)
        got = loss_and_gradients(causal_attention, q, k, v, ids)
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@jax.jit
def one_block_of_queries(queries, chunks, d_out):
    """Its output, and the gradients of its q and of each chunk's k and v."""
    running = nothing_yet(queries.q.shape[:3], V)
    for keys in chunks:
        running = attend(running, queries, keys, 0.3)
    out, log_sum = running.finished()
    known = Gathered(d_out, log_sum, inner_products(out, d_out))
    d_q, d_chunks = jnp.zeros_like(queries.q), []
    for keys in chunks:
        zeros = jnp.zeros_like(keys.k), jnp.zeros_like(keys.v)
        d_q, *d_keys = attend_backward((d_q, *zeros), queries, keys, known, 0.3)
        d_chunks.append(d_keys)
    return out, d_q, d_chunks


def test_chunks_of_keys_may_come_in_any_order_and_the_future_is_not_touched():
    """The third of six blocks meets chunks of two: its own, one in the future, one in the past."""
    length, mine = 3 * BLOCK, slice(2 * BLOCK, None)
    q, k, v, ids = inputs(length)

    def reference(q_mine, k, v):
        q_all = q.at[:, mine].set(q_mine)
        return causal_attention_reference(q_all, k, v, ids, 0.3)[:, mine]

    out, back = jax.vjp(reference, q[:, mine], k, v)
    d_out = jax.random.normal(jax.random.key(1), out.shape)
    d_q, d_k, d_v = back(d_out)

    # A product with a NaN would show, be it masked or multiplied by zero.
    later = ((0, 0), (0, 0), (0, 3 * BLOCK), (0, 0))
    k_all, v_all = (jnp.pad(heads_first(x), later, constant_values=jnp.nan) for x in (k, v))
    ids_all = jnp.pad(ids, later[1:3], constant_values=3)
    chunks = []
    for place in (2, 4, 0):
        at = slice(place * BLOCK, (place + 2) * BLOCK)
        keys = Keys(k_all[:, :, at], v_all[:, :, at], ids_all[:, at], jnp.int32(place))
        chunks.append(keys)
    queries = Queries(heads_first(q[:, mine]), ids[:, mine], jnp.int32(2))
    got = one_block_of_queries(queries, chunks, heads_first(d_out))

    (own_k, own_v), future, past = got[2]
    got_k, got_v = (
        jnp.concatenate([early, own[:, :, :BLOCK]], axis=2)
        for early, own in zip(past, (own_k, own_v), strict=True)
    )
    for a, b in zip((*got[:2], got_k, got_v), (out, d_q, d_k, d_v), strict=True):
        np.testing.assert_allclose(a, heads_first(b), rtol=2e-5, atol=2e-5)
    assert not any(np.any(x) for x in (*future, own_k[:, :, BLOCK:], own_v[:, :, BLOCK:]))


def test_nothing_flows_between_segments_or_from_later_tokens():
    q, k, v, segments = inputs(BLOCK + 20)
    at = 70

    def one_output(v):
        return causal_attention(q, k, v, segments, 0.3)[0, at].sum()

    flows = np.abs(np.asarray(jax.grad(one_output)(v)))[0].sum((-1, -2)) > 0
    mine = np.asarray(segments[0] == segments[0, at]) & (np.arange(BLOCK + 20) <= at)
    np.testing.assert_array_equal(flows, mine)


def test_large_scores_do_not_overflow():
    q, k, v, segments = inputs(40)
    out = causal_attention(q * 1e3, k * 1e3, v, segments, 1.0)
    want = causal_attention_reference(q * 1e3, k * 1e3, v, segments, 1.0)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near_float32():
    q, k, v, segments = inputs(BLOCK + 3, jnp.bfloat16)
    got = causal_attention(q, k, v, segments, 0.3)
    want = causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)), segments, 0.3)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=3e-2)


def test_no_array_holds_all_scores():
    length = 8 * BLOCK
    shape = jax.ShapeDtypeStruct((1, length, HEADS, QK), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, ids):
        return causal_attention(q, k, v, ids, 0.3).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, ids)
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * length * length * 4
    # Who plans finds in the program that queries meet half of the blocks.
    named = lowered.as_text(debug_info=True)
    assert set(re.findall(r"usual_turns_(\d+)/while\"", named)) == {"4"}
