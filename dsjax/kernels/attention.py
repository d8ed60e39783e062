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

BLOCK = 128
"""Queries and keys of one block: 64 KiB of scores a head, which stay in a core's cache."""

MASKED = -1e30
"""A score no real one reaches; finite, so that no difference of two becomes NaN."""


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
    length = q.shape[1]
    padding = -length % BLOCK

    def heads_first(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    out: Array = _attention(heads_first(q), heads_first(k), heads_first(v), ids, scale)
    return out[:, :, :length].swapaxes(1, 2)


class _Saved(NamedTuple):
    """What the backward pass needs, all [B, H, S, ...] but the ids."""

    q: Array
    k: Array
    v: Array
    ids: Array
    out: Array
    log_sum: Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, ids: Array, scale: float) -> Array:
    return _forward(q, k, v, ids, scale)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array, scale: float) -> tuple[Array, _Saved]:
    rows = q.shape[:2]

    def query_block(i: Array) -> tuple[Array, Array]:
        q_i = _block(q, i)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, out = carry
            scores = jnp.where(_allowed(ids, i, j), _scores(q_i, _block(k, j), scale), MASKED)
            higher = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(maximum - higher)
            added = jnp.einsum(
                "bhqk,bhkv->bhqv",
                weights.astype(v.dtype),
                _block(v, j),
                preferred_element_type=jnp.float32,
            )
            return (
                higher,
                total * shrink + weights.sum(-1),
                out * shrink[..., None] + added,
            )

        zeros = jnp.zeros((*rows, BLOCK))
        start = zeros + MASKED, zeros, jnp.zeros((*rows, BLOCK, v.shape[-1]))
        maximum, total, out = lax.fori_loop(0, i + 1, key_block, start)
        return (out / total[..., None]).astype(v.dtype), maximum + jnp.log(total)

    out, log_sum = lax.map(query_block, jnp.arange(q.shape[2] // BLOCK))
    out = jnp.moveaxis(out, 0, 2).reshape(v.shape)
    log_sum = jnp.moveaxis(log_sum, 0, 2).reshape(q.shape[:3])
    return out, _Saved(q, k, v, ids, out, log_sum)


def _backward(scale: float, saved: _Saved, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, ids, out, log_sum = saved
    # sum_j p_ij dp_ij of the softmax's gradient, which is also out_i . d_out_i
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def query_block(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q_i, d_out_i = _block(q, i), _block(d_out, i)
        log_sum_i, inner_i = _block(log_sum, i)[..., None], _block(inner, i)[..., None]

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q_i, d_k, d_v = carry
            k_j, v_j = _block(k, j), _block(v, j)
            weights = jnp.exp(_scores(q_i, k_j, scale) - log_sum_i)
            weights = jnp.where(_allowed(ids, i, j), weights, 0)
            d_weights = jnp.einsum(
                "bhqv,bhkv->bhqk", d_out_i, v_j, preferred_element_type=jnp.float32
            )
            d_scores = (weights * (d_weights - inner_i) * scale).astype(q.dtype)
            d_v = _add(d_v, j, "bhqk,bhqv->bhkv", weights.astype(q.dtype), d_out_i)
            d_k = _add(d_k, j, "bhqk,bhqd->bhkd", d_scores, q_i)
            d_q_i += jnp.einsum(
                "bhqk,bhkd->bhqd", d_scores, k_j, preferred_element_type=jnp.float32
            )
            return d_q_i, d_k, d_v

        d_q, d_k, d_v = grads
        start = jnp.zeros(q_i.shape, jnp.float32), d_k, d_v
        d_q_i, d_k, d_v = lax.fori_loop(0, i + 1, key_block, start)
        return lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * BLOCK, 2), d_k, d_v

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    d_q, d_k, d_v = lax.fori_loop(0, q.shape[2] // BLOCK, query_block, zeros)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _block(x: Array, index: Array) -> Array:
    """Block `index` of the sequence, axis 2."""
    return lax.dynamic_slice_in_dim(x, index * BLOCK, BLOCK, 2)


def _add(total: Array, index: Array, product: str, a: Array, b: Array) -> Array:
    """Add a product to block `index` of a float32 sum."""
    added = jnp.einsum(product, a, b, preferred_element_type=jnp.float32)
    return lax.dynamic_update_slice_in_dim(total, _block(total, index) + added, index * BLOCK, 2)


def _scores(q: Array, k: Array, scale: float) -> Array:
    return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale


def _allowed(ids: Array, i: Array, j: Array) -> Array:
    """Which keys of block j the queries of block i may see, [B, 1, BLOCK, BLOCK]."""
    places = jnp.arange(BLOCK)
    causal = (i * BLOCK + places)[:, None] >= (j * BLOCK + places)[None, :]
    q_ids = lax.dynamic_slice_in_dim(ids, i * BLOCK, BLOCK, 1)
    k_ids = lax.dynamic_slice_in_dim(ids, j * BLOCK, BLOCK, 1)
    return ((q_ids[:, :, None] == k_ids[:, None, :]) & causal[None])[:, None]
