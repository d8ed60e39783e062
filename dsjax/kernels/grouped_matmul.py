"""Products of groups of rows, each group with a matrix of its own; and the matrices' gradient.

    out_n = rows_n W_g + rows'_n W'_g + ...          `grouped_matmul`, g the group of row n
    W_g   = into_g + sum over g's rows of a_n b_n^T  `grouped_outer`

Groups lie one after the other, `sizes` rows each; an empty one is fine, and so are rows beyond the
last group: they may hold anything, and what a product makes of them is undefined. Products are
summed in float32.

On a TPU both are the Pallas kernels of `grouped_matmul_tpu`. Elsewhere, and where XLA's partitioner
splits the program, `jax.lax.ragged_dot` multiplies, and the matrices' gradient, which XLA expands
to a product of every group with every row, goes block by block.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.kernels import grouped_matmul_tpu as tpu
from dsjax.kernels.blocks import fold_blocks, fold_experts
from dsjax.kernels.tpu_core import alone
from sharding.platform import by_platform

Factors = tuple[Float[Array, "N I"], Float[Array, "E A B"]]
"""Rows, sorted by group, and the matrices of all groups; in one dtype."""


def grouped_matmul_reference(
    sizes: Int[Array, "E"], *factors: Factors, inputs_first: bool
) -> Float[Array, "N O"]:
    """The meaning of `grouped_matmul`: every row with its own copy of a matrix; 0 beyond groups."""
    places = jnp.arange(len(factors[0][0]))
    group = jnp.searchsorted(jnp.cumsum(sizes), places, side="right")
    letters = "ni,nio->no" if inputs_first else "ni,noi->no"
    out = sum(
        jnp.einsum(letters, rows, matrices.at[group].get(mode="clip")) for rows, matrices in factors
    )
    return jnp.where((group < len(sizes))[:, None], out, 0)


def grouped_outer_reference(
    left: Float[Array, "N A"],
    right: Float[Array, "N B"],
    sizes: Int[Array, "E"],
    into: Float[Array, "E A B"],
) -> Float[Array, "E A B"]:
    """The meaning of `grouped_outer`: every row's outer product, those of a group added up."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(left)), side="right")
    products = jnp.einsum("na,nb->nab", left, right, preferred_element_type=jnp.float32)
    return into.astype(jnp.float32).at[group].add(products, mode="drop").astype(into.dtype)


def grouped_matmul(
    sizes: Int[Array, "E"], *factors: Factors, inputs_first: bool, apart: bool = False
) -> Float[Array, "N O"]:
    """Each row times the matrix of its group, in the dtype of the rows; the sum of such products.

    Args:
        sizes: rows of each group, N in all or fewer; what is beyond is undefined in the result.
        factors: one product each, all of the same shapes.
        inputs_first: matrices are [E, I, O]; otherwise [E, O, I].
        apart: rows of the result will be brought one by one (`dsjax.kernels.rows`).
    """

    def ragged(sizes: Array, *factors: tuple[Array, Array]) -> Array:
        first, *others = (
            lax.ragged_dot(rows, matrices if inputs_first else matrices.swapaxes(1, 2), sizes)
            for rows, matrices in factors
        )
        return sum(others, start=first)

    if not alone():
        return ragged(sizes, *factors)
    pallas = partial(tpu.grouped_matmul, inputs_first=inputs_first, apart=apart)
    return by_platform(sizes, *factors, tpu=pallas, default=ragged)


def grouped_outer(
    left: Float[Array, "N A"],
    right: Float[Array, "N B"],
    sizes: Int[Array, "E"],
    into: Float[Array, "E A B"] | None,
    dtype: DTypeLike,
) -> Float[Array, "E A B"]:
    """`into` and the outer products left_n right_n^T of each group's rows.

    The gradient of [E, out, in] for `left` the gradient of the result and `right` the rows, and of
    [E, in, out] for the two the other way round.

    Args:
        left: sorted by group.
        right: in the dtype of `left`.
        sizes: rows of each group; rows beyond may be anything, not finite even.
        into: what is added to; XLA reuses its memory if it can. None is zeros.
        dtype: of the result where nothing is added to; else it has that of `into`.
    """
    blocks = partial(_outer_in_blocks, dtype=dtype)
    if not alone():
        return blocks(left, right, sizes, into)
    pallas = partial(tpu.grouped_outer, dtype=dtype)
    return by_platform(left, right, sizes, into, tpu=pallas, default=blocks)


OUTER_BLOCKS = (2048, 256)
"""Rows of one product for the matrices' gradients: many, since each reads and writes the sum."""


def _outer_in_blocks(
    left: Array, right: Array, sizes: Array, into: Array | None, dtype: DTypeLike
) -> Array:
    if into is None:
        into = jnp.zeros((len(sizes), left.shape[1], right.shape[1]), dtype)

    def one_expert(expert: Array, begin: Array, size: Array, stack: Array) -> Array:
        def one_block(at: Array, count: int, total: Array) -> Array:
            first = jnp.minimum(at, len(right) - count)
            row = first + jnp.arange(count)
            mine = ((row >= at) & (row < begin + size))[:, None]
            # Both: what is beyond the last expert's rows is undefined, and 0 times that may be NaN.
            a, b = (
                jnp.where(mine, lax.dynamic_slice_in_dim(rows, first, count), 0)
                for rows in (left, right)
            )
            return total + lax.dot_general(
                a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        blocks = tuple(min(count, len(right)) for count in OUTER_BLOCKS)
        total = fold_blocks(begin, size, blocks, one_block, stack[expert].astype(jnp.float32))
        return stack.at[expert].set(total.astype(stack.dtype))

    return fold_experts(sizes, one_expert, into)
