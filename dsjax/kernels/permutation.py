"""Bring each expert's rows together and each token's rows back, with gathers only.

A token appears once for each of its K choices. The gradient of gathering by a permutation is
gathering by its inverse; automatic differentiation does not know that and would scatter, which is
slow everywhere and serial on a CPU. So both directions are kept at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.kernels.rows import sum_rows
from dsjax.kernels.usual import usual_turns

CHUNK = 1024
"""Rows whose pairs are added up at a time, of all senders together."""


class Order(NamedTuple):
    """Where each of the N = T x K (token, choice) pairs stands once rows are sorted by expert."""

    pair_of_row: Int[Array, "N"]
    row_of_pair: Int[Array, "T K"]
    sizes: Int[Array, "E"]
    """Rows of each expert; they sum to N."""

    @property
    def token_of_row(self) -> Int[Array, "N"]:
        """The token that row n holds."""
        return self.pair_of_row // self.row_of_pair.shape[1]

    def sum_choices(self, rows: Float[Array, "M D"]) -> Float[Array, "T D"]:
        """The sum of each token's K rows, in float32; `rows` may be longer than N."""
        return sum_rows(rows, self.row_of_pair)


class VisitorOrder(NamedTuple):
    """`Order` for pairs in n lists, as other devices send them with c rows each.

    A row has as many pairs as it brings, one after the other in its sender's list of q, so N = n q
    where rows of K pairs would be n c K. Pairs of no expert fill the lists; they come last.
    """

    token_of_row: Int[Array, "N"]
    """Which of the n x c rows that arrived the n-th pair by expert multiplies."""
    row_of_pair: Int[Array, "n q"]
    sizes: Int[Array, "E"]
    pairs: Int[Array, "n c"]
    """How many each row brings. It is fastest if those with many come first."""
    row_of_choice: Int[Array, "R K"]
    """Where the pairs of each of the R = n x c rows stand; N behind the last one."""

    def sum_choices(self, rows: Float[Array, "M D"]) -> Float[Array, "R D"]:
        """The sum of each row's pairs [n x c, D], in float32; 0 for rows without any."""
        return sum_rows(rows, self.row_of_choice, self._sum_in_chunks)

    def _sum_in_chunks(self, rows: Array, _: Array) -> Array:
        """In chunks of rows, each as deep as its deepest: gathers are hardly more than pairs."""
        senders, room = self.pairs.shape
        chunk = min(max(CHUNK // senders, 1), room)
        begins = jnp.cumsum(self.pairs, axis=1) - self.pairs
        sender = jnp.arange(senders)[:, None]

        def one_chunk(index: Array, y: Array) -> Array:
            at = jnp.minimum(index * chunk, room - chunk)
            begin, pairs = (
                lax.dynamic_slice_in_dim(a, at, chunk, axis=1) for a in (begins, self.pairs)
            )

            def one_choice(k: Array, total: Array) -> Array:
                row = self.row_of_pair[sender, begin + k]
                row = jnp.where(k < pairs, row, rows.shape[0])
                return total + rows.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)

            total = jnp.zeros((senders, chunk, rows.shape[1]), jnp.float32)
            with usual_turns(-(-self.row_of_pair.shape[1] // room)):
                total = lax.fori_loop(0, pairs.max(), one_choice, total)
            return lax.dynamic_update_slice_in_dim(y, total.astype(y.dtype), at, axis=1)

        longest = (self.pairs > 0).sum(1).max()
        y = jnp.zeros((senders, room, rows.shape[1]), rows.dtype)
        with usual_turns(-(-room // chunk)):  # no more than that, as a rule a little less
            y = lax.fori_loop(0, (longest + chunk - 1) // chunk, one_chunk, y)
        return y.reshape(senders * room, rows.shape[1])


def sort_by_expert(experts: Int[Array, "T K"], count: int) -> Order:
    """The stable order that brings the rows of each of `count` experts together.

    Choices of `count` itself are of no expert: they come last, and no size counts them.
    """
    pair_of_row = jnp.argsort(experts.ravel(), stable=True)
    places = jnp.arange(pair_of_row.size, dtype=pair_of_row.dtype)
    row_of_pair = jnp.zeros_like(places).at[pair_of_row].set(places, unique_indices=True)
    sizes = jnp.bincount(experts.ravel(), length=count)
    return Order(pair_of_row, row_of_pair.reshape(experts.shape), sizes)


def sort_visitors(
    experts: Int[Array, "n q"],
    rows: Int[Array, "n q"],
    pairs: Int[Array, "n c"],
    count: int,
    choices: int,
) -> tuple[VisitorOrder, Int[Array, "N"]]:
    """The order by expert of what n devices sent; and which pair each of its rows is.

    Args:
        experts: of each pair, or `count` where there is none.
        rows: of its sender's c rows, the one that brought it.
        pairs: how many pairs each row brings.
        count: experts of this device.
        choices: K, the most pairs that a row brings.
    """
    order = sort_by_expert(experts.reshape(-1, 1), count)
    arrived = rows + pairs.shape[1] * jnp.arange(len(rows))[:, None]
    token = arrived.ravel()[order.pair_of_row]
    row_of_pair = order.row_of_pair.reshape(experts.shape)
    place = jnp.arange(rows.shape[1])[None]
    opens = jnp.pad(rows[:, 1:] != rows[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    choice = place - lax.cummax(jnp.where(opens, place, 0), axis=1)
    slot = jnp.where(experts < count, arrived * choices + choice, pairs.size * choices)
    row_of_choice = jnp.full(pairs.size * choices, token.size, row_of_pair.dtype)
    row_of_choice = row_of_choice.at[slot.ravel()].set(row_of_pair.ravel(), mode="drop")
    row_of_choice = row_of_choice.reshape(-1, choices)
    return VisitorOrder(token, row_of_pair, order.sizes, pairs, row_of_choice), order.pair_of_row
