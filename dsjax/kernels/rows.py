"""Rows brought from where they lie: on the way to the experts, there, and back as sums.

    rows_n = x[index_n]        y_t = sum_m rows[at_tm]

On a TPU those are the Pallas kernels of `rows_tpu`, which read each row once and write each result
once. XLA would write the rows of a sum, read them again, and carry sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.kernels import rows_tpu as tpu
from dsjax.kernels.tpu_core import LANES, alone
from sharding.platform import by_platform


def take_rows(
    rows: Float[Array, "N D"], index: Int[Array, "M"], count: Int[Array, ""]
) -> Float[Array, "M D"]:
    """`rows[index]`, of rows that have come as `send_rows` gives them.

    Args:
        count: how many there are to take; what is behind them in the result is undefined.
    """

    def plain(rows: Array, index: Array, _: Array) -> Array:
        return rows[index]

    if not alone() or rows.shape[1] % tpu.WHOLE:
        return plain(rows, index, count)
    return by_platform(rows, index, count, tpu=tpu.take_rows, default=plain)


def send_rows(x: Float[Array, "T D"], index: Int[Array, "n c"]) -> Float[Array, "n c D"]:
    """`x[index]`, by way of the form in which rows travel on a TPU: fewer are turned to it."""
    width = x.shape[1]
    form = (width // LANES, LANES) if width % tpu.WHOLE == 0 else (width,)
    return x.reshape(len(x), *form)[index].reshape(*index.shape, width)


def unwritten(rows: Array) -> Array:
    """Memory for as many rows, which may hold anything.

    On a TPU by a kernel that does nothing with `rows`: what needs no layer's numbers would be made
    once for all layers, be kept, and be copied wherever one writes into it.
    """

    def empty(rows: Array) -> Array:
        return lax.empty(rows.shape, rows.dtype)

    return by_platform(rows, tpu=tpu.unwritten, default=empty)


def sum_rows_reference(rows: Float[Array, "N D"], at: Int[Array, "T M"]) -> Float[Array, "T D"]:
    """The meaning of `sum_rows`, a column of `at` after the other."""
    total = jnp.zeros((), jnp.float32)
    for column in range(at.shape[1]):
        row = rows.at[at[:, column]].get(mode="fill", fill_value=0)
        total = total + row.astype(jnp.float32)
    return total.astype(rows.dtype)


def sum_rows(
    rows: Float[Array, "N D"],
    at: Int[Array, "T M"],
    elsewhere: Callable[[Array, Array], Array] = sum_rows_reference,
) -> Float[Array, "T D"]:
    """The sum, in float32, of the rows that each line of `at` names; 0 for a line without any.

    Args:
        rows: rows that no line names may hold anything.
        at: N where there is no row, which is behind all that are.
        elsewhere: the same on other backends, of `rows` and `at`.
    """
    if not alone() or rows.shape[1] % tpu.WHOLE:
        return elsewhere(rows, at)
    return by_platform(rows, at, tpu=tpu.sum_rows, default=elsewhere)
