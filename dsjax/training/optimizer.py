"""AdamW as DeepSeek-V3 trains with it: float32 masters, both moments in bfloat16.

arXiv:2412.19437 section 4.2 (values) and 3.3.3 (low-precision moments).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from dsjax.config import OptimizerConfig, schedule_value


class Moments(NamedTuple):
    """Running means of the gradient and of its square, and how many they have seen."""

    count: Array
    mu: Any
    nu: Any


def scale_by_bfloat16_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction (arXiv:1412.6980), both moments stored in bfloat16.

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   u = m^ / (sqrt(v^) + eps)

    The arithmetic is float32; only what is kept between steps is rounded. optax's own Adam can
    round the first moment but not the second.
    """

    def init(params: Any) -> Moments:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.bfloat16), params)
        return Moments(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        count = state.count + 1
        first = 1 - beta1 ** count.astype(jnp.float32)
        second = 1 - beta2 ** count.astype(jnp.float32)

        def mean(old: Array, new: Array, beta: float) -> Array:
            return beta * old.astype(jnp.float32) + (1 - beta) * new

        mu = jax.tree.map(lambda m, g: mean(m, g, beta1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: mean(v, g * g, beta2), state.nu, updates)
        direction = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        mu_kept, nu_kept = (optax.tree.cast(tree, jnp.bfloat16) for tree in (mu, nu))
        return direction, Moments(count, mu_kept, nu_kept)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip the global norm, Adam, decoupled weight decay; the caller multiplies by -lr.

    The paper names no exceptions from weight decay. Norm gains, which it would only pull away
    from 1, are left out as is usual; router biases are no parameters at all.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_bfloat16_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(params: Any) -> Any:
    """Which parameters weight decay acts on: every matrix, no norm gain."""
    return jax.tree.map(
        lambda p: p.get_metadata("axes") != ("norm",),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def learning_rate_at(config: OptimizerConfig, step: int, tokens: int) -> float:
    """Of the step that follows `step` of them, in which `tokens` were seen; warmed up by steps."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return schedule_value(config.learning_rate, tokens) * warm
