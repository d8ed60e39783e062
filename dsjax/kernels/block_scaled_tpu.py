"""Products with matrices in DeepSeek's FP8 as a Pallas kernel for TPUs from v5e on.

    out = x W,   W = w_e4m3 * s, one s for each block of 128 x 128

Few rows are multiplied by a matrix as fast as it is read. So it is read once, in FP8, and becomes
bfloat16 inside of the core, which is exact; a block's scale multiplies what the block adds to the
sum, in float32. (Widened by XLA, a matrix goes through memory three times, at five times the
bytes.) A chip without FP8 of its own, v5e, widens a block in 16 cycles of its vector unit, and
takes 30 to read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dsjax.kernels.tpu_core import LANES, MEMORY_LIMIT, left_in_memory
from dsjax.numerics.fp8_host import BLOCK

TALL = 256
"""Rows of a tile at most."""

TILE = 2**22
"""Bytes of a matrix that are moved at a time."""

WIDE = 512
"""Columns whose products are computed side by side, so that one need not wait for another."""

SUM = 2**14
"""Numbers of a sum that stays in registers while blocks are added: a quarter of them."""

WIDENED_ROWS = 106
"""A tile of weights in FP8 takes vector units as long as so many rows take matrix units, at the 68%
of their peak at which `dsjax.planning` counts kernels: 39 cycles of v5e's final schedule."""


def block_scaled_matmul(x: Array, matrix: Array, scales: Array, first: tuple[Any, Any]) -> Array:
    """`dsjax.kernels.block_scaled.block_scaled_matmul` on a TPU."""
    rows, inputs = x.shape
    outputs, tall = matrix.shape[1], min(rows, TALL)
    wide = min(max(TILE // inputs // WIDE, 1) * WIDE, pl.cdiv(outputs, LANES) * LANES)
    begin = jnp.stack([jnp.asarray(place, jnp.int32) for place in first])
    return pl.pallas_call(
        _multiply,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(outputs, wide), pl.cdiv(rows, tall)),
            in_specs=[
                pl.BlockSpec((tall, inputs), lambda column, row, _: (row, 0)),
                pl.BlockSpec((inputs, wide), lambda column, row, _: (0, column)),
                pl.BlockSpec(memory_space=pltpu.SMEM),
            ],
            out_specs=pl.BlockSpec((tall, wide), lambda column, row, _: (row, column)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * max(rows, WIDENED_ROWS) * inputs * outputs,
            bytes_accessed=x.nbytes + matrix.nbytes + scales.nbytes + rows * outputs * 2,
            transcendentals=0,
        ),
        name="block_scaled_matmul",
    )(begin, x, left_in_memory(matrix), scales)


def _multiply(begin: Any, x: Any, matrix: Any, scales: Any, out: Any) -> None:
    """One tile of the result."""
    wide = out.shape[1]
    first = begin[1] + pl.program_id(0) * pl.cdiv(wide, BLOCK)
    last = scales.shape[1] - 1  # The last tile may reach beyond the matrix.

    def one_part(at: Any, width: int) -> None:
        part = pl.ds(at, width)

        def scale(i: Any, o: int) -> Array:
            return scales[begin[0] + i, jnp.minimum(first + lax.div(at, BLOCK) + o, last)]

        shape = x.shape[0], matrix.shape[0], width
        factor = (lambda inputs: matrix[inputs, part], scale)
        (total,) = scaled_products(lambda inputs: x[:, inputs], [factor], shape)
        out[:, part] = total.astype(out.dtype)

    in_parts(x.shape[0], wide, one_part)


def in_parts(rows: int, wide: int, one_part: Callable[[Any, int], None]) -> None:
    """Do all of so many columns, as many at a time as leave the sum in registers."""
    lanes = max(min(SUM // rows, WIDE) // LANES, 1)
    if wide % LANES:  # a whole row that is narrow, or of odd width
        one_part(0, wide)
        return
    width = math.gcd(wide // LANES, lanes) * LANES

    @pl.loop(0, wide, step=width)
    def _(at: Array) -> None:
        one_part(pl.multiple_of(at, width), width)


Factor = tuple[Callable[[Any], Array], Callable[[Any, int], Array] | None]
"""From a slice of the inputs to [so many, columns], in FP8 or as what it is multiplied by; and from
a block of inputs and one of columns to its scale, None where there is none."""


def scaled_products(
    left: Callable[[Any], Array],
    factors: Sequence[Factor],
    shape: tuple[int, int, int],
    *,
    unrolled: bool = False,
) -> tuple[Array, ...]:
    """Rows times the columns of each factor in float32, a block of inputs after the other.

    Args:
        left: from a slice of the inputs to [rows, so many].
        factors: what is multiplied, side by side.
        shape: rows, inputs, columns.
        unrolled: blocks are few, and their places plain numbers.
    """
    rows, inputs, columns = shape

    def one_block(index: Any, size: int, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        begin = index * BLOCK
        at = pl.ds(begin if isinstance(begin, int) else pl.multiple_of(begin, BLOCK), size)
        a = left(at)
        return tuple(
            total + _product(a, right(at), scale, index)
            for (right, scale), total in zip(factors, totals, strict=True)
        )

    whole, rest = divmod(inputs, BLOCK)
    totals = (jnp.zeros((rows, columns), jnp.float32),) * len(factors)
    if unrolled or whole == 0:
        for index in range(whole):
            totals = one_block(index, BLOCK, totals)
    else:
        totals = lax.fori_loop(
            0, whole, lambda index, sums: one_block(index, BLOCK, sums), totals,
            unroll=2 - whole % 2,
        )  # fmt: skip
    return one_block(whole, rest, totals) if rest else totals


def _product(a: Array, b: Array, scale: Callable[[Any, int], Array] | None, index: Any) -> Array:
    """A block of inputs times all columns, each block of which has its scale."""
    part = lax.dot_general(
        a, b.astype(a.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    if scale is None:
        return part
    sides = range(pl.cdiv(part.shape[1], BLOCK))
    return jnp.concatenate(
        [part[:, i * BLOCK : (i + 1) * BLOCK] * scale(index, i) for i in sides], axis=1
    )
