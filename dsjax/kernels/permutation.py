"""Send tokens to their experts' rows and back, with gathers in both directions.

The gradient of a permutation is the inverse permutation. Automatic differentiation does not know
that a gather is one and would scatter, which is slow everywhere and serial on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Permutation(NamedTuple):
    """Where each of the T x K (token, choice) pairs stands once rows are sorted by expert."""

    pair_of_row: Int[Array, "N"]
    row_of_pair: Int[Array, "N"]


def sort_by_expert(experts: Int[Array, "T K"]) -> Permutation:
    """The stable order that brings every expert's rows together."""
    pair_of_row = jnp.argsort(experts.ravel(), stable=True)
    row_of_pair = jnp.zeros_like(pair_of_row).at[pair_of_row].set(
        jnp.arange(pair_of_row.size, dtype=pair_of_row.dtype), unique_indices=True
    )
    return Permutation(pair_of_row, row_of_pair)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_rows(x: Float[Array, "T D"], order: Permutation, choices: int) -> Float[Array, "N D"]:
    """Row n holds the token of the pair that stands at n; each token appears `choices` times."""
    return x[order.pair_of_row // choices]


@jax.custom_vjp
def to_pairs(rows: Float[Array, "N D"], order: Permutation) -> Float[Array, "N D"]:
    """Undo the sorting: pair t * K + k holds what expert choice k of token t made."""
    return rows[order.row_of_pair]


def _to_rows_forward(x: Array, order: Permutation, choices: int) -> tuple[Array, Permutation]:
    return to_rows(x, order, choices), order


def _to_rows_backward(choices: int, order: Permutation, d: Array) -> tuple[Array, None]:
    return d[order.row_of_pair].reshape(-1, choices, d.shape[-1]).sum(1), None


def _to_pairs_forward(rows: Array, order: Permutation) -> tuple[Array, Permutation]:
    return to_pairs(rows, order), order


def _to_pairs_backward(order: Permutation, d: Array) -> tuple[Array, None]:
    return d[order.pair_of_row], None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)
to_pairs.defvjp(_to_pairs_forward, _to_pairs_backward)
