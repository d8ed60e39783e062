"""How far a student's next-token distribution is from its teacher's, in chunks.

As in `dsjax.training.loss`, logits exist for a stretch of positions at a time, here of two models,
and the pass that makes them makes the gradients of the student's hidden states and head too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.training.loss import in_chunks
from sharding.by_hand import largest, summed
from sharding.rules import constrain


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def divergence(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "B S E"],
    teacher_head: Float[Array, "V E"],
    weights: Float[Array, "B S"],
    temperature: float,
    chunk: int,
) -> Float[Array, ""]:
    """sum over positions of weight * T^2 KL(teacher || student), both softened by T, in float32.

        T^2 sum_v p_v (log p_v - log q_v),   p = softmax(teacher's logits / T),   q the student's

    T^2 keeps the gradient as large as it is at T = 1 (Hinton et al., arXiv:1503.02531, section 2).
    By hand, a device may have some rows of both heads only. The teacher has no gradient.

    Args:
        hidden: after the final norm; `head` in its dtype. Likewise of the teacher.
        weights: what each position counts.
        temperature: T.
        chunk: positions of a row handled at a time.
    """

    def one_chunk(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, theirs, weights = part
        kl, _ = _softened(hidden, head, theirs, teacher_head, temperature)
        return total + (kl * weights).sum(), None

    parts = in_chunks(chunk, hidden, teacher_hidden, weights)
    total, _ = jax.lax.scan(one_chunk, jnp.zeros(()), parts)
    return total * temperature**2


def _forward(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    weights: Array,
    temperature: float,
    chunk: int,
) -> tuple[Array, tuple[Array, Array]]:
    def one_chunk(
        carry: tuple[Array, Array], part: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        total, d_head = carry
        hidden, theirs, weights = part
        kl, difference = _softened(hidden, head, theirs, teacher_head, temperature)
        d_logits = (difference * weights[..., None] * temperature).astype(hidden.dtype)
        d_hidden = jnp.einsum("bsv,vd->bsd", d_logits, head)
        d_head += jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (total + (kl * weights).sum(), d_head), d_hidden

    start = jnp.zeros(()), jnp.zeros(head.shape[::-1], jnp.float32)
    parts = in_chunks(chunk, hidden, teacher_hidden, weights)
    (total, d_head), d_hidden = jax.lax.scan(one_chunk, start, parts)
    d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    grads = d_hidden[:, : hidden.shape[1]], d_head.T.astype(head.dtype)
    return total * temperature**2, grads


def _backward(
    temperature: float, chunk: int, saved: tuple[Array, Array], d: Array
) -> tuple[Array | None, ...]:
    d_hidden, d_head = saved
    # Every device that had a part of the vocabulary has this loss, and its share of its gradient.
    d = summed(d, "vocab")
    own = (d * d_hidden).astype(d_hidden.dtype), (d * d_head).astype(d_head.dtype)
    return *own, None, None, None


divergence.defvjp(_forward, _backward)


def _softened(
    hidden: Array, head: Array, theirs: Array, teacher_head: Array, temperature: float
) -> tuple[Array, Array]:
    """KL(p || q) of each position, and q - p of each of this device's tokens; both float32."""
    log_q, log_p = (
        _log_softmax(hidden, head, temperature),
        _log_softmax(theirs, teacher_head, temperature),
    )
    p = jnp.exp(log_p)
    return summed((p * (log_p - log_q)).sum(-1), "vocab"), jnp.exp(log_q) - p


def _log_softmax(hidden: Array, head: Array, temperature: float) -> Array:
    """Of the logits over T, those of this device's tokens."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "sequence", "vocab") / temperature
    top = largest(logits.max(-1), "vocab")[..., None]
    return logits - top - jnp.log(summed(jnp.exp(logits - top).sum(-1), "vocab"))[..., None]
