"""How far a student's next-token distribution is from its teacher's, in chunks.

As in `dsjax.training.loss`, logits exist for a stretch of positions at a time, here of two models,
and the pass that makes them makes the gradients of the student's hidden states and head too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.training.loss import (
    OfChunk,
    scaled_gradients,
    weighted_sum,
    weighted_sum_and_gradients,
)
from sharding.by_hand import first_place, largest, summed
from sharding.rules import constrain


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def divergence(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "B S E"],
    teacher_head: Float[Array, "V E"],
    weights: Float[Array, "B S"],
    known: int,
    temperature: float,
    chunk: int,
) -> Float[Array, ""]:
    """sum over positions of weight * T^2 KL(teacher || student), both softened by T, in float32.

        T^2 sum_v p_v (log p_v - log q_v),   p = softmax(teacher's logits / T),   q the student's

    p is of the tokenizer's ids alone: what pads a vocabulary says nothing, and is to be unlikely.
    T^2 keeps the gradient as large as it is at T = 1 (Hinton et al., arXiv:1503.02531, section 2).
    By hand, a device may have some rows of both heads only. The teacher has no gradient.

    Args:
        hidden: after the final norm; `head` in its dtype. Likewise of the teacher.
        weights: what each position counts.
        known: how many ids the tokenizer has; those from here on are padding.
        temperature: T.
        chunk: positions of a row handled at a time.
    """

    of_chunk = _softened(head, teacher_head, known, temperature)
    return weighted_sum(of_chunk, chunk, weights, hidden, teacher_hidden)


def _forward(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    weights: Array,
    known: int,
    temperature: float,
    chunk: int,
) -> tuple[Array, tuple[Array, Array]]:
    of_chunk = _softened(head, teacher_head, known, temperature)
    return weighted_sum_and_gradients(of_chunk, chunk, weights, head, hidden, teacher_hidden)


def _backward(
    known: int, temperature: float, chunk: int, saved: tuple[Array, Array], d: Array
) -> tuple[Array | None, ...]:
    return *scaled_gradients(saved, d), None, None, None


divergence.defvjp(_forward, _backward)


def _softened(head: Array, teacher_head: Array, known: int, temperature: float) -> OfChunk:
    """T^2 KL(p || q) of each position, and its gradient by the student's logits, T (q - p)."""
    size = teacher_head.shape[0]
    padding = first_place("vocab", size) + jnp.arange(size) >= known

    def of_chunk(hidden: Array, theirs: Array) -> tuple[Array, Array]:
        log_q = _log_softmax(_logits(hidden, head, temperature))
        # Finite, so that the logarithm of no chance at all is worth 0, not NaN, by that chance.
        lowest = jnp.finfo(jnp.float32).min / 2
        log_p = _log_softmax(jnp.where(padding, lowest, _logits(theirs, teacher_head, temperature)))
        p = jnp.exp(log_p)
        kl = summed((p * (log_p - log_q)).sum(-1), "vocab")
        return temperature**2 * kl, temperature * (jnp.exp(log_q) - p)

    return of_chunk


def _logits(hidden: Array, head: Array, temperature: float) -> Array:
    """Over T, those of this device's tokens."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "sequence", "vocab") / temperature


def _log_softmax(logits: Array) -> Array:
    """Over all devices' tokens."""
    top = largest(logits.max(-1), "vocab")[..., None]
    return logits - top - jnp.log(summed(jnp.exp(logits - top).sum(-1), "vocab"))[..., None]
