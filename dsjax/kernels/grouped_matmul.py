"""Multiply rows, grouped by expert, each group with its expert's matrix.

    y_n = W_e x_n     for every row n of group e

Rows arrive sorted by group; group e holds `group_sizes[e]` rows. Any sizes are allowed: empty
groups, or all rows in one. Matrices keep the released layout [experts, out, in].

On a CPU, XLA lowers `ragged_dot` to a product of every group with every row. Here a loop over
blocks of rows does only the useful work: block starts are not aligned to groups, so a group's last
block runs into the next group's rows, whose own blocks come later and overwrite what it left
there. Elsewhere `jax.lax.ragged_dot` is used.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 128
"""Rows of one product on CPU: large enough for full speed, small enough to waste little."""


def grouped_matmul_reference(
    x: Float[Array, "N D"], w: Float[Array, "E F D"], group_sizes: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """The meaning of `grouped_matmul`: every row with its own copy of its matrix."""
    group = jnp.repeat(jnp.arange(w.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    return jnp.einsum("nd,nfd->nf", x, w[group])


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "N D"], w: Float[Array, "E F D"], group_sizes: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """Rows of group e times the transpose of w[e]; `group_sizes` sums to N."""
    return _rows_times(x, w, group_sizes, transpose=True)


def _forward(
    x: Array, w: Array, group_sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(
    saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, None]:
    x, w, group_sizes = saved
    return _rows_times(dy, w, group_sizes, transpose=False), _outer(dy, x, group_sizes), None


grouped_matmul.defvjp(_forward, _backward)


def _rows_times(x: Array, w: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """[N, in] times [E, out, in] transposed, or [N, out] times [E, out, in] as it lies."""
    return lax.platform_dependent(
        x,
        w,
        group_sizes,
        cpu=partial(_rows_times_blocked, transpose=transpose),
        default=partial(_rows_times_ragged, transpose=transpose),
    )


def _outer(dy: Array, x: Array, group_sizes: Array) -> Array:
    """Gradient of the matrices: dy^T x within each group, [E, out, in]."""
    return lax.platform_dependent(
        dy, x, group_sizes, cpu=_outer_blocked, default=_outer_ragged
    )


# ---------------------------------------------------------------------------------------------
# CPU: blocks of rows
# ---------------------------------------------------------------------------------------------


def _rows_times_blocked(x: Array, w: Array, group_sizes: Array, *, transpose: bool) -> Array:
    rows = x.shape[0]
    x = jnp.pad(x, ((0, BLOCK), (0, 0)))
    begins = jnp.cumsum(group_sizes) - group_sizes

    def one_expert(expert: Array, out: Array) -> Array:
        matrix = w[expert].T if transpose else w[expert]

        def one_block(block: Array, out: Array) -> Array:
            begin = begins[expert] + block * BLOCK
            y = lax.dynamic_slice_in_dim(x, begin, BLOCK) @ matrix
            return lax.dynamic_update_slice_in_dim(out, y, begin, 0)

        return lax.fori_loop(0, _blocks(group_sizes[expert]), one_block, out)

    width = w.shape[1] if transpose else w.shape[2]
    out = jnp.zeros((rows + BLOCK, width), x.dtype)
    return lax.fori_loop(0, w.shape[0], one_expert, out)[:rows]


def _outer_blocked(dy: Array, x: Array, group_sizes: Array) -> Array:
    dy = jnp.pad(dy, ((0, BLOCK), (0, 0)))
    x = jnp.pad(x, ((0, BLOCK), (0, 0)))
    begins = jnp.cumsum(group_sizes) - group_sizes

    def one_expert(group: tuple[Array, Array]) -> Array:
        begin_group, size = group

        def one_block(block: Array, total: Array) -> Array:
            begin = begin_group + block * BLOCK
            mine = (block * BLOCK + jnp.arange(BLOCK) < size)[:, None]
            dy_block = jnp.where(mine, lax.dynamic_slice_in_dim(dy, begin, BLOCK), 0)
            return total + dy_block.T @ lax.dynamic_slice_in_dim(x, begin, BLOCK)

        zeros = jnp.zeros((dy.shape[1], x.shape[1]), x.dtype)
        return lax.fori_loop(0, _blocks(size), one_block, zeros)

    return lax.map(one_expert, (begins, group_sizes))


def _blocks(size: Array) -> Array:
    return (size + BLOCK - 1) // BLOCK


# ---------------------------------------------------------------------------------------------
# TPU and GPU: XLA's own
# ---------------------------------------------------------------------------------------------


def _rows_times_ragged(x: Array, w: Array, group_sizes: Array, *, transpose: bool) -> Array:
    return lax.ragged_dot(x, w.swapaxes(1, 2) if transpose else w, group_sizes)


def _outer_ragged(dy: Array, x: Array, group_sizes: Array) -> Array:
    rows_are_ragged = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(dy, x, group_sizes, rows_are_ragged)
