"""What reinforcement learning maximizes: a token's part in it, from log-probabilities.

With r = pi / pi_old, A the advantage of an answer and rho = pi_ref / pi, a token counts

    w [ min(r A, clip(r, 1 - eps, 1 + eps_high) A) - beta KL ]

and the objectives differ in what r and rho are of, in A, and in w (N answers of |o_i| tokens):

    grpo      DeepSeekMath, arXiv:2402.03300, equation 3: of tokens;        w = 1 / (N |o_i|)
    r1        DeepSeek-R1, arXiv:2501.12948, equations 1 and 2: of answers  w = 1 / (N |o_i|)
    dr_grpo   arXiv:2503.20783, section 3: of tokens, A not divided by std  w = 1 / (N max_tokens)
    dapo      arXiv:2503.14476, equation 8: of tokens                       w = 1 / sum_i |o_i|

An answer's ratio is the product of its tokens', so each of its |o_i| tokens counts the whole
answer's term by 1 / |o_i|, and the sum is R1's equation. `advantages.py` makes A and w.

The estimators of KL are named by what their gradient is in expectation over the policy's answers:

    forward_k3   rho - log rho - 1         d KL(ref || pi), what the papers print
    reverse_k2   (log rho)^2 / 2           d KL(pi || ref)
    reverse_k3   r (rho - log rho - 1)     d KL(pi || ref): its expectation is KL(pi || ref) itself

-log rho alone would be an estimate of KL(pi || ref) whose gradient is zero in expectation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsjax.config_grpo import GrpoConfig
from sharding.by_hand import sequence_part, summed

KlEstimator = Literal["forward_k3", "reverse_k2", "reverse_k3"]


class Terms(NamedTuple):
    """What each place contributes; places that are not trained have zeros, and a ratio of 1."""

    objective: Float[Array, "*T"]
    """To be maximized, without its weight w."""
    kl: Float[Array, "*T"]
    ratio: Float[Array, "*T"]
    clipped: Bool[Array, "*T"]
    """Where the clip holds the gradient back."""


def policy_terms(
    logprobs: Float[Array, "*T"],
    old: Float[Array, "*T"],
    reference: Float[Array, "*T"],
    advantages: Float[Array, "*T"],
    config: GrpoConfig,
) -> Terms:
    """The bracket above, place by place.

    Args:
        logprobs: log pi; of tokens, or of the answers that they belong to (`of_answers`).
        old: log pi_old, of the distribution that was sampled.
        reference: log pi_ref; anything where beta is 0.
        advantages: A.
        config: eps, beta and the estimator.
    """
    ratio = jnp.exp(logprobs - old)
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    free = ratio * advantages
    held = jnp.clip(ratio, 1 - config.clip_epsilon, 1 + high) * advantages
    if config.kl_weight == 0:
        kl = jnp.zeros_like(ratio)
    else:
        kl = kl_estimate(config.kl_estimator, logprobs, reference, ratio)
    objective = jnp.minimum(free, held) - config.kl_weight * kl
    return Terms(objective, kl, ratio, held < free)


def kl_estimate(
    estimator: KlEstimator,
    logprobs: Float[Array, "*T"],
    reference: Float[Array, "*T"],
    ratio: Float[Array, "*T"],
) -> Float[Array, "*T"]:
    """One sample's estimate (Schulman, "Approximating KL Divergence", 2020), with its gradient."""
    log_rho = reference - logprobs
    match estimator:
        case "forward_k3":
            return jnp.expm1(log_rho) - log_rho
        case "reverse_k2":
            return log_rho * log_rho / 2
        case "reverse_k3":
            return ratio * (jnp.expm1(log_rho) - log_rho)


def of_answers(
    values: Float[Array, "B P"], segment_ids: Int[Array, "B S"], most: int
) -> Float[Array, "B P"]:
    """Each place's value replaced by the sum over its segment, wherever on a ring its places lie.

    Args:
        values: zero where nothing is trained.
        segment_ids: of whole rows, at most `most`.
    """
    mine = sequence_part(segment_ids)

    def sums(values: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(values, ids, num_segments=most + 1)

    total = summed(jax.vmap(sums)(values, mine), "sequence")
    return jnp.take_along_axis(total, mine, axis=1)
