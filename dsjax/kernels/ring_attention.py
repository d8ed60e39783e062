"""Causal attention over a sequence that is split across devices, in a ring.

Each device keeps its queries. What keys and values are made of goes round: for MLA the latent and
the rotated key that all heads share, 512 + 64 numbers a token for V3 instead of 128 heads times 320
(DeepSeek-V2, arXiv:2405.04434, section 2.1); for grouped-query attention the keys and values
themselves. Whatever has arrived is expanded for the heads of this device, a piece at a time, met by
its queries, and forgotten. The backward pass goes round once more and expands again; the
gradient of what travels goes with it and comes home.

Ring attention: arXiv:2310.01889. Where the places lie, and why that balances causal attention:
`sharding/context_parallel.py`. Of two chunks one is visible wholly, causally or not at all, so on
every device a step costs two chunks of queries against chunks of keys.

What it costs. Every device expands the whole sequence, which one device alone would do once: for V3
2 * 512 * 256 operations a head and token, as many as 410 pairs of query and key take at 640. A
device has S / 2n pairs for each token, so expanding adds a tenth to attention at S = 64K over 8
devices, but four fifths at 4K over 4. Memory for a sequence of S places is that of S / n; only
segments and other integers may lie whole elsewhere.

Differs from the papers: the latent travels, not keys and values; packing by segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.kernels.attention_blocks import (
    BLOCK,
    Gathered,
    Keys,
    Queries,
    Running,
    attend,
    attend_backward,
    block,
    heads_first,
    inner_products,
    nothing_yet,
    pad_ids,
    put_block,
)
from sharding.context_parallel import chunks_of, pass_on

T = TypeVar("T")

AT_ONCE = 1024
"""Places of which keys and values are in memory, where it divides a chunk: else a whole chunk's."""

Expand = Callable[[Any, Any], tuple[Float[Array, "B C H D"], Float[Array, "B C H V"]]]
"""From C places of what travels, and weights, to their keys and values for this device's heads."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def ring_attention(
    axis: str,
    q: Float[Array, "B L H D"],
    travelling: Any,
    segment_ids: Int[Array, "B L"],
    weights: Any,
    expand: Expand,
    scale: float,
) -> Float[Array, "B L H V"]:
    """Attend to the earlier tokens of the same segment, and to oneself, on all devices of an axis.

    Runs inside `jax.shard_map`. L = S / n places of a sequence lie on each of the n devices along
    `axis`, those that `sharding.context_parallel.local_places` gives it. Sequences of any length
    that divides by 2n: each half is padded to whole blocks by itself.

    Args:
        axis: the mesh axis along which the sequence is split.
        travelling: a pytree of float arrays [B, L, ...] that keys and values are made of.
        segment_ids: not negative; they travel as well.
        weights: a pytree of float arrays that `expand` needs, the same along `axis`.
        expand: `(travelling, weights) -> (keys, values)`, place by place. A function without
            arrays in its closure: it is run again for the gradient.
        scale: what scores are multiplied by.

    Returns:
        The values that were attended to, float32 softmax, in the dtype of the values. Gradients are
        those of the sum of all devices' losses: complete for q and travelling; for the weights this
        device's share, which the caller sums over `axis`.
    """
    return _forward(axis, q, travelling, segment_ids, weights, expand, scale)[0]


class _Saved(NamedTuple):
    """What the backward pass needs: nothing expanded, nothing of another device."""

    q: Array
    travelling: Any
    ids: Array
    weights: Any
    out: Array
    log_sum: Float[Array, "B L H"]


def _forward(
    axis: str, q: Array, travelling: Any, ids: Array, weights: Any, expand: Expand, scale: float
) -> tuple[Array, _Saved]:
    queries, pieces = _queries(axis, q, ids), _pieces(q.shape[1])

    def turn(t: Array, carry: tuple[Any, Running]) -> tuple[Any, Running]:
        held, running = carry
        # Sent before it is used, so that it travels meanwhile. The last turn sends everything home,
        # where nobody needs it: one transfer in n, behind as much work as the others.
        arriving = pass_on(held, axis)

        def piece(index: Array, running: Running) -> Running:
            part, part_ids = _piece(held, index, pieces)
            keys = _keys(*expand(part, weights), part_ids, _place(axis, t, index, q.shape[1]))
            return _meet(running, queries, keys, scale)

        return arriving, lax.fori_loop(0, pieces, piece, running)

    value = jax.eval_shape(expand, travelling, weights)[1]
    start = nothing_yet(queries.q.shape[:3], value.shape[-1])
    _, running = _all_turns(axis, turn, ((travelling, ids), start))
    out, log_sum = running.finished()
    out = _unpadded(out, q.shape[1]).astype(value.dtype)
    return out, _Saved(q, travelling, ids, weights, out, _unpadded(log_sum, q.shape[1]))


def _backward(
    axis: str, expand: Expand, scale: float, saved: _Saved, d_out: Array
) -> tuple[Array, Any, None, Any]:
    q, travelling, ids, weights, out, log_sum = saved
    queries, pieces = _queries(axis, q, ids), _pieces(q.shape[1])
    known = Gathered(*map(_padded, (d_out, log_sum, inner_products(out, d_out))))
    d_q = jnp.zeros(queries.q.shape, jnp.float32)

    def turn(t: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        held, d_before, d_added, d_q, d_weights = carry
        # The gradient follows what it is of, one turn later: while it travels, this turn makes its
        # own part. Adding that here, too, would let XLA put the transfers behind the loops.
        arriving, d_here = pass_on((held, _add(d_before, d_added)), axis)

        def piece(sums: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], Any]:
            part, part_ids = _piece(held, index, pieces)
            (k, v), back = jax.vjp(expand, part, weights)
            keys = _keys(k, v, part_ids, _place(axis, t, index, q.shape[1]))
            d_q, d_k, d_v = _meet_backward(sums[0], queries, keys, known, scale)
            d_part, d_more = back((_heads_last(d_k, k), _heads_last(d_v, v)))
            return (d_q, _add(sums[1], d_more)), d_part

        sums, d_parts = lax.scan(piece, (d_q, d_weights), jnp.arange(pieces))
        return arriving, d_here, jax.tree.map(_joined, d_parts), *sums

    nothing = _zeros(travelling)
    start = (travelling, ids), nothing, _cast(nothing, travelling), d_q, _zeros(weights)
    carry = _all_turns(axis, turn, start)
    _, d_before, d_added, d_q, d_weights = carry
    d_travelling = pass_on(_add(d_before, d_added), axis)
    d_q = _unpadded(d_q, q.shape[1]).astype(q.dtype)
    return d_q, _cast(d_travelling, travelling), None, _cast(d_weights, weights)


ring_attention.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------
# Queries of this device against one chunk of keys
# ---------------------------------------------------------------------------------------------


def _all_turns(axis: str, turn: Callable[[Array, T], T], start: T) -> T:
    """`turn(t, carry)` for t from 0 to n - 1.

    In a `while`: a loop whose length is known becomes a `scan`, and into those the policies of
    `jax.checkpoint` look. One that keeps products would keep the keys and values of every turn.
    """
    turns = lax.axis_size(axis)

    def once(carry: tuple[Array, T]) -> tuple[Array, T]:
        return carry[0] + 1, turn(*carry)

    return lax.while_loop(lambda carry: carry[0] < turns, once, (jnp.int32(0), start))[1]


class _Queries(NamedTuple):
    """All queries of this device, in whole blocks."""

    q: Float[Array, "B H P D"]
    ids: Int[Array, "B P"]
    places: Int[Array, "N"]
    """How many blocks of the sequence lie before each of them."""

    def block(self, i: Array) -> Queries:
        return Queries(block(self.q, i), block(self.ids, i, 1), self.places[i])


def _meet(running: Running, queries: _Queries, keys: Keys, scale: float) -> Running:
    """Every block of this device's queries meets the chunk."""

    def query_block(i: Array, running: Running) -> Running:
        met = attend(Running(*(block(x, i) for x in running)), queries.block(i), keys, scale)
        return Running(*(put_block(x, new, i) for x, new in zip(running, met, strict=True)))

    return lax.fori_loop(0, queries.q.shape[2] // BLOCK, query_block, running)


def _meet_backward(
    d_q: Array, queries: _Queries, keys: Keys, known: Gathered, scale: float
) -> tuple[Array, Array, Array]:
    """What `_meet` passes back: d_q with its part added, and the chunk's d_k and d_v, float32."""

    def query_block(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v = grads
        known_i = Gathered(*(block(x, i) for x in known))
        start = block(d_q, i), d_k, d_v
        d_q_i, d_k, d_v = attend_backward(start, queries.block(i), keys, known_i, scale)
        return put_block(d_q, d_q_i, i), d_k, d_v

    start = d_q, *_zeros((keys.k, keys.v))
    return lax.fori_loop(0, queries.q.shape[2] // BLOCK, query_block, start)


# ---------------------------------------------------------------------------------------------
# Where things lie
# ---------------------------------------------------------------------------------------------


def _queries(axis: str, q: Array, ids: Array) -> _Queries:
    heads = _padded(q)
    chunks = chunks_of(lax.axis_index(axis), lax.axis_size(axis))
    within = jnp.arange(heads.shape[2] // (2 * BLOCK))
    places = [chunk * within.size + within for chunk in chunks]
    halves = [pad_ids(half) for half in jnp.split(ids, 2, axis=1)]
    return _Queries(heads, jnp.concatenate(halves, axis=1), jnp.concatenate(places))


def _keys(k: Array, v: Array, ids: Array, place: Array) -> Keys:
    return Keys(heads_first(k), heads_first(v), pad_ids(ids), place)


def _pieces(length: int) -> int:
    """Into how many equal pieces what one device holds is cut: two chunks, or parts of them."""
    whole, rest = divmod(length // 2, AT_ONCE)
    return 2 if rest else 2 * whole


def _piece(tree: Any, index: Array, pieces: int) -> Any:
    """A piece of arrays [B, L, ...]."""

    def of(x: Array) -> Array:
        size = x.shape[1] // pieces
        return lax.dynamic_slice_in_dim(x, index * size, size, 1)

    return jax.tree.map(of, tree)


def _place(axis: str, turn: Array, index: Array, length: int) -> Array:
    """How many blocks lie before a piece of what device `me - turn` (mod n) has given."""
    devices = lax.axis_size(axis)
    giver = (lax.axis_index(axis) - turn) % devices
    of_chunk = _pieces(length) // 2
    chunk = jnp.stack(chunks_of(giver, devices))[index // of_chunk]
    blocks = -(-length // (2 * of_chunk * BLOCK))
    return (chunk * of_chunk + index % of_chunk) * blocks


def _joined(pieces: Array) -> Array:
    """[N, B, C, ...] to [B, N C, ...]"""
    n, rows, size, *width = pieces.shape
    return jnp.moveaxis(pieces, 0, 1).reshape(rows, n * size, *width)


def _padded(x: Float[Array, "B L H *D"]) -> Float[Array, "B H P *D"]:
    """Both halves heads first, each padded to whole blocks."""
    return jnp.concatenate([heads_first(half) for half in jnp.split(x, 2, axis=1)], axis=2)


def _unpadded(x: Float[Array, "B H P *D"], length: int) -> Float[Array, "B L H *D"]:
    """The inverse of `_padded`."""
    halves = [half[:, :, : length // 2] for half in jnp.split(x, 2, axis=2)]
    return jnp.concatenate(halves, axis=2).swapaxes(1, 2)


def _heads_last(x: Float[Array, "B H P D"], like: Float[Array, "B C H D"]) -> Array:
    """The inverse of `heads_first`, of whom `like` is."""
    return x[:, :, : like.shape[1]].swapaxes(1, 2).astype(like.dtype)


def _zeros(tree: Any) -> Any:
    """Float32 sums of what has these shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, more)


def _cast(sums: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), sums, like)
