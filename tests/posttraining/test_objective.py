"""The objective against a derivation in numpy, and each KL estimator against the exact gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config_grpo import GrpoConfig
from dsjax.posttraining.advantages import group_advantages, is_equal, token_weights
from dsjax.posttraining.objective import kl_estimate, of_answers, policy_terms

VOCAB = 7


def derived(
    logits: np.ndarray,
    chosen: np.ndarray,
    old: np.ndarray,
    reference: np.ndarray,
    advantage: np.ndarray,
    config: GrpoConfig,
) -> np.ndarray:
    """d objective / d logits [N, T, V] by hand, answers of T tokens, in float64.

    d log pi(o_t) / d logits = onehot(o_t) - pi. A token's term is min(r A, clip(r) A) - beta KL;
    the first is r A d log pi where the clip does not hold, else 0. Of an answer's ratio (R1) the
    derivative goes to all its tokens.
    """
    pi = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    logp = np.log(np.take_along_axis(pi, chosen[..., None], -1))[..., 0]
    whole = config.objective == "r1"
    ratio_log, rho_log = logp - old, reference - logp
    if whole:
        ratio_log = np.broadcast_to(ratio_log.sum(1, keepdims=True), logp.shape)
        rho_log = np.broadcast_to(rho_log.sum(1, keepdims=True), logp.shape)
    r, rho = np.exp(ratio_log), np.exp(rho_log)
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    a = np.broadcast_to(advantage[:, None], logp.shape)
    free = np.where(a > 0, r <= 1 + high, r >= 1 - config.clip_epsilon)
    slope = np.where(free, r * a, 0.0)
    kl = {
        "forward_k3": 1 - rho,
        "reverse_k2": -rho_log,
        "reverse_k3": r * (rho - rho_log - 1) + r * (1 - rho),
    }[config.kl_estimator]
    slope = slope - config.kl_weight * kl
    answers, tokens = logp.shape
    if whole:  # 1 / N of an answer's term, whose derivative reaches each of its tokens whole
        weight = 1 / answers
    else:
        weight = 1 / (answers * tokens)
    onehot = np.eye(logits.shape[-1])[chosen]
    return weight * slope[..., None] * (onehot - pi)


@pytest.mark.parametrize("estimator", ["forward_k3", "reverse_k2", "reverse_k3"])
@pytest.mark.parametrize("objective", ["grpo", "r1"])
def test_the_gradient_is_that_of_the_papers_equation(objective: Any, estimator: Any) -> None:
    """Answers of both signs, ratios within the clip and beyond it on both sides."""
    rng = np.random.default_rng(0)
    answers, tokens = 12, 5
    logits = rng.normal(size=(answers, tokens, VOCAB))
    chosen = rng.integers(0, VOCAB, (answers, tokens))
    logp = np.take_along_axis(jax.nn.log_softmax(logits), chosen[..., None], -1)[..., 0]
    old, reference = (np.asarray(logp + rng.normal(scale=0.3, size=logp.shape)) for _ in range(2))
    advantage = rng.normal(size=answers)
    config = GrpoConfig(
        objective=objective, kl_estimator=estimator, kl_weight=0.3, clip_epsilon_high=0.3
    )

    def total(logits: jax.Array) -> jax.Array:
        one = jax.nn.log_softmax(logits)
        logprobs = jnp.take_along_axis(one, jnp.asarray(chosen)[..., None], -1)[..., 0]
        parts = [logprobs, jnp.asarray(old, jnp.float32), jnp.asarray(reference, jnp.float32)]
        if objective == "r1":
            ids = jnp.ones((answers, tokens), jnp.int32)
            parts = [of_answers(part, ids, 1) for part in parts]
        terms = policy_terms(*parts, jnp.asarray(advantage, jnp.float32)[:, None], config)
        weights = token_weights(np.full(answers, tokens), np.full(answers, True), config, 9)
        return (terms.objective * weights[:, None]).sum()

    found = jax.grad(total)(jnp.asarray(logits, jnp.float32))
    wanted = derived(logits, chosen, old, reference, advantage, config)
    beyond = np.abs(np.exp(logp - old) - 1) > 0.3
    assert 0.1 < beyond.mean() < 0.9
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("estimator", "direction"),
    [("forward_k3", "forward"), ("reverse_k2", "reverse"), ("reverse_k3", "reverse")],
)
def test_an_estimator_has_the_expected_gradient_that_its_name_says(
    estimator: Any, direction: str
) -> None:
    """Summed over all tokens of a small vocabulary, drawn from the policy itself."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=VOCAB), jnp.float32)
    reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=VOCAB), jnp.float32))
    old = jax.nn.log_softmax(logits)

    def expected(logits: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits)
        ratio = jnp.exp(logprobs - old)
        return (jnp.exp(old) * kl_estimate(estimator, logprobs, reference, ratio)).sum()

    def exact(logits: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits)
        forward = (jnp.exp(reference) * (reference - logprobs)).sum()
        reverse = (jnp.exp(logprobs) * (logprobs - reference)).sum()
        return forward if direction == "forward" else reverse

    found, wanted = jax.grad(expected)(logits), jax.grad(exact)(logits)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    other = jax.grad(lambda x: -(jnp.exp(old) * (reference - jax.nn.log_softmax(x))).sum())
    np.testing.assert_allclose(other(logits), 0, atol=1e-6)  # -log rho: no gradient at all


def test_the_ratio_is_held_at_both_ends_and_only_against_its_gain() -> None:
    config = GrpoConfig(clip_epsilon=0.2, clip_epsilon_high=0.5, kl_weight=0)
    logprobs = jnp.log(jnp.array([0.5, 0.9, 1.4, 2.0, 0.5, 0.9, 1.4, 2.0]))
    advantages = jnp.array([1.0] * 4 + [-1.0] * 4)
    terms = policy_terms(logprobs, jnp.zeros(8), jnp.zeros(8), advantages, config)
    np.testing.assert_allclose(
        terms.objective, [0.5, 0.9, 1.4, 1.5, -0.8, -0.9, -1.4, -2.0], rtol=1e-6
    )
    assert terms.clipped.tolist() == [False, False, False, True, True, False, False, False]
    np.testing.assert_array_equal(terms.kl, 0)


def test_advantages_are_those_of_the_papers_and_equal_groups_have_none() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0]])
    plain = group_advantages(rewards, GrpoConfig())
    np.testing.assert_allclose(plain[0], np.array([3, -1, -1, -1]) / np.sqrt(3))
    np.testing.assert_array_equal(plain[1], 0)
    np.testing.assert_allclose(plain[2], [-1, 1, -1, 1])
    centred = group_advantages(rewards, GrpoConfig(objective="dr_grpo"))
    np.testing.assert_allclose(centred[0], [0.75, -0.25, -0.25, -0.25])
    assert is_equal(rewards).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        ("grpo", [1 / 2 / 3, 1 / 3 / 3, 0]),
        ("r1", [1 / 2 / 3, 1 / 3 / 3, 0]),
        ("dr_grpo", [1 / 3 / 10, 1 / 3 / 10, 0]),
        ("dapo", [1 / 5, 1 / 5, 0]),
    ],
)
def test_tokens_are_weighed_as_each_paper_says(objective: Any, wanted: list[float]) -> None:
    """Three answers of 2, 3 and 5 tokens, the last of which is not trained, limit 10."""
    trained = np.array([True, True, False])
    found = token_weights(np.array([2, 3, 5]), trained, GrpoConfig(objective=objective), 10)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_an_answers_sum_reaches_each_of_its_places() -> None:
    ids = jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 3]])
    values = jnp.array([[1.0, 2, 3, 4, 0], [5, 1, 1, 1, 7]])
    np.testing.assert_array_equal(of_answers(values, ids, 5), [[3, 3, 7, 7, 0], [5, 3, 3, 3, 7]])
