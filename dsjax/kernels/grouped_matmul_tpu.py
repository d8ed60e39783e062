"""`grouped_matmul` and `grouped_outer` as Pallas kernels for TPUs from v5e on.

A visit is a tile of rows and a group that has rows in it. Visits go group by group, so what stands
in the core's memory stays there as long as the group lasts: its matrix over all inputs, read once
whatever the tile; its sum, for outer products. So tiles can be small, and little is computed twice
where groups meet. Every visit is masked: it takes some 1% more of the schedule than a second body
for tiles inside of a group would save, and half the program.

Visits are an idea of megablox (`jax.experimental.pallas.ops.tpu.megablox`), which is not used: it
takes no number of rows that its tile does not divide; it cannot ask for more than the 16 MiB of the
core's memory that a kernel gets by default, so that its tiles are either large, and computed twice
where groups meet, or small, and a matrix is read again for each; and the bytes of a stack that it
adds to are not in what it tells the compiler. tokamax 0.0.12 has the same kernel, which
cannot add to a stack. docs/performance.md compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dsjax.kernels.rows_tpu import WHOLE
from dsjax.kernels.tpu_core import LANES, MEMORY_LIMIT, matrix_unit

MEMORY = 40 * 2**20
"""Bytes that the blocks of a kernel may take, each twice: one is computed while one is moved."""

FEWEST_ROWS = 16
"""Of a tile: bfloat16 comes in sixteens."""

UNROLLED = 2**22
"""Numbers of a matrix in one product, which the compiler writes out step by step."""

SIDE = 1024
"""Columns of a sum's tile on its second side for which the first leaves room."""


class Visits(NamedTuple):
    """Which tile of rows meets which group, in order; what is beyond `count` is not visited."""

    begins: Int[Array, "E+1"]
    """The first row of each group, and the end of the last."""
    group: Int[Array, "V"]
    tile: Int[Array, "V"]
    count: Int[Array, ""]


def plan_visits(sizes: Int[Array, "E"], rows: int, tile: int, every: bool = False) -> Visits:
    """Every pair of a group and a tile of so many rows that share one, by group.

    V = tiles + E - 1, the most there can be.

    Args:
        every: a group without rows is visited too, once.
    """
    tiles = pl.cdiv(rows, tile)
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    begins = ends - sizes.astype(jnp.int32)
    first = begins // tile
    counts = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, int(every))
    visited = jnp.cumsum(counts)
    visit = jnp.arange(tiles + sizes.size - 1, dtype=jnp.int32)
    group = jnp.searchsorted(visited, visit, side="right").astype(jnp.int32)
    group = jnp.minimum(group, sizes.size - 1)
    place = jnp.minimum(first[group] + visit - (visited - counts)[group], tiles - 1)
    return Visits(jnp.append(begins, ends[-1]), group, place, visited[-1])


def rows_of_tile(rows: int, groups: int) -> int:
    """As many as a group has on average, a power of two: few groups share a tile then.

    At most the width of the chip's matrix unit. That many rows keep it busy while it gets its next
    weights, and in an outer product they fill it; more would be computed twice where groups meet.
    """
    tile = matrix_unit()
    while tile > FEWEST_ROWS and tile * groups > rows:
        tile //= 2
    return tile


def columns_of_tile(columns: int, fits: Callable[[int], bool]) -> int:
    """The largest part of the columns that fits, of an even number of parts, equal ones if it can.

    Even, because cores that work as one device (v4, v5p) share the parts between them.
    """
    lanes = pl.cdiv(columns, LANES)
    if lanes == 1:
        return columns
    for parts in range(2, lanes, 2):
        part = pl.cdiv(lanes, parts) * LANES
        if fits(part) and (lanes % parts == 0 or lanes % 2 == 1):
            return part
    return LANES


def grouped_matmul(
    sizes: Array, *factors: tuple[Array, Array], inputs_first: bool, apart: bool
) -> Array:
    """`dsjax.kernels.grouped_matmul.grouped_matmul` on a TPU.

    Rows that are `apart` come in the form of `rows_tpu`, if parts of them are whole pairs of lines.
    """
    (rows, matrices), *_ = factors
    count, inputs = rows.shape
    outputs = matrices.shape[2 if inputs_first else 1]
    size = rows.dtype.itemsize
    tall = rows_of_tile(count, len(sizes))

    def fits(wide: int) -> bool:
        return 2 * size * (len(factors) * inputs * (wide + tall) + tall * wide) <= MEMORY

    def matrix(part: Array, visit: Array, begins: Any, group: Any, tile: Any) -> tuple[Any, ...]:
        return (group[visit], 0, part) if inputs_first else (group[visit], part, 0)

    wide = columns_of_tile(outputs, fits)
    parts = pl.cdiv(outputs, wide)
    visits = plan_visits(sizes, count, tall)
    apart = apart and outputs % WHOLE == 0 and wide % (2 * LANES) == 0
    inside = [
        pl.BlockSpec((tall, inputs), lambda part, visit, _, __, tile: (tile[visit], 0)),
        pl.BlockSpec((None, inputs, wide) if inputs_first else (None, wide, inputs), matrix),
    ]
    out = pl.pallas_call(
        partial(_multiply, inputs_first=inputs_first, apart=apart),
        out_shape=jax.ShapeDtypeStruct(_form(count, outputs, apart), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(parts, visits.count),
            in_specs=inside * len(factors),
            out_specs=pl.BlockSpec(
                _form(tall, wide, apart),
                lambda part, visit, _, __, tile: (tile[visit], part, 0, 0)[: 4 if apart else 2],
            ),
            scratch_shapes=[pltpu.VMEM((tall, wide), rows.dtype)] if apart else [],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=_cost(
            2 * count * inputs * outputs * len(factors),
            len(factors) * (rows.nbytes * parts + matrices.nbytes) + size * count * outputs,
        ),
        name="grouped_matmul",
    )(*visits[:3], *(array for pair in factors for array in pair))
    return out.reshape(count, outputs)


def _cost(flops: int, moved: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _form(rows: int, columns: int, apart: bool) -> tuple[int, ...]:
    """Apart, tiles of two lines: in memory the form of `rows_tpu`, whose tiles have eight.

    So a part of a row has pairs of lines, and not eights.
    """
    return (rows, columns // (2 * LANES), 2, LANES) if apart else (rows, columns)


def _multiply(
    begins: Any, group: Any, tile: Any, *blocks: Any, inputs_first: bool, apart: bool
) -> None:
    """One visit: a part of the columns of those of a tile's rows that are of this group."""
    factors, result, out = blocks[: -2 if apart else -1], blocks[-2 if apart else -1], blocks[-1]
    tall, wide = out.shape
    chunk = wide
    while chunk % (2 * LANES) == 0 and chunk * factors[0].shape[1] > UNROLLED:
        chunk //= 2
    own = _own_rows(pl.program_id(1), begins, group, tile, (tall, chunk))
    contract = (((1,), (0 if inputs_first else 1,)), ((), ()))

    @pl.loop(0, wide, step=chunk)
    def _(at: Array) -> None:
        columns = pl.ds(pl.multiple_of(at, chunk), chunk)
        total = jnp.zeros((tall, chunk), jnp.float32)
        for rows, matrix in zip(factors[::2], factors[1::2], strict=True):
            part = matrix[:, columns] if inputs_first else matrix[columns, :]
            total += lax.dot_general(rows[...], part, contract, preferred_element_type=jnp.float32)
        # What is there is of the groups before, whose visits of this tile came just now.
        there = out[:, columns].astype(jnp.float32)
        out[:, columns] = jnp.where(own, total, there).astype(out.dtype)

    if apart:
        visit, last = pl.program_id(1), pl.num_programs(1) - 1

        @pl.when((visit == last) | (tile[jnp.minimum(visit + 1, last)] != tile[visit]))
        def _() -> None:
            @pl.loop(0, tall, step=FEWEST_ROWS)
            def _(at: Array) -> None:
                some = pl.ds(pl.multiple_of(at, FEWEST_ROWS), FEWEST_ROWS)
                result[some] = out[some].reshape(FEWEST_ROWS, *result.shape[1:])


def _own_rows(visit: Any, begins: Any, group: Any, tile: Any, shape: tuple[int, int]) -> Array:
    """Which of a tile's rows are of the visit's group."""
    row = tile[visit] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= begins[group[visit]]) & (row < begins[group[visit] + 1])


def grouped_outer(
    left: Array, right: Array, sizes: Array, into: Array | None, dtype: DTypeLike
) -> Array:
    """`dsjax.kernels.grouped_matmul.grouped_outer` on a TPU: `into` becomes the result, in place.

    Groups without rows are not visited then.
    """
    (count, first), second = left.shape, right.shape[1]
    dtype = dtype if into is None else into.dtype
    out = jax.ShapeDtypeStruct((len(sizes), first, second), dtype)
    stacks = [] if into is None else [into]
    size, wide_size = left.dtype.itemsize, out.dtype.itemsize * (1 + len(stacks))
    tall = rows_of_tile(count, len(sizes))
    exact = out.dtype == jnp.float32
    each = 2 * wide_size + (0 if exact else 4)

    def fits(high: int, wide: int) -> bool:
        return each * high * wide + 2 * size * tall * (high + wide) <= MEMORY

    high = columns_of_tile(first, lambda high: fits(high, SIDE))
    wide = columns_of_tile(second, lambda wide: fits(high, wide))
    parts = pl.cdiv(first, high), pl.cdiv(second, wide)
    visits = plan_visits(sizes, count, tall, every=into is None)
    stack = pl.BlockSpec((None, high, wide), lambda i, j, visit, _, group, __: (group[visit], i, j))
    return pl.pallas_call(
        partial(_add_outer, added=bool(stacks)),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(*parts, visits.count),
            in_specs=[
                pl.BlockSpec((tall, high), lambda i, j, visit, _, __, tile: (tile[visit], i)),
                pl.BlockSpec((tall, wide), lambda i, j, visit, _, __, tile: (tile[visit], j)),
                *[stack] * len(stacks),
            ],
            out_specs=stack,
            scratch_shapes=[] if exact else [pltpu.VMEM((high, wide), jnp.float32)],
        ),
        input_output_aliases={5: 0} if stacks else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=MEMORY_LIMIT,
        ),
        cost_estimate=_cost(
            2 * left.size * second,
            left.nbytes * parts[1] + right.nbytes * parts[0] + wide_size * math.prod(out.shape),
        ),
        name="grouped_outer",
    )(*visits[:3], left, right, *stacks)


def _add_outer(
    begins: Any, group: Any, tile: Any, left: Any, right: Any, *blocks: Any, added: bool
) -> None:
    """One visit: the outer products of a tile's rows that are of this group.

    Blocks are what is `added` to, if anything, the result's, and a sum apart if that is shorter.
    """
    out, total = blocks[added], blocks[-1]
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    mine = group[visit]

    @pl.when((visit == 0) | (group[jnp.maximum(visit - 1, 0)] != mine))
    def _() -> None:
        total[...] = blocks[0][...].astype(jnp.float32) if added else jnp.zeros_like(total)

    def masked(block: Any) -> Array:
        own = _own_rows(visit, begins, group, tile, block.shape)
        return jnp.where(own, block[...].astype(jnp.float32), 0).astype(block.dtype)

    # Both are: what is beyond the last group's rows is undefined, and 0 times that may be NaN.
    total[...] += lax.dot_general(
        masked(left), masked(right), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )

    if total is not out:

        @pl.when((visit == last) | (group[jnp.minimum(visit + 1, last)] != mine))
        def _() -> None:
            out[...] = total[...].astype(out.dtype)
