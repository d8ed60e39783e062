from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config_files import load_pretrain_config
from dsjax.model.layers import RouterBias, tree_shardings
from dsjax.training.step import (
    Batch,
    Knobs,
    init_state,
    make_train_step,
    max_violation,
    target_counts,
    update_biases,
)
from sharding.mesh import make_mesh
from sharding.rules import Layout, use_layout

CONFIG = load_pretrain_config("cpu-tiny", ["data.sequence_length=16", "model.vocab_size=64",
                                      "training.loss_chunk=8"])  # fmt: skip
KNOBS = Knobs(jnp.float32(1e-2), jnp.float32(0.3), jnp.float32(0.01))


def batch(microbatches, rows, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (8, 16), np.int32)
    segments = np.sort(rng.integers(1, 4, (8, 16), np.int32), axis=1)
    segments[3, 10:] = 0
    shape = (microbatches, rows, 16)
    return Batch(jnp.asarray(tokens.reshape(shape)), jnp.asarray(segments.reshape(shape)))


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_train_step(CONFIG))


@pytest.fixture(scope="module")
def start():
    return jax.jit(partial(init_state, CONFIG))()


def close(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(np.abs(a).max(initial=0), 1e-12)
        assert np.abs(a - b).max(initial=0) <= tolerance * scale, (a, b)


def test_accumulation_equals_the_whole_batch(step, start):
    _, whole = step(start, batch(1, 8), jnp.int32(1), KNOBS)
    _, cut = step(start, batch(4, 2), jnp.int32(4), KNOBS)
    close(whole.sums, cut.sums, 1e-5)
    close(whole.grad_norm, cut.grad_norm, 1e-5)


def test_unused_microbatches_change_nothing(step, start):
    small = jax.tree.map(lambda x: x.at[2:].set(0), batch(4, 2))
    _, few = step(start, batch(4, 2), jnp.int32(2), KNOBS)
    _, empty = step(start, small, jnp.int32(4), KNOBS)
    close(few.sums, empty.sums, 1e-6)
    close(few.grad_norm, empty.grad_norm, 1e-6)


def test_the_loss_falls(step, start):
    state, losses = start, []
    for _ in range(12):
        state, metrics = step(state, batch(1, 8), jnp.int32(1), KNOBS)
        losses.append(float(metrics.sums.loss))
    assert losses[-1] < losses[0] - 1.0
    assert int(state.step) == 12


def test_biases_move_by_gamma_against_the_load(step, start):
    after, metrics = step(start, batch(1, 8), jnp.int32(1), KNOBS)
    load = np.asarray(metrics.sums.load)
    want = 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
    main, mtp = after.model.moe_layers.ffn.router.bias, after.model.mtp.block.ffn.router.bias
    np.testing.assert_allclose(np.concatenate([main[...], mtp[...]]), want, atol=1e-7)
    assert load.shape == (3, 8) and np.abs(want).max() > 0


def test_the_load_counts_every_choice_of_every_real_token(step, start):
    _, metrics = step(start, batch(1, 8), jnp.int32(1), KNOBS)
    real = int((batch(1, 8).segment_ids > 0).sum())
    np.testing.assert_array_equal(np.asarray(metrics.sums.load)[:2].sum(-1), real * 2)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(step, start):
    poisoned = start._replace(model=jax.tree.map(lambda x: x, start.model))
    poisoned.model.norm.weight[...] = poisoned.model.norm.weight[...].at[0].set(jnp.nan)
    after, metrics = step(poisoned, batch(1, 8), jnp.int32(1), KNOBS)
    assert not bool(metrics.finite)
    assert int(after.step) == 1
    same = (after.model, after.moments), (poisoned.model, poisoned.moments)
    for a, b in zip(*(jax.tree.leaves(t) for t in same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_targets_stop_at_documents_and_padding():
    segments = jnp.array([[[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]])
    np.testing.assert_array_equal(target_counts(segments, 2), [3 + 5, 1 + 4, 0 + 3])


def test_max_violation_is_the_excess_of_the_busiest():
    np.testing.assert_allclose(max_violation(jnp.array([[1.0, 1, 1, 5], [2, 2, 2, 2]])), [1.5, 0])


def test_bias_state_is_no_parameter(start):
    _, params, biases = nnx.split(start.model, nnx.Param, RouterBias)
    assert len(jax.tree.leaves(biases)) == 2
    moved = update_biases(biases, jnp.ones((3, 8)), jnp.float32(0.1))
    close(moved, biases, 0)
    assert not any("bias" in str(path) for path, _ in nnx.to_flat_state(params))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 8}, id="fsdp", marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 2, "tensor": 2}, id="mixed"),
    ],
)
def test_the_step_on_eight_devices_equals_one(start, step, sizes):
    layout = Layout(make_mesh(sizes))
    want, want_metrics = step(start, batch(1, 8), jnp.int32(1), KNOBS)
    with use_layout(layout):
        shardings = tree_shardings(start, layout)
        placed = jax.device_put(start, shardings)
        rows = jax.device_put(batch(1, 8), layout.sharding((None, "batch", "sequence"), (1, 8, 16)))
        run = jax.jit(make_train_step(CONFIG), out_shardings=(shardings, None))
        got, metrics = run(placed, rows, jnp.int32(1), KNOBS)
    np.testing.assert_array_equal(metrics.sums.load, want_metrics.sums.load)
    close(metrics.sums, want_metrics.sums, 1e-5)
    close(metrics.grad_norm, want_metrics.grad_norm, 1e-5)
    close(got.moments, want.moments, 1e-2)  # bfloat16
    assert got.model.moe_layers.ffn.experts.gate[...].sharding.spec != ()
