"""Causal attention in blocks: the matrix of scores never exists, forward or backward.

    score_ij = q_i . k_j * scale,   p_ij = softmax over j <= i in the same segment,   o_i = p_ij v_j

A block of queries meets one block of keys after another and keeps a running maximum and sum
(online softmax, FlashAttention, arXiv:2205.14135; arXiv:2307.08691). Blocks of keys beyond the
query's are skipped, so about half of the score matrix is never computed. The backward pass keeps
only the output and each row's log-sum-exp, and makes the scores again. Plain XLA on every backend;
softmax in float32.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsjax.kernels.attention_blocks import (
    BLOCK,
    MASKED,
    Gathered,
    Keys,
    Queries,
    attend,
    attend_backward,
    block,
    heads_first,
    inner_products,
    nothing_yet,
    pad_ids,
    put_block,
)


def causal_attention_reference(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H V"],
    segment_ids: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B S H V"]:
    """The meaning of `causal_attention`, with the whole score matrix."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    allowed = jnp.tri(q.shape[1], dtype=bool)[None] & same
    weights = _masked_softmax(scores, allowed[:, None])
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def _masked_softmax(
    scores: Float[Array, "B H Q K"], allowed: Bool[Array, "#B #H Q K"]
) -> Float[Array, "B H Q K"]:
    """Softmax over the last axis among the allowed entries."""
    return jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H V"],
    segment_ids: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B S H V"]:
    """Attend to the earlier tokens of the same segment, and to oneself.

    Rows are padded to whole blocks with a segment of their own.
    """
    ids = pad_ids(segment_ids)
    out: Array = _attention(heads_first(q), heads_first(k), heads_first(v), ids, scale)
    return out[:, :, : q.shape[1]].swapaxes(1, 2)


class Saved(NamedTuple):
    """What the backward pass needs, all [B, H, S, ...] but the ids."""

    q: Array
    k: Array
    v: Array
    ids: Array
    out: Array
    log_sum: Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, ids: Array, scale: float) -> Array:
    return forward(q, k, v, ids, scale)[0]


def forward(q: Array, k: Array, v: Array, ids: Array, scale: float) -> tuple[Array, Saved]:
    """The output, and what `backward` needs; heads before places, and those in whole blocks."""
    keys = Keys(k, v, ids, 0)

    def query_block(i: Array) -> tuple[Array, Array]:
        queries = Queries(block(q, i), block(ids, i, 1), i)
        start = nothing_yet(queries.q.shape[:3], v.shape[-1])
        out, log_sum = attend(start, queries, keys, scale).finished()
        return out.astype(v.dtype), log_sum

    out, log_sum = lax.map(query_block, jnp.arange(q.shape[2] // BLOCK))
    out = jnp.moveaxis(out, 0, 2).reshape(v.shape)
    log_sum = jnp.moveaxis(log_sum, 0, 2).reshape(q.shape[:3])
    return out, Saved(q, k, v, ids, out, log_sum)


def backward(scale: float, saved: Saved, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Gradients of q, k and v, and none of the ids."""
    q, k, v, ids, out, log_sum = saved
    keys = Keys(k, v, ids, 0)
    inner = inner_products(out, d_out)

    def query_block(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v = grads
        queries = Queries(block(q, i), block(ids, i, 1), i)
        known = Gathered(block(d_out, i), block(log_sum, i), block(inner, i))
        start = jnp.zeros(queries.q.shape, jnp.float32), d_k, d_v
        d_q_i, d_k, d_v = attend_backward(start, queries, keys, known, scale)
        return put_block(d_q, d_q_i, i), d_k, d_v

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    d_q, d_k, d_v = lax.fori_loop(0, q.shape[2] // BLOCK, query_block, zeros)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(forward, backward)
