"""Attention with its halves apart equals attention with them joined, on every backend."""

import importlib.util
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies

from dsjax.kernels import mla_attention_backward_tpu as backward_tpu
from dsjax.kernels import mla_attention_blocks_tpu as blocks_tpu
from dsjax.kernels.mla_attention import Attending, mla_attention, mla_attention_reference
from dsjax.kernels.mla_attention_blocks_tpu import Blocks, Heads
from dsjax.kernels.mla_attention_forward_tpu import forward
from dsjax.kernels.rotary import rotate_flat
from dsjax.model.rope import rotate_halves

WIDE = Heads(2, 128, 64, 128)
NARROW = Heads(3, 12, 4, 8)


@pytest.fixture(params=["pallas", "plain XLA"])
def backend(request, monkeypatch):
    """The kernels of a TPU, interpreted, where memory is NaN at first; and what others run."""
    pallas = request.param == "pallas"

    def choose(*arguments, default, tpu):
        return (tpu if pallas else default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(blocks_tpu, "BLOCKS", (256, 128))
    monkeypatch.setattr(backward_tpu, "QUERIES_AT_ONCE", 512)  # so that 640 come in two parts
    return request.param


def attending(heads, length, segments, dtype=jnp.float32):
    widths = (heads.count * heads.nope, heads.count * heads.rope)
    widths = (*widths, widths[0], heads.rope, heads.count * heads.value)
    keys = jax.random.split(jax.random.key(length), 5)
    apart = (
        jax.random.normal(key, (2, length, width), dtype)
        for key, width in zip(keys, widths, strict=True)
    )
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, segments, (2, length))))
    return Attending(*apart, ids.astype(jnp.int32))


@cache
def loss_and_gradients(attention, heads, backend):
    """A program for each backend and shape."""

    @jax.jit
    def run(apart, ids):
        def loss(apart):
            out = attention(Attending(*apart, ids), heads.count, 0.2)
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(loss)(apart)

    return run


def agree(heads, length, segments, backend):
    *apart, ids = attending(heads, length, segments)
    got = loss_and_gradients(mla_attention, heads, backend)(apart, ids)
    want = loss_and_gradients(mla_attention_reference, heads, None)(apart, ids)
    # A single token's scores have no gradient: what is left of the others' size is rounding.
    largest = max(jnp.abs(theirs).max() for theirs in want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5)
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert jnp.abs(mine - theirs).max() <= 2e-5 * largest


@pytest.mark.parametrize("length", [1, 77, 640])
def test_halves_apart_equal_the_whole_score_matrix(length, backend):
    for segments in (1, 4):
        agree(WIDE, length, segments, backend)


def test_heads_that_fill_no_lanes_do_as_well():
    agree(NARROW, 77, 3, "default")


def test_bfloat16_loses_no_more_than_its_inputs_do(backend):
    *apart, ids = attending(WIDE, 128, 2, jnp.bfloat16)
    got = loss_and_gradients(mla_attention, WIDE, backend)(apart, ids)
    wide = [x.astype(jnp.float32) for x in apart]
    want = loss_and_gradients(mla_attention_reference, WIDE, None)(wide, ids)
    assert [x.dtype for x in got[1]] == [jnp.bfloat16] * 5
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(mine.astype(jnp.float32) - theirs).max() <= 0.02 * jnp.abs(theirs).max()


def test_blocks_that_no_query_sees_are_no_steps():
    """Three blocks of queries, the last of five of keys."""
    whole = attending(WIDE, 5 * 512, 1)
    part = Attending(*(x[:, 2 * 512 :] for x in whole[:2]), *whole[2:])
    by_query = Blocks.of(part, WIDE, keys_first=False)
    steps = list(zip(by_query.queries_of_step, by_query.keys_of_step, strict=True))
    assert steps == [(i, j) for i in range(3) for j in range(2 + i + 1)]
    by_key = Blocks.of(part, WIDE, keys_first=True)
    assert sorted(zip(by_key.queries_of_step, by_key.keys_of_step, strict=True)) == steps
    assert (np.diff(by_key.keys_of_step) >= 0).all()


@pytest.mark.parametrize(
    ("unit", "widths"),
    [
        (128, 256 + 128),
        # Both halves at once, and less than the vector work on the scores.
        (256, 2.62 * 256),
    ],
)
def test_the_compiler_is_told_what_is_computed(unit, widths, monkeypatch):
    """Whole blocks, and of every product the whole matrix units."""
    monkeypatch.setattr(blocks_tpu, "matrix_unit", lambda: unit)
    told = []
    monkeypatch.setattr(
        pl, "pallas_call", lambda *_, cost_estimate, **__: told.append(cost_estimate) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        forward(attending(WIDE, 1024, 1, jnp.bfloat16), WIDE.count, 0.2)
    (cost,) = told
    scores = 2 * 2 * 3 * 512**2
    assert cost.flops == round(2 * scores * widths)
    assert cost.transcendentals == scores
    keys_and_values, queries_and_out = 128 + 128 + 64 // 2, 128 + 64 + 128
    assert cost.bytes_accessed == 2 * 2 * 2 * (3 * 512 * keys_and_values + 1024 * queries_and_out)


@pytest.mark.parametrize("places", [5, 512])
@pytest.mark.parametrize("pairs", [32, 64, 3])
def test_heads_turn_where_they_lie(pairs, places, backend):
    x = jax.random.normal(jax.random.key(0), (2, places, 2 * 128 if pairs > 3 else 12))
    angles = jax.random.normal(jax.random.key(1), (2, places, pairs))
    table = jnp.cos(angles), jnp.sin(angles)

    def by_heads(x):
        apart = x.reshape(2, places, -1, 2 * pairs)
        return rotate_halves(apart, table).reshape(x.shape)

    want, back = jax.vjp(by_heads, x)
    got, back_flat = jax.vjp(lambda x: rotate_flat(x, *table), x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(*back(want), *back_flat(want), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'jax[tpu]'",
)
def test_compiles_for_a_tpu_and_lays_nothing_out_anew(monkeypatch):
    """Forward and backward between products with weights, for chips that are described only."""
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    place = jax.sharding.SingleDeviceSharding(chips.devices[0])

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def attend(x, weights, ids, d_out):
        def run(x, weights):
            return mla_attention(Attending(*(x @ w for w in weights), ids), WIDE.count, 0.2)

        out, back = jax.vjp(run, x, weights)
        return out, back(d_out)

    rows, places, width = 2, 1024, 256
    weights = [shape(width, n) for n in (256, 128, 256, 64, 256)]
    arguments = shape(rows, places, width), weights, shape(rows, places, dtype=jnp.int32)
    program = jax.jit(attend).lower(*arguments, shape(rows, places, 256)).compile()
    text = program.as_text()
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text)) == 2
    assert not re.search(r"= bf16\[2,1024,256\]\S* (copy|transpose)\(", text)
