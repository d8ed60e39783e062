"""The routed experts equal their plain meaning, forward and backward, however tokens are spread."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from dsjax.kernels import experts as kernel
from dsjax.kernels import experts_blocked
from dsjax.kernels.blocks import BLOCKS, fold_blocks
from dsjax.kernels.experts import routed_experts, routed_experts_reference
from dsjax.kernels.experts_inference import apply_experts
from dsjax.kernels.permutation import sort_by_expert
from dsjax.kernels.swiglu import SwiGLU, swiglu, swiglu_gradient
from dsjax.numerics.fp8 import dequantize_blocks, quantize_blocks

pytestmark = pytest.mark.usefixtures("thorough_compiler")

EXPERTS, EMBED, WIDTH = 6, 24, 20


def inputs(tokens, choices, *, spread="even", dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(tokens * 10 + choices), 5)

    def normal(key, *shape):
        return jax.random.normal(key, shape).astype(dtype)

    weights = SwiGLU(
        normal(keys[0], EXPERTS, WIDTH, EMBED),
        normal(keys[1], EXPERTS, WIDTH, EMBED),
        normal(keys[2], EXPERTS, EMBED, WIDTH),
    )
    rng = np.random.default_rng(0)
    experts = {
        "even": rng.integers(0, EXPERTS, (tokens, choices)),
        "one takes all": np.full((tokens, choices), EXPERTS - 2),
        "some empty": rng.choice([0, 3], (tokens, choices)),
    }[spread]
    gates = jnp.asarray(rng.random((tokens, choices), np.float32))
    return normal(keys[3], tokens, EMBED), weights, jnp.asarray(experts, jnp.int32), gates


def value_and_gradients(function, x, weights, experts, gates):
    def scalar(x, weights, gates):
        y = function(x, weights, experts, gates)
        return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(x, weights, gates)
    return jax.tree.leaves((y, grads))


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


CASES = [
    (1, 1, "even"),
    (1, 4, "even"),
    (7, 3, "even"),
    (64, 2, "one takes all"),  # exactly one block
    (65, 2, "one takes all"),  # a block and two rows
    (150, 3, "even"),
    (150, 3, "some empty"),
    (300, 1, "one takes all"),
]


@pytest.mark.parametrize(("tokens", "choices", "spread"), CASES)
def test_routed_experts_equal_their_meaning(tokens, choices, spread):
    arguments = inputs(tokens, choices, spread=spread)
    expected = value_and_gradients(routed_experts_reference, *arguments)
    assert_close(value_and_gradients(routed_experts, *arguments), expected, 1e-5)


@pytest.mark.parametrize("chip", ["tpu", "default"])
def test_the_path_of_accelerators_equals_the_blocked_one(chip, monkeypatch):
    """The kernels of a TPU are interpreted; what they leave undefined is NaN."""
    arguments = inputs(50, 3, spread="some empty")
    blocked = value_and_gradients(routed_experts, *arguments)
    monkeypatch.setattr(
        lax,
        "platform_dependent",
        lambda *xs, default, **others: others.get(chip, default)(*xs),
    )
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(experts_blocked, "forward", pytest.fail)
    jax.clear_caches()
    grouped = value_and_gradients(routed_experts, *arguments)
    jax.clear_caches()
    assert_close(grouped, blocked, 1e-5)


@pytest.mark.parametrize(("tokens", "choices", "spread"), CASES)
def test_experts_without_a_gradient_equal_their_meaning(tokens, choices, spread, monkeypatch):
    """In blocks, as on a CPU, and ragged, as elsewhere."""
    x, weights, experts, gates = inputs(tokens, choices, spread=spread)
    expected = routed_experts_reference(x, weights, experts, gates)
    turned = SwiGLU(*(matrix.swapaxes(1, 2) for matrix in weights))
    assert_close([jax.jit(apply_experts)(x, turned, experts, gates)], [expected], 1e-5)
    monkeypatch.setattr(lax, "platform_dependent", lambda *xs, default, **_: default(*xs))
    assert_close([apply_experts(x, turned, experts, gates)], [expected], 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_in_fp8_are_bitwise_those_that_were_widened(dtype, monkeypatch):
    """Matrices of several blocks, partial ones at their edges; in blocks of rows, and ragged."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = SwiGLU((3, 140, 260), (3, 140, 260), (3, 260, 140))
    drawn = (jax.random.normal(key, shape) for key, shape in zip(keys[:3], shapes, strict=True))
    values, scales = (SwiGLU(*parts) for parts in zip(*map(quantize_blocks, drawn), strict=True))
    wide = SwiGLU(*(dequantize_blocks(v, s, dtype) for v, s in zip(values, scales, strict=True)))
    x = jax.random.normal(keys[3], (20, 140)).astype(dtype)
    experts = jnp.asarray(np.random.default_rng(0).choice([0, 2], (20, 2)), jnp.int32)
    gates = jnp.full((20, 2), 0.5)
    for _ in range(2):
        run = jax.jit(lambda *arguments: apply_experts(*arguments))
        found = run(x, values, experts, gates, scales)
        assert (found == run(x, wide, experts, gates)).all()
        assert jnp.abs(found.astype(jnp.float32)).max() > 1
        monkeypatch.setattr(lax, "platform_dependent", lambda *xs, default, **_: default(*xs))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16])
def test_a_few_tokens_widen_their_experts_and_no_others(dtype):
    """Compiled for a CPU, decoding has no room for another stack of any dtype."""
    matrices = SwiGLU((64, 128, 256), (64, 128, 256), (64, 256, 128))
    weights = SwiGLU(*(jax.ShapeDtypeStruct(shape, dtype) for shape in matrices))
    blocks = SwiGLU((64, 1, 2), (64, 1, 2), (64, 2, 1))
    scales = SwiGLU(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in blocks))
    arguments = [
        jax.ShapeDtypeStruct((2, 128), jnp.bfloat16),
        weights,
        jax.ShapeDtypeStruct((2, 4), jnp.int32),
        jax.ShapeDtypeStruct((2, 4), jnp.float32),
        scales if dtype == jnp.float8_e4m3fn else None,
    ]
    used = jax.jit(apply_experts).lower(*arguments).compile().memory_analysis()
    assert used.temp_size_in_bytes < 64 * 128 * 256


def test_bfloat16_stays_close_and_keeps_its_dtype():
    arguments = inputs(150, 3, dtype=jnp.bfloat16)
    found = value_and_gradients(routed_experts, *arguments)
    assert [a.dtype.name for a in found] == ["bfloat16"] * 5 + ["float32"]
    exact = jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, arguments
    )
    assert_close(found, value_and_gradients(routed_experts_reference, *exact), 0.03)


def test_recomputing_changes_no_gradient():
    arguments = inputs(40, 2)
    again = jax.checkpoint(
        routed_experts, policy=jax.checkpoint_policies.nothing_saveable, static_argnums=()
    )
    expected = value_and_gradients(routed_experts, *arguments)
    assert_close(value_and_gradients(again, *arguments), expected, 1e-6)


def test_an_expert_without_rows_gets_a_gradient_of_exactly_zero():
    *_, d_gate, d_up, d_down, _ = value_and_gradients(
        routed_experts, *inputs(150, 3, spread="some empty")
    )
    for d in (d_gate, d_up, d_down):
        assert (d[jnp.array([1, 2, 4, 5])] == 0).all()
        assert (jnp.abs(d[jnp.array([0, 3])]).max((1, 2)) > 0).all()


def test_other_tokens_do_not_reach_a_row_even_when_they_are_not_finite():
    x, weights, experts, gates = inputs(40, 2)
    y = routed_experts(x.at[7].set(jnp.nan), weights, experts, gates)
    clean = routed_experts(x, weights, experts, gates)
    others = jnp.arange(40) != 7
    assert jnp.isnan(y[7]).all()
    assert_close([y[others]], [clean[others]], 1e-6)


def test_sorting_is_stable_and_its_two_directions_are_inverse():
    experts = jnp.array([[2, 0], [1, 2], [2, 2]], jnp.int32)
    order = sort_by_expert(experts, 4)
    assert order.sizes.tolist() == [1, 1, 4, 0]
    assert order.pair_of_row.tolist() == [1, 2, 0, 3, 4, 5]
    assert order.token_of_row.tolist() == [0, 1, 0, 1, 2, 2]
    assert (order.row_of_pair.ravel()[order.pair_of_row] == jnp.arange(6)).all()


def test_the_activations_gradient_is_that_of_automatic_differentiation():
    keys = jax.random.split(jax.random.key(0), 4)
    h, u, d = (3 * jax.random.normal(key, (5, 7)) for key in keys[:3])
    gates = jax.random.uniform(keys[3], 5)
    inner, *grads = swiglu_gradient(h, u, gates, d)
    expected, pull = jax.vjp(swiglu, h, u, gates)
    assert_close([inner, *grads], [expected, *pull(d)], 1e-6)


def test_the_rule_for_gradients_is_the_hand_written_one():
    jaxpr = str(jax.make_jaxpr(routed_experts)(*inputs(4, 2)))
    assert kernel.routed_experts is routed_experts
    assert "custom_vjp" in jaxpr


def test_blocks_cover_each_row_once_and_less_than_twice_as_many():
    @jax.jit
    def visits(size):
        def one_block(at, rows, seen):
            return lax.dynamic_update_slice_in_dim(
                seen, 1 + lax.dynamic_slice_in_dim(seen, at, rows), at, 0
            )

        return fold_blocks(jnp.int32(5), size, BLOCKS, one_block, jnp.zeros(700, jnp.int32))

    for size in range(0, 400, 7):
        seen = np.asarray(visits(size))
        covered = seen.sum()
        assert seen[5 : 5 + covered].all() and seen.max(initial=0) <= 1
        assert size <= covered < 2 * size + BLOCKS[-1]
