"""Rows brought from where they lie, as Pallas kernels for TPUs from v5e on.

A row of [N, D] is not contiguous in a TPU's memory: eight rows lie in one tile, and two numbers of
bfloat16 in a word belong to two rows. In [N, D / 128, 128] it is, where those are whole tiles, and
one transfer moves it: so rows come and go in that form. Who makes them and who takes them sees
[N, D]; XLA drops a reshape to the form behind one from it.

Rows of the next tile are on their way while those of this one are added up. Indices are our own, so
addresses are not checked: that takes as long as all else of a transfer's start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dsjax.kernels.tpu_core import LANES, MEMORY_LIMIT
from dsjax.kernels.usual import as_a_rule

WHOLE = 8 * LANES
"""Numbers of a row whose lines of 128 are whole tiles, come in so many."""

MEMORY = 32 * 2**20
"""Bytes for the rows of two tiles."""

TALLEST = 64
"""Sums of a tile, at most."""

TOGETHER = 8
"""Rows of a sum that are waited for at a time; and that are sent for in one turn of a loop."""

TAKEN = 128
"""Rows of a tile that are only taken."""

PACKED = 16
"""Rows that are turned from the form at a time: bfloat16 comes in sixteens."""


def unwritten(rows: Array) -> Array:
    """`dsjax.kernels.rows.unwritten` on a TPU."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda rows, out: None,
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        in_specs=[anywhere],
        out_specs=anywhere,
        cost_estimate=_moves(1),
        name="unwritten",
    )(rows)


def take_rows(
    rows: Float[Array, "N D"], index: Int[Array, "M"], count: Int[Array, ""]
) -> Float[Array, "M D"]:
    """`dsjax.kernels.rows.take_rows` on a TPU: of rows in the form, to that of products."""
    (held, width), taken = rows.shape, len(index)
    form = width // LANES, LANES
    tiles = pl.cdiv(taken, TAKEN)
    share = _Shared(tiles)
    # Of two tiles each core has one.
    steps = lax.div(count.astype(jnp.int32) + (2 * TAKEN - 1), 2 * TAKEN)
    index = jnp.pad(index, (0, tiles * TAKEN - taken)).reshape(tiles, 1, TAKEN)
    return pl.pallas_call(
        _take_rows,
        out_shape=jax.ShapeDtypeStruct((taken, width), rows.dtype),
        grid_spec=pl.GridSpec(
            grid=(2, steps),
            in_specs=[
                share.scalars(TAKEN, 0),
                share.scalars(TAKEN, 1),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((TAKEN, width), lambda *at: share.tile(0, *at)[:2]),
            scratch_shapes=[
                pltpu.VMEM((2, TAKEN, *form), rows.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=_PARAMETERS,
        cost_estimate=_moves(2 * as_a_rule(taken) * width * rows.dtype.itemsize),
        name="take_rows",
    )(index, index, rows.reshape(held, *form))


def _take_rows(index: Any, next_index: Any, rows: Any, out: Any, came: Any, sent: Any) -> None:
    """One tile."""
    step, tall = pl.program_id(1), out.shape[0]
    slot = lax.rem(step, 2)

    def bring(index: Any, slot: Any) -> None:
        @pl.loop(0, tall, unroll=TOGETHER)
        def _(line: Array) -> None:
            copy = rows.at[index[0, line]], came.at[slot, line], sent.at[slot]
            pltpu.make_async_copy(*copy).start()

    _one_step_ahead(partial(bring, index, slot), partial(bring, next_index, 1 - slot))
    pltpu.make_async_copy(came.at[slot], came.at[slot], sent.at[slot]).wait()

    @pl.loop(0, tall, step=PACKED)
    def _(at: Array) -> None:
        some = pl.ds(pl.multiple_of(at, PACKED), PACKED)
        out[some] = came[slot, some].reshape(PACKED, out.shape[1])


def _one_step_ahead(this: Callable[[], None], following: Callable[[], None]) -> None:
    """Begin what the next step of a core needs, and in its first step what that one does."""
    step = pl.program_id(1)
    pl.when(step == 0)(this)
    pl.when(step + 1 < pl.num_programs(1))(following)


class _Shared(NamedTuple):
    """So many tiles on two cores that work as one device (v4, v5p), by a grid of (2, half of them).

    Where there is one, it takes both shares. What is not even comes twice.
    """

    tiles: int

    def tile(self, ahead: int, core: Any, step: Any) -> tuple[Any, int, int]:
        """The block of a step's tile, or of the one that the core takes so many steps later."""
        steps = pl.num_programs(1)
        step = jnp.minimum(step + ahead, steps - 1)
        return jnp.minimum(core * steps + step, self.tiles - 1), 0, 0

    def scalars(self, length: int, ahead: int) -> pl.BlockSpec:
        """What a tile has of an array [tiles, 1, length]."""
        block = partial(self.tile, ahead)
        return pl.BlockSpec((None, 1, length), block, memory_space=pltpu.SMEM)


_PARAMETERS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"),
    vmem_limit_bytes=MEMORY_LIMIT,
    disable_bounds_checks=True,
)


def _moves(nbytes: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=0, bytes_accessed=nbytes, transcendentals=0)


def sum_rows(rows: Float[Array, "N D"], at: Int[Array, "T M"]) -> Float[Array, "T D"]:
    """`dsjax.kernels.rows.sum_rows` on a TPU."""
    count, width = rows.shape
    sums, most = at.shape
    form = width // LANES, LANES
    tall = TALLEST
    while tall > TOGETHER and 2 * tall * most * width * rows.dtype.itemsize > MEMORY:
        tall //= 2
    tiles = pl.cdiv(sums, tall)
    share = _Shared(tiles)
    at = jnp.pad(at, ((0, tiles * tall - sums), (0, 0)), constant_values=count)
    counts = (at < count).sum(1, dtype=jnp.int32)

    lists = at.reshape(tiles, 1, -1), counts.reshape(tiles, 1, -1)
    added = pl.pallas_call(
        _sum_rows,
        out_shape=jax.ShapeDtypeStruct((sums, *form), rows.dtype),
        grid_spec=pl.GridSpec(
            grid=(2, pl.cdiv(tiles, 2)),
            in_specs=[
                *(share.scalars(each.shape[2], ahead) for ahead in (0, 1) for each in lists),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((tall, *form), partial(share.tile, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, tall * most, *form), rows.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=_PARAMETERS,
        cost_estimate=_moves(rows.nbytes + sums * width * rows.dtype.itemsize),
        name="sum_rows",
    )(*lists, *lists, rows.reshape(count, *form))
    return added.reshape(sums, width)


def _sum_rows(
    at: Any, counts: Any, next_at: Any, next_counts: Any, rows: Any, out: Any, came: Any, sent: Any
) -> None:
    """One tile of sums; the rows of a sum lie in `came` where its places in `at` are."""
    step, tall = pl.program_id(1), out.shape[0]
    most, slot = came.shape[1] // tall, lax.rem(step, 2)

    def bring(at: Any, counts: Any, slot: Any) -> None:
        @pl.loop(0, tall)
        def _(line: Array) -> None:
            @pl.loop(line * most, line * most + counts[0, line])
            def _(place: Array) -> None:
                copy = rows.at[at[0, place]], came.at[slot, place], sent.at[slot]
                pltpu.make_async_copy(*copy).start()

    def wait(count: int) -> None:
        some = came.at[slot, pl.ds(0, count)]
        pltpu.make_async_copy(some, some, sent.at[slot]).wait()

    _one_step_ahead(
        partial(bring, at, counts, slot), partial(bring, next_at, next_counts, 1 - slot)
    )
    total = lax.fori_loop(0, tall, lambda line, total: total + counts[0, line], 0)
    pl.loop(0, lax.div(total, TOGETHER))(lambda _: wait(TOGETHER))
    pl.loop(0, lax.rem(total, TOGETHER))(lambda _: wait(1))

    @pl.loop(0, tall)
    def _(line: Array) -> None:
        def add(place: Array, total: Array) -> Array:
            return total + came[slot, place].astype(jnp.float32)

        begin, zero = line * most, jnp.zeros(out.shape[1:], jnp.float32)
        total = lax.fori_loop(begin, begin + counts[0, line], add, zero)
        out[line] = total.astype(out.dtype)
