import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.attention import BLOCK, causal_attention, causal_attention_reference

pytestmark = pytest.mark.usefixtures("thorough_compiler")

HEADS, QK, V = 2, 12, 8


def inputs(length, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k = (jax.random.normal(key, (2, length, HEADS, QK), dtype) for key in keys[:2])
    v = jax.random.normal(keys[2], (2, length, HEADS, V), dtype)
    segments = jnp.sort(jax.random.randint(keys[3], (2, length), 1, 4), axis=1)
    return q, k, v, segments


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_equal_the_whole_score_matrix_in_values_and_gradients(length, packed):
    q, k, v, segments = inputs(length)
    ids = segments if packed else jnp.ones_like(segments)

    def loss(attention, q, k, v):
        return (attention(q, k, v, ids, 0.3) ** 2).sum()

    want = jax.value_and_grad(loss, (1, 2, 3))(causal_attention_reference, q, k, v)
    got = jax.value_and_grad(loss, (1, 2, 3))(causal_attention, q, k, v)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


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

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * length * length * 4
