"""A step on answers: the sampler's log-probabilities, and gradients that depend on nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.config_grpo import GrpoRunConfig
from dsjax.model.layers import tree_shardings, variables
from dsjax.model.transformer import Transformer
from dsjax.posttraining.advantages import group_advantages, token_weights
from dsjax.posttraining.policy_step import (
    PolicyKnobs,
    init_policy,
    make_policy_gradients,
    make_policy_step,
    make_scorer,
)
from dsjax.posttraining.rollouts import Sampler
from dsjax.posttraining.rows import Rows, Written, pack
from sharding.mesh import make_mesh
from sharding.rules import Layout, current_layout, use_layout

VOCAB = 90  # of 96: the last ids are not the tokenizer's
ROW = 64


def settings(**changes: Any) -> GrpoRunConfig:
    tree: dict[str, Any] = {
        "task": "grpo",
        "run_dir": "unused",
        "model": CONFIGS["v3"].model_dump(),
        "prompts": {"path": "unused"},
        "rewards": [{"name": "exact"}],
        "sampling": {"max_tokens": 12, "temperature": 0.7, "top_p": 0.95, "rows": 4},
        "grpo": {"group_size": 4, "kl_weight": 0.1},
        "optimizer": {"learning_rate": 1e-3},
        "training": {
            "max_steps": 1,
            "microbatch_size": 2,
            "sequence_length": ROW,
            "compute_dtype": "float32",
            "remat": "keep_all",
            "loss_chunk": 16,
        },
        "checkpoint": {"every_steps": 1},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section] = tree[section] | {key: value}
    return GrpoRunConfig.model_validate(tree)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = CONFIGS["v3"]
    return place(config, random_weights(config))


@pytest.fixture(scope="module")
def written(model: Transformer) -> list[Written]:
    """Three groups of four, of which some end with eos by themselves."""
    rng = np.random.default_rng(5)
    prompts = [tuple(rng.integers(2, VOCAB, n).tolist()) for n in (3, 9, 40)]
    config = settings()
    sampler = Sampler(config.sampling, 128, VOCAB, experts=True)
    groups = sampler.draw(model, prompts, 4, [0], lambda: False)
    assert groups is not None
    return [one for group in groups for one in group]


def rows_of(written: list[Written], config: GrpoRunConfig, slots: int = 12) -> tuple[Rows, Any]:
    rewards = np.random.default_rng(3).normal(size=(len(written) // 4, 4))
    advantages = group_advantages(rewards, config.grpo).ravel()
    lengths = np.array([len(one.tokens) for one in written])
    trained = np.ones(len(written), bool)
    weights = token_weights(lengths, trained, config.grpo, config.sampling.max_tokens)
    rows, count = pack(
        written,
        advantages,
        weights,
        microbatch_size=config.training.microbatch_size,
        sequence_length=config.training.sequence_length,
        slots=slots,
        replay=config.grpo.router_replay,
    )
    return jax.tree.map(jnp.asarray, rows), jnp.int32(count)


@cache
def compiled(config: str, layout: int) -> Any:
    run = make_policy_gradients(GrpoRunConfig.model_validate_json(config), VOCAB)
    return jax.jit(run)


def gradients_of(
    model: Transformer, rows: Rows, count: Any, config: GrpoRunConfig
) -> tuple[dict[str, np.ndarray], Any]:
    # A reference that is not the policy, so that KL has a gradient.
    reference = jnp.where(rows.trained, rows.old - 0.1, 0)
    # What is traced depends on the layout as well.
    run = compiled(config.model_dump_json(), id(current_layout()))
    grads, sums = run(model, rows, reference, count)
    found = {name: np.asarray(one[...]) for name, one in variables(grads)}
    return found, jax.device_get(sums)


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        # What four devices add up in float32 differs by 1.2e-5 on some processors.
        assert np.abs(found[name] - want).max() <= 2e-5 * max(np.abs(want).max(), 1e-6), name


@pytest.fixture(scope="module")
def expected(model: Transformer, written: list[Written]) -> tuple[dict[str, np.ndarray], Any]:
    config = settings()
    return gradients_of(model, *rows_of(written, config), config)


def test_the_trainer_gives_the_sampled_tokens_the_samplers_log_probabilities(
    model: Transformer, written: list[Written], expected: tuple[Any, Any]
) -> None:
    """At temperature 0.7 and top-p 0.95, by other experts where the router is replayed."""
    config = settings()
    rows, count = rows_of(written, config)
    found = np.asarray(jax.jit(make_scorer(config, VOCAB))(model, rows, count))
    trained = np.asarray(rows.trained)
    gap = np.abs(found - np.asarray(rows.old))[trained]
    print(f"\nlargest difference {gap.max():.1e} over {trained.sum()} tokens")
    assert gap.max() < 1e-4
    plain = settings(sampling__temperature=1.0, sampling__top_p=1.0)
    other = np.asarray(jax.jit(make_scorer(plain, VOCAB))(model, rows, count))
    assert np.abs(other - np.asarray(rows.old))[trained].max() > 0.1
    _, sums = expected
    assert sums.clipped == 0 and sums.largest_gap < 1e-4  # so the ratio is 1


def test_answers_end_with_eos_or_at_their_limit(written: list[Written]) -> None:
    for one in written:
        assert one.truncated == (len(one.tokens) == 12 and one.tokens[-1] != 1)
        assert max(one.tokens) < VOCAB and len(one.logprobs) == len(one.tokens)
        assert one.experts is not None
        assert one.experts.shape == (len(one.prompt) + len(one.tokens) - 1, 2, 3)


def test_replayed_experts_are_taken_whatever_the_router_prefers(
    model: Transformer, written: list[Written]
) -> None:
    """With other experts the log-probabilities are others; freed places are the router's."""
    config = settings()
    rows, count = rows_of(written, config)
    score = jax.jit(make_scorer(config, VOCAB))
    found = np.asarray(score(model, rows, count))
    assert rows.experts is not None
    turned = rows._replace(experts=jnp.where(rows.experts >= 0, (rows.experts + 1) % 8, -1))
    other = np.asarray(score(model, turned, count))
    trained = np.asarray(rows.trained)
    assert np.abs(other - found)[trained].max() > 0.05
    free = rows._replace(experts=jnp.full_like(rows.experts, -1))
    np.testing.assert_allclose(
        np.asarray(score(model, free, count))[trained], found[trained], atol=1e-4
    )


@pytest.mark.parametrize("objective", ["r1", "dapo"])
def test_gradients_do_not_depend_on_microbatches_packing_or_order(
    model: Transformer, written: list[Written], objective: str
) -> None:
    """Rows of one answer each, by twos; packed by sixes; and the same in another order."""
    packed = settings(grpo__objective=objective)
    first = gradients_of(model, *rows_of(written, packed), packed)
    alone = settings(grpo__objective=objective, training__microbatch_size=6)
    rows, count = rows_of(written, alone)
    second = gradients_of(model, rows, count, alone)
    assert_close(second[0], first[0])
    third = gradients_of(model, *unpacked(rows_of(written, packed)[0]), packed)
    assert_close(third[0], first[0])
    np.testing.assert_allclose(third[1].objective, first[1].objective, rtol=1e-4, atol=1e-7)
    assert third[1].tokens == first[1].tokens == second[1].tokens


def unpacked(rows: Rows) -> tuple[Rows, Any]:
    """Every answer in a row of its own, at its end: the padding is on the left."""
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), rows)
    lines = []
    for row in range(flat.tokens.shape[0]):
        for segment in np.unique(flat.segment_ids[row]):
            if segment == 0:
                continue
            at = np.flatnonzero(flat.segment_ids[row] == segment)
            lines.append(jax.tree.map(partial(_pushed_right, row=row, at=at), flat))
    count = -(-len(lines) // 2)
    lines += [jax.tree.map(np.zeros_like, lines[0])] * (2 * len(rows.tokens) - len(lines))
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *lines)
    made = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, 2, *x.shape[1:])), stacked)
    return made, jnp.int32(count)


def _pushed_right(x: np.ndarray, row: int, at: np.ndarray) -> np.ndarray:
    out = np.zeros(x.shape[1:], x.dtype)
    out[len(out) - len(at) :] = x[row, at]
    return out


def test_padding_that_is_eos_is_not_trained_and_eos_that_ends_an_answer_is(
    model: Transformer, written: list[Written], expected: tuple[Any, Any]
) -> None:
    config = settings()
    rows, count = rows_of(written, config)
    filled = rows._replace(tokens=jnp.where(rows.segment_ids == 0, 1, rows.tokens))
    found, _ = gradients_of(model, filled, count, config)
    assert_close(found, expected[0])
    ended = [replace(one, tokens=(*one.tokens[:-1], 1), truncated=False) for one in written]
    rows, _ = rows_of(ended, config)
    following = np.roll(np.asarray(rows.tokens), -1, axis=-1)[np.asarray(rows.trained)]
    assert (following == 1).sum() == len(ended)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2}, {"expert": 4}, {"tensor": 2}, {"context": 4}], ids=str
)
def test_gradients_on_a_mesh_are_those_of_one_device(
    axes: dict[str, int], model: Transformer, written: list[Written]
) -> None:
    config = settings(training__microbatch_size=4, grpo__objective="r1")
    rows, count = rows_of(written, config)
    wanted, sums = gradients_of(model, rows, count, config)
    size = int(np.prod(list(axes.values())))
    layout = Layout(make_mesh(axes, jax.devices()[:size]))
    with use_layout(layout):
        placed = jax.device_put(model, tree_shardings(model, layout))

        def put(x: jax.Array) -> jax.Array:
            names = (None, "batch", *(None,) * (x.ndim - 2))
            return jax.device_put(x, layout.sharding(names, x.shape))

        found, found_sums = gradients_of(placed, jax.tree.map(put, rows), count, config)
    assert_close(found, wanted)
    np.testing.assert_allclose(found_sums.entropy, sums.entropy, rtol=1e-4)
    np.testing.assert_array_equal(found_sums.load, sums.load)
    assert found_sums.tokens == sums.tokens


@pytest.mark.slow
def test_a_step_moves_the_main_model_and_leaves_what_only_drafts(
    model: Transformer, written: list[Written]
) -> None:
    """Router biases too: those of MTP have no load to be moved by."""
    config = settings(grpo__bias_update_rate=0.01)
    rows, count = rows_of(written, config)
    state = jax.jit(partial(init_policy, config))(model)
    knobs = PolicyKnobs(jnp.float32(1e-3), jnp.float32(0.01))
    step = jax.jit(make_policy_step(config, VOCAB))
    after, metrics = step(state, rows, rows.old - 0.1, count, knobs)
    assert metrics.finite
    old = {name: np.asarray(one[...]) for name, one in variables(state.model)}
    new = {name: np.asarray(one[...]) for name, one in variables(after.model)}
    assert {name: x.shape for name, x in new.items()} == {n: x.shape for n, x in old.items()}
    for name, before in old.items():
        changed = bool((new[name] != before).any())
        assert changed == (not name.startswith("mtp.")), name
