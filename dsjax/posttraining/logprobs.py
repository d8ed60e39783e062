"""Log-probabilities of tokens in the distribution that they are drawn from, with their gradient.

The trainer must speak of the distribution that the engine sampled: logits over the temperature,
without the ids that no tokenizer knows, and of those what top_k and top_p leave, normalized anew.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config_grpo import SamplingConfig
from dsjax.inference.sampling import kept_from
from dsjax.training.loss import in_chunks
from sharding.by_hand import first_place, largest, summed


class TokenScores(NamedTuple):
    """Of each place's target, and of the whole distribution there; in nats."""

    logprobs: Float[Array, "B S"]
    entropy: Float[Array, "B S"]
    """Without a gradient."""


def token_scores(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    sampling: SamplingConfig,
    vocab_size: int,
    chunk: int,
) -> TokenScores:
    """Score the token that each place should predict, a stretch of places at a time.

    The backward pass makes the logits of a stretch again, so no array of [places, vocabulary] is
    ever whole. The head's gradient is added up in float32.

    A target always counts as left by top_k and top_p. In the distribution that it was drawn from it
    was; after a step of training another one may leave it out, and a token of probability zero
    would have no gradient to come back by.

    Args:
        hidden: after the final norm.
        head: by hand, the rows that this device has.
        vocab_size: ids from here on are never drawn.
        chunk: places of a row handled at a time.
    """
    wide = head.astype(jnp.float32)

    @jax.checkpoint
    def one(hidden: Array, wide: Array, targets: Array) -> TokenScores:
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores = _score(flat, wide.astype(head.dtype), targets.ravel(), sampling, vocab_size)
        return TokenScores(*(x.reshape(targets.shape) for x in scores))

    def turn(_: None, part: tuple[Array, Array]) -> tuple[None, TokenScores]:
        return None, one(part[0], wide, part[1])

    _, found = jax.lax.scan(turn, None, in_chunks(chunk, hidden, targets))
    joined = (x.swapaxes(0, 1).reshape(hidden.shape[0], -1)[:, : hidden.shape[1]] for x in found)
    return TokenScores(*joined)


def _score(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "T"],
    sampling: SamplingConfig,
    vocab_size: int,
) -> tuple[Array, Array]:
    logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    ids = first_place("vocab", head.shape[0]) + jnp.arange(head.shape[0])[None]
    is_target = ids == targets[:, None]
    x = jnp.where(ids < vocab_size, logits, -jnp.inf)
    top = largest(jax.lax.stop_gradient(x).max(-1), "vocab")
    z = (x - top[:, None]) / sampling.temperature
    if sampling.top_p < 1 or sampling.top_k > 0:
        rows = (targets.shape[0],)
        limit = kept_from(
            jax.lax.stop_gradient(x),
            jax.lax.stop_gradient(z),
            jnp.full(rows, sampling.top_k, jnp.int32),
            jnp.full(rows, sampling.top_p, jnp.float32),
        )
        z = jnp.where((x >= limit[:, None]) | is_target, z, -jnp.inf)
    total = jnp.log(summed(jnp.exp(z).sum(-1), "vocab"))
    # Where z is -inf, its gradient would be 0 times inf.
    chosen = summed(jnp.where(is_target, z, 0).sum(-1), "vocab")
    known = jax.lax.stop_gradient(jnp.where(jnp.isfinite(z), z, 0))
    mean = summed((jnp.exp(jax.lax.stop_gradient(z)) * known).sum(-1), "vocab")
    fixed = jax.lax.stop_gradient(total)
    return chosen - total, fixed - mean * jnp.exp(-fixed)
