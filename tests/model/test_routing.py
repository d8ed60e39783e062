"""The bias steers the choice of experts, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import numpy_model

from dsjax.architecture import DeepSeekConfig
from dsjax.model.layers import RouterBias
from dsjax.model.moe import choose_experts, devices_in_reach
from dsjax.model.transformer import Transformer
from dsjax.training.step import max_violation, update_biases

from .conftest import forward, off


@pytest.fixture(scope="module")
def scores(config: DeepSeekConfig) -> jax.Array:
    return jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (64, config.n_routed_experts)))


def test_a_bias_draws_tokens_and_leaves_their_gates_unbiased(
    config: DeepSeekConfig, scores: jax.Array
) -> None:
    favoured = 5
    bias = jnp.zeros(config.n_routed_experts).at[favoured].set(3.0)
    experts, gates = choose_experts(scores, bias, config)
    assert (experts == favoured).any(axis=1).all()
    assert not (choose_experts(scores, None, config)[0] == favoured).any(axis=1).all()
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(experts), axis=1)
    expected = chosen / chosen.sum(1, keepdims=True) * config.routed_scaling_factor
    assert off(gates, expected) < 1e-6


def test_a_bias_equal_for_all_changes_nothing(config: DeepSeekConfig, scores: jax.Array) -> None:
    plain = choose_experts(scores, None, config)
    for shift in (-8.0, 0.25):
        experts, gates = choose_experts(scores, jnp.full(config.n_routed_experts, shift), config)
        assert (experts == plain[0]).all()
        assert off(gates, plain[1]) < 1e-6


def test_a_token_reaches_no_more_groups_than_allowed(
    config: DeepSeekConfig, scores: jax.Array
) -> None:
    """With biases that make every s + b negative as well."""
    for shift in (0.0, -5.0):
        bias = shift + jax.random.normal(jax.random.key(1), (config.n_routed_experts,))
        experts, _ = choose_experts(scores, bias, config)
        groups = np.asarray(experts) // (config.n_routed_experts // config.n_group)
        assert max(len(set(row)) for row in groups.tolist()) <= config.topk_group
        assert all(len(set(row)) == config.num_experts_per_tok for row in experts.tolist())


def test_every_token_is_counted_once_for_each_choice(model: Transformer, tokens: jax.Array) -> None:
    load = forward(model, tokens).load
    assert (load.sum(-1) == tokens.size * model.config.num_experts_per_tok).all()


def test_the_bias_update_is_the_papers(model: Transformer) -> None:
    biases = nnx.state(model, RouterBias)
    layers = model.config.num_moe_layers + model.config.num_nextn_predict_layers
    experts = model.config.n_routed_experts
    load = np.random.default_rng(0).integers(0, 9, (layers, experts)).astype(np.float32)
    # An expert exactly at the mean stays.
    load[0, :2] = 4.0, 4.0
    load[0, 2:] = [1, 7] * (experts // 2 - 1)
    updated = update_biases(biases, jnp.asarray(load), jnp.float32(0.001))
    found = [
        layer for _, state in sorted(nnx.to_flat_state(updated)) for layer in np.asarray(state[...])
    ]
    before = [
        layer for _, state in sorted(nnx.to_flat_state(biases)) for layer in np.asarray(state[...])
    ]
    for new, old, counts in zip(found, before, load, strict=True):
        assert off(new, numpy_model.updated_bias(old, counts, 0.001)) < 1e-6
    assert (found[0][:2] == before[0][:2]).all()


def test_loads_and_biases_are_paired_layer_by_layer(model: Transformer) -> None:
    """Main layers first, then MTP: each bias follows the load of its own router."""
    biases = nnx.state(model, RouterBias)
    main = model.config.num_moe_layers
    load = jnp.ones((main + 1, model.config.n_routed_experts)).at[main, 0].set(100.0)
    updated = update_biases(biases, load, jnp.float32(0.5))
    change = jax.tree.map(jnp.subtract, updated, biases)
    assert (change["moe_layers"]["ffn"]["router"]["bias"][...] == 0).all()
    ahead = change["mtp"]["block"]["ffn"]["router"]["bias"][...]
    assert off(ahead[0, 0], -0.5) < 1e-6
    assert off(ahead[0, 1:], jnp.full(ahead.shape[1] - 1, 0.5)) < 1e-6


def test_max_violation_is_the_papers() -> None:
    load = np.array([[1, 2, 3, 10], [4, 4, 4, 4]], np.float32)
    found = max_violation(jnp.asarray(load))
    assert off(found, [numpy_model.max_violation(row) for row in load]) < 1e-6
    assert found[0] == 1.5 and found[1] == 0.0


def test_the_devices_in_reach_hold_the_groups_that_a_token_can_choose():
    """V3 chooses 4 of 8 groups, on devices that have several of them, one, or a part of one."""
    cases = {1: 1, 2: 2, 4: 4, 8: 4, 64: 32}
    assert {n: devices_in_reach(8, 4, n) for n in cases} == cases
    assert devices_in_reach(1, 1, 16) == 16  # without groups
