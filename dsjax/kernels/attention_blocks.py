"""The inner loops of attention: a block of queries against a chunk of keys, forward and backward.

Each lies at a place of the sequence that may be computed, so a chunk may be the sequence itself
(`attention.py`) or a part of it that has come from another device (`ring_attention.py`). Online
softmax as FlashAttention has it (arXiv:2205.14135; arXiv:2307.08691), in float32. Arrays have their
heads before their places, and places in whole blocks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsjax.kernels.usual import usual_turns

BLOCK = 128
"""Queries and keys of one block: 64 KiB of scores a head, which stay in a core's cache."""

MASKED = -1e30
"""A score no real one reaches; finite, so that no difference of two becomes NaN."""

PADDING = -1
"""The segment of what fills a last block: segments of tokens are not negative."""


def heads_first(x: Float[Array, "B C H *D"]) -> Float[Array, "B H P *D"]:
    """A chunk of C places as the loops want it: heads before places, and those in whole blocks."""
    beyond = [(0, 0)] * x.ndim
    beyond[2] = (0, -x.shape[1] % BLOCK)
    return jnp.pad(x.swapaxes(1, 2), beyond)


def pad_ids(ids: Int[Array, "B C"]) -> Int[Array, "B P"]:
    """Segments of a chunk, `PADDING` up to whole blocks."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % BLOCK)), constant_values=PADDING)


class Queries(NamedTuple):
    """One block of queries."""

    q: Float[Array, "B H Q D"]
    ids: Int[Array, "B Q"]
    place: Int[Array, ""] | int
    """How many blocks of the sequence lie before it."""


class Keys(NamedTuple):
    """A chunk of keys and values: whole blocks that follow one another."""

    k: Float[Array, "B H K D"]
    v: Float[Array, "B H K V"]
    ids: Int[Array, "B K"]
    place: Int[Array, ""] | int
    """How many blocks of the sequence lie before the first."""


class Running(NamedTuple):
    """What queries have gathered from the keys that they have met: the online softmax."""

    maximum: Float[Array, "B H Q"]
    total: Float[Array, "B H Q"]
    out: Float[Array, "B H Q V"]

    def finished(self) -> tuple[Float[Array, "B H Q V"], Float[Array, "B H Q"]]:
        """The output and the log-sum-exp of each query that has met all its keys."""
        return self.out / self.total[..., None], self.maximum + jnp.log(self.total)


class Gathered(NamedTuple):
    """What the backward pass knows of a block of queries, from the forward one and from above."""

    d_out: Float[Array, "B H Q V"]
    log_sum: Float[Array, "B H Q"]
    inner: Float[Array, "B H Q"]
    """sum_j p_ij dp_ij of the softmax's gradient, which is also out_i . d_out_i"""


def nothing_yet(rows: tuple[int, ...], width: int) -> Running:
    """Queries of shape `rows`, [B, H, Q], that have met no key; values of `width` numbers."""
    zeros = jnp.zeros(rows)
    return Running(zeros + MASKED, zeros, jnp.zeros((*rows, width)))


def inner_products(
    out: Float[Array, "B H Q V"], d_out: Float[Array, "B H Q V"]
) -> Float[Array, "B H Q"]:
    """`Gathered.inner`, in float32."""
    return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)


def attend(running: Running, queries: Queries, keys: Keys, scale: float) -> Running:
    """Let a block of queries meet a chunk of keys, wherever in the sequence each of them lies.

    Blocks of keys after the queries' own are not computed: none of a chunk that lies in the future,
    all of one that lies in the past.
    """

    def key_block(j: Array, running: Running) -> Running:
        v_j = block(keys.v, j)
        scores = _scores(queries.q, block(keys.k, j), scale)
        scores = jnp.where(_allowed(queries, keys, j), scores, MASKED)
        higher = jnp.maximum(running.maximum, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        shrink = jnp.exp(running.maximum - higher)
        added = jnp.einsum(
            "bhqk,bhkv->bhqv", weights.astype(v_j.dtype), v_j, preferred_element_type=jnp.float32
        )
        total = running.total * shrink + weights.sum(-1)
        return Running(higher, total, running.out * shrink[..., None] + added)

    with _half_of(keys):
        return lax.fori_loop(0, _seen(queries, keys), key_block, running)


def attend_backward(
    grads: tuple[Array, Array, Array], queries: Queries, keys: Keys, known: Gathered, scale: float
) -> tuple[Array, Array, Array]:
    """Add what `attend` of these passes back to the gradients of (q, k, v), all float32.

    The gradient of q is [B, H, Q, D] of this block, those of k and v are the whole chunk's.
    """
    q, d_out = queries.q, known.d_out

    def key_block(j: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v = grads
        k_j, v_j = block(keys.k, j), block(keys.v, j)
        weights = jnp.exp(_scores(q, k_j, scale) - known.log_sum[..., None])
        weights = jnp.where(_allowed(queries, keys, j), weights, 0)
        d_weights = jnp.einsum("bhqv,bhkv->bhqk", d_out, v_j, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - known.inner[..., None]) * scale).astype(q.dtype)
        d_v = _add(d_v, j, "bhqk,bhqv->bhkv", weights.astype(q.dtype), d_out)
        d_k = _add(d_k, j, "bhqk,bhqd->bhkd", d_scores, q)
        d_q += jnp.einsum("bhqk,bhkd->bhqd", d_scores, k_j, preferred_element_type=jnp.float32)
        return d_q, d_k, d_v

    with _half_of(keys):
        return lax.fori_loop(0, _seen(queries, keys), key_block, grads)


def block(x: Array, index: Array | int, dim: int = 2) -> Array:
    """Block `index` of the places that lie along `dim`."""
    return lax.dynamic_slice_in_dim(x, index * BLOCK, BLOCK, dim)


def put_block(x: Array, new: Array, index: Array | int) -> Array:
    """x [B, H, P, ...] with another block `index`."""
    return lax.dynamic_update_slice_in_dim(x, new, index * BLOCK, 2)


def _seen(queries: Queries, keys: Keys) -> Array:
    """How many of the chunk's blocks are not after the queries'."""
    return jnp.clip(queries.place - keys.place + 1, 0, keys.k.shape[2] // BLOCK)


def _half_of(keys: Keys) -> AbstractContextManager[object]:
    """Queries meet half of all blocks, and half of one more: of each chunk, on average."""
    return usual_turns((keys.k.shape[2] // BLOCK + 1) // 2)


def _allowed(queries: Queries, keys: Keys, j: Array) -> Bool[Array, "B 1 Q K"]:
    """Which keys of the chunk's block j the queries may see."""
    places = jnp.arange(BLOCK)
    ahead = (queries.place - keys.place - j) * BLOCK
    causal = (ahead + places)[:, None] >= places[None, :]
    k_ids = block(keys.ids, j, 1)
    return ((queries.ids[:, :, None] == k_ids[:, None, :]) & causal[None])[:, None]


def _scores(q: Array, k: Array, scale: float) -> Array:
    return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale


def _add(total: Array, index: Array, product: str, a: Array, b: Array) -> Array:
    """Add a product to block `index` of a float32 sum."""
    added = jnp.einsum(product, a, b, preferred_element_type=jnp.float32)
    return put_block(total, block(total, index) + added, index)
