"""Cross-entropy in chunks: no array of [tokens, vocabulary] is ever whole.

The head's logits are the largest activation of a model by far. Here they are made for a stretch of
positions at a time. When gradients are wanted, the same pass makes those of the hidden states and
of the head too, so that the logits are computed once: three products, as for any other layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.by_hand import first_place, is_split, largest, summed
from sharding.rules import constrain


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int,
) -> Float[Array, ""]:
    """sum over positions of weight * -log softmax(head hidden)[target], in float32.

    By hand, a device may have some rows of the head only: it makes their logits and no others.

    Args:
        hidden: after the final norm.
        head: the output matrix, in the dtype of `hidden`.
        targets: the token that each position should predict; any valid id where the weight is 0.
        weights: what each position counts.
        chunk: positions of a row handled at a time.
    """

    of_chunk = partial(_nll_and_gradient, head=head)
    return weighted_sum(of_chunk, chunk, weights, hidden, targets)


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, tuple[Array, Array]]:
    of_chunk = partial(_nll_and_gradient, head=head)
    return weighted_sum_and_gradients(of_chunk, chunk, weights, head, hidden, targets)


def _backward(chunk: int, saved: tuple[Array, Array], d: Array) -> tuple[Array, Array, None, None]:
    return *scaled_gradients(saved, d), None, None


cross_entropy.defvjp(_forward, _backward)


def token_scores(
    hidden: Float[Array, "B S D"], head: Float[Array, "V D"], targets: Int[Array, "B S"], chunk: int
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """For evaluation: each position's negative log-likelihood in nats, and its likeliest token."""

    def one_chunk(_: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        nll, logits, _log_total = _negative_log_likelihood(part[0], head, part[1])
        return None, (nll, _likeliest(logits))

    _, scores = jax.lax.scan(one_chunk, None, in_chunks(chunk, hidden, targets))
    nll, best = (s.swapaxes(0, 1).reshape(hidden.shape[0], -1) for s in scores)
    return nll[:, : hidden.shape[1]], best[:, : hidden.shape[1]]


def _nll_and_gradient(hidden: Array, targets: Array, *, head: Array) -> tuple[Array, Array]:
    """-log p(target) of each position, and its gradient by this device's logits."""
    nll, logits, log_total = _negative_log_likelihood(hidden, head, targets)
    return nll, jnp.exp(logits - log_total[..., None]) - _hits(targets, head.shape[0])


def _negative_log_likelihood(
    hidden: Array, head: Array, targets: Array
) -> tuple[Array, Array, Array]:
    """-log p(target), this device's logits, and the logarithm of their normalizer; all float32."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "sequence", "vocab")
    if not is_split("vocab"):
        log_total = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return log_total - picked, logits, log_total
    top = largest(logits.max(-1), "vocab")
    log_total = top + jnp.log(summed(jnp.exp(logits - top[..., None]).sum(-1), "vocab"))
    picked = summed(jnp.where(_hits(targets, head.shape[0]), logits, 0).sum(-1), "vocab")
    return log_total - picked, logits, log_total


def _hits(targets: Array, size: int) -> Array:
    """Which of this device's `size` ids is the target [B, S, size]; none, if it lies elsewhere."""
    ids = first_place("vocab", size) + jnp.arange(size)
    return targets[..., None] == ids[None, None]


def _likeliest(logits: Array) -> Array:
    """The id of the largest logit, the first of equal ones, wherever it lies."""
    size = logits.shape[-1]
    best = jnp.argmax(logits, axis=-1) + first_place("vocab", size)
    if not is_split("vocab"):
        return best
    value = logits.max(-1)
    # The smallest id is the largest of their negatives.
    smallest = jnp.iinfo(best.dtype).min
    return -largest(jnp.where(value == largest(value, "vocab"), -best, smallest), "vocab")


OfChunk = Callable[..., tuple[Array, Array]]
"""Of hidden states [B, C, D] and what else positions have: their losses [B, C], and the gradient of
each by this device's logits [B, C, V]."""


def weighted_sum(
    of_chunk: OfChunk, chunk: int, weights: Float[Array, "B S"], *arrays: Array
) -> Array:
    """sum over positions of weight * loss. What has no gradient here is never made."""

    def one_chunk(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        weights, *of_positions = part
        losses, _ = of_chunk(*of_positions)
        return total + (losses * weights).sum(), None

    total, _ = jax.lax.scan(one_chunk, jnp.zeros(()), in_chunks(chunk, weights, *arrays))
    return total


def weighted_sum_and_gradients(
    of_chunk: OfChunk,
    chunk: int,
    weights: Float[Array, "B S"],
    head: Float[Array, "V D"],
    hidden: Float[Array, "B S D"],
    *arrays: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """The same, with its gradients by hidden states and head, from the same logits."""

    def one_chunk(
        carry: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        total, d_head = carry
        weights, hidden, *others = part
        losses, by_logits = of_chunk(hidden, *others)
        d_logits = (by_logits * weights[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("bsv,vd->bsd", d_logits, head)
        # With the vocabulary last, the small operand is the one to be transposed.
        d_head += jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (total + (losses * weights).sum(), d_head), d_hidden

    start = jnp.zeros(()), jnp.zeros(head.shape[::-1], jnp.float32)
    parts = in_chunks(chunk, weights, hidden, *arrays)
    (total, d_head), d_hidden = jax.lax.scan(one_chunk, start, parts)
    d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return total, (d_hidden[:, : hidden.shape[1]], d_head.T.astype(head.dtype))


def scaled_gradients(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    """The gradients of hidden states and head where the sum's own is `d`."""
    d_hidden, d_head = saved
    # Every device that had a part of the vocabulary has this loss, and its share of its gradient.
    d = summed(d, "vocab")
    return (d * d_hidden).astype(d_hidden.dtype), (d * d_head).astype(d_head.dtype)


def in_chunks(chunk: int, *arrays: Array) -> Any:
    """[B, S, ...] to [chunks, B, chunk, ...]; zeros fill the last chunk."""
    length = arrays[0].shape[1]
    chunk = min(chunk, length)
    missing = -length % chunk

    def one(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return tuple(one(x) for x in arrays)
