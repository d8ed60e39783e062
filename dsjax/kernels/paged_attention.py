"""Attention over a latent cache that lies in pages.

A page holds a stretch of one sequence's latents; a row's table names its pages in order, so rows of
unequal length waste at most a page each, and rows with the same beginning can share pages.
PagedAttention: arXiv:2309.06180. What is paged here is MLA's latent, normalized c_kv and rotated
k_rope side by side, one for all heads (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Pages come in G groups, one for each part of the batch that lives on its own devices: a row's table
names pages of its own group, so nothing here crosses from one group to another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.kernels import paged_attention_tpu as tpu
from dsjax.kernels.attention import MASKED
from dsjax.kernels.tpu_core import alone
from dsjax.kernels.usual import usual_turns
from sharding.platform import by_platform

KEYS_AT_ONCE = 256
"""Keys of one turn of the loop over a row's context."""


class Places(NamedTuple):
    """Where the new tokens of a step stand. B = G x rows of a group, group by group."""

    positions: Int[Array, "B Q"]
    """Of each token in its sequence; what a row does not use may be anything below its length."""
    slots: Int[Array, "B Q"]
    """Where its latent goes, page * page size + offset; outside the cache where nothing goes."""
    table: Int[Array, "B P"]
    """Each row's pages in order; what it does not use names no page: N or more."""


def places_of(
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
    table: Int[Array, "B P"],
    queries: int,
    pages: int,
    page_size: int,
) -> Places:
    """Where `queries` tokens a row stand that begin at `starts`; only `counts` of them are kept.

    `pages` is the number of pages in a group, and names none.
    """
    offsets = jnp.arange(queries, dtype=jnp.int32)[None]
    positions = starts[:, None] + offsets
    kept = (offsets < counts[:, None]) & (positions < table.shape[1] * page_size)
    page = jnp.take_along_axis(table, positions // page_size, axis=1, mode="clip")
    slots = jnp.where(kept, page * page_size + positions % page_size, pages * page_size)
    return Places(jnp.where(kept, positions, starts[:, None]), slots, table)


KeysValues = Callable[[Float[Array, "B T W"]], tuple[Array, Array]]
"""From latents to keys [B, T, J, K] and values [B, T, J, V]: each serves H / J heads."""


def write_pages(
    pages: Float[Array, "G N T W"], new: Float[Array, "B Q _"], slots: Int[Array, "B Q"]
) -> Float[Array, "G N T W"]:
    """Put each token's latent into its slot; those whose slot is outside are dropped.

    Pages may be wider than latents.
    """
    groups, width = pages.shape[0], pages.shape[-1]
    new = jnp.pad(new, ((0, 0), (0, 0), (0, width - new.shape[-1])))
    flat = pages.reshape(groups, -1, width)
    rows = new.astype(pages.dtype).reshape(groups, -1, width)
    put = jax.vmap(lambda one, at, x: one.at[at].set(x, mode="drop"))
    return put(flat, slots.reshape(groups, -1), rows).reshape(pages.shape)


def paged_attention(
    q: Float[Array, "B Q H K"],
    pages: Float[Array, "G N T W"],
    places: Places,
    keys_values: KeysValues,
    key_heads: int,
    value_width: int,
    scale: float,
) -> Float[Array, "B Q H V"]:
    """softmax(q k^T * scale) v over every token up to and with the query's own position.

    Latents are read `KEYS_AT_ONCE` at a time, as far as the longest row reaches, and the softmax is
    put together as they come, in float32: the work follows the context in use, and no program
    depends on its length. Heads that share a key are to it as many more queries.

    `keys_values` makes `key_heads` keys and as many values, `value_width` wide, of a latent.
    """
    queries, heads = q.shape[1:3]
    q = _side_by_side(q, key_heads)
    positions = jnp.tile(places.positions, (1, heads // key_heads))
    pages_at_once = min(max(1, KEYS_AT_ONCE // pages.shape[2]), places.table.shape[1])
    keys_at_once = pages_at_once * pages.shape[2]
    padding = -places.table.shape[1] % pages_at_once
    table = jnp.pad(places.table, ((0, 0), (0, padding)))

    def turn(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, out = carry
        ids = lax.dynamic_slice_in_dim(table, index * pages_at_once, pages_at_once, 1)
        k, v = keys_values(_read(pages, ids).astype(q.dtype))
        scores = _product("bjqk,btjk->bjqt", q, k) * scale
        reach = index * keys_at_once + jnp.arange(keys_at_once)
        allowed = reach[None, None] <= positions[:, :, None]
        scores = jnp.where(allowed[:, None], scores, MASKED)
        higher = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        shrink = jnp.exp(maximum - higher)
        added = _product("bjqt,btjv->bjqv", weights.astype(v.dtype), v)
        return higher, total * shrink + weights.sum(-1), out * shrink[..., None] + added

    empty = jnp.zeros(q.shape[:3])
    start = empty + MASKED, empty, jnp.zeros((*empty.shape, value_width))
    turns = places.positions.max() // keys_at_once + 1
    with usual_turns(table.shape[1] // pages_at_once):  # of a row that is full
        _, total, out = lax.fori_loop(0, turns, turn, start)
    return _token_by_token((out / total[..., None]).astype(q.dtype), queries)


def latent_attention(
    q: Float[Array, "B Q H K"],
    pages: Float[Array, "G N T W"],
    places: Places,
    value_width: int,
    scale: float,
) -> Float[Array, "B Q H V"]:
    """`paged_attention` of queries in latent space, for which a latent is key and value at once.

    All heads share it: its first K numbers are the key, its first `value_width` the value. On a TPU
    it is the Pallas kernel of `paged_attention_tpu`, unless XLA's partitioner splits the program.
    """

    def share(latent: Array) -> tuple[Array, Array]:
        shared = latent[:, :, None]
        return shared[..., : q.shape[-1]], shared[..., :value_width]

    def plain(q: Array, pages: Array, places: Places) -> Array:
        return paged_attention(q, pages, places, share, 1, value_width, scale)

    if not alone():
        return plain(q, pages, places)
    kernel = partial(tpu.latent_attention, value_width=value_width, scale=scale)
    return by_platform(
        q, pages, places, tpu=lambda q, pages, at: kernel(q, pages, at.positions, at.table),
        default=plain,
    )  # fmt: skip


def paged_attention_reference(
    q: Float[Array, "B Q H K"],
    latents: Float[Array, "B S W"],
    positions: Int[Array, "B Q"],
    keys_values: KeysValues,
    scale: float,
) -> Float[Array, "B Q H V"]:
    """The meaning of `paged_attention`: each row's latents in order, one softmax over all."""
    k, v = keys_values(latents)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = _product("bqhk,bthk->bhqt", q, k) * scale
    allowed = jnp.arange(latents.shape[1])[None, None] <= positions[:, :, None]
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, MASKED), axis=-1)
    return _product("bhqt,bthv->bqhv", weights, v)


def _side_by_side(q: Float[Array, "B Q H K"], key_heads: int) -> Float[Array, "B J R K"]:
    """Queries of each key head, R = H / J x Q of them: head after head, place after place."""
    batch, queries, heads, width = q.shape
    apart = q.reshape(batch, queries, key_heads, heads // key_heads, width)
    return apart.transpose(0, 2, 3, 1, 4).reshape(batch, key_heads, -1, width)


def _token_by_token(out: Float[Array, "B J R V"], queries: int) -> Float[Array, "B Q H V"]:
    """All heads of each query again."""
    batch, key_heads, _, width = out.shape
    apart = out.reshape(batch, key_heads, -1, queries, width)
    return apart.transpose(0, 3, 1, 2, 4).reshape(batch, queries, -1, width)


def _read(pages: Array, ids: Array) -> Array:
    """The latents of these pages, [B, pages x page size, W]."""
    groups, _, _, width = pages.shape
    ids = ids.reshape(groups, -1, ids.shape[1])
    found = jax.vmap(lambda one, at: one.at[at].get(mode="clip"))(pages, ids)
    return found.reshape(-1, ids.shape[2] * pages.shape[2], width)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
