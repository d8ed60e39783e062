"""Bring each expert's rows together and each token's rows back, with gathers only.

A token appears once for each of its K choices. The gradient of gathering by a permutation is
gathering by its inverse; automatic differentiation does not know that and would scatter, which is
slow everywhere and serial on a CPU. So both directions are kept at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def sort_by_expert(experts: Int[Array, "T K"], count: int) -> Order:
    """The stable order that brings the rows of each of `count` experts together."""
    pair_of_row = jnp.argsort(experts.ravel(), stable=True)
    places = jnp.arange(pair_of_row.size, dtype=pair_of_row.dtype)
    row_of_pair = jnp.zeros_like(places).at[pair_of_row].set(places, unique_indices=True)
    sizes = jnp.bincount(experts.ravel(), length=count)
    return Order(pair_of_row, row_of_pair.reshape(experts.shape), sizes)


def sum_choices(rows: Float[Array, "M D"], order: Order) -> Float[Array, "T D"]:
    """The sum of each token's K rows, in float32; `rows` may be longer than N.

    One gather a choice, added as they come: the array of all pairs is never made.
    """
    choices = order.row_of_pair.shape[1]
    total = jnp.zeros((), jnp.float32)
    for k in range(choices):
        total = total + rows[order.row_of_pair[:, k]].astype(jnp.float32)
    return total.astype(rows.dtype)
