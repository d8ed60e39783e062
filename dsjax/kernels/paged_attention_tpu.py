"""Absorbed decode attention over pages of latents as a Pallas kernel for TPUs from v5e on.

A row's pages come from memory once, by the numbers in its table, for all of its queries and heads,
which are rows of one product; the softmax is put together as they come, in float32. Rows end where
their longest query does, so that unequal ones cost what they read. While one stretch is computed
the next one comes, also from one row to the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dsjax.kernels.attention import MASKED
from dsjax.kernels.tpu_core import LANES, LEAST_ROWS, left_in_memory

KEYS = 512
"""Keys of one stretch."""


def latent_attention(
    q: Array, pages: Array, positions: Array, table: Array, *, value_width: int, scale: float
) -> Array:
    """`dsjax.kernels.paged_attention.latent_attention` on a TPU."""
    batch, queries, heads, width = q.shape
    groups, count, size, wide = pages.shape
    stretch = min(max(KEYS // size, 1), table.shape[1])
    group = jnp.arange(batch, dtype=jnp.int32) // (batch // groups)
    table = jnp.minimum(table, count - 1) + group[:, None] * count
    lengths = positions.max(1) + 1
    rows = queries * heads

    def mine(row: Any, *_: Any) -> tuple[Any, ...]:
        return row, 0, 0

    lanes = pl.cdiv(wide, LANES) * LANES
    keys = batch * table.shape[1] * size
    out = pl.pallas_call(
        partial(_attend, heads=heads, scale=scale),
        out_shape=jax.ShapeDtypeStruct((batch, rows, value_width), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[
                pl.BlockSpec((None, rows, width), mine),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec((None, rows, value_width), mine),
            scratch_shapes=[
                pltpu.VMEM((2, stretch * size, wide), pages.dtype),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(  # as if all rows were full
            flops=2 * max(rows, LEAST_ROWS) * keys * (lanes + value_width),
            bytes_accessed=keys * lanes * pages.dtype.itemsize + 2 * q.nbytes,
            transcendentals=rows * keys,
        ),
        name="latent_attention",
    )(table, lengths, positions, q.reshape(batch, rows, width),
      left_in_memory(pages.reshape(groups * count, size, wide)))  # fmt: skip
    return out.reshape(batch, queries, heads, value_width)


def _attend(
    table: Any, lengths: Any, positions: Any, q: Any, pages: Any, out: Any,
    buffer: Any, turns: Any, arrived: Any, *, heads: int, scale: float,
) -> None:  # fmt: skip
    """One row. `turns` counts stretches of all rows: they take the two halves of `buffer` in turn.

    What a stretch does not fill is of stretches before, whose weights are zero; so nothing there
    may be NaN.
    """
    row, size, keys = pl.program_id(0), pages.shape[1], buffer.shape[1]

    def stretches(row: Any) -> Any:
        return pl.cdiv(lengths[row], keys)

    def move(row: Any, stretch: Any, half: Any, do: Any) -> None:
        for number in range(keys // size):
            page = stretch * (keys // size) + number

            @pl.when(page * size < lengths[row])
            def _(page: Any = page, place: int = number * size) -> None:
                there = buffer.at[half, pl.ds(place, size)]
                do(pltpu.make_async_copy(pages.at[table[row, page]], there, arrived.at[half]))

    @pl.when(row == 0)
    def _() -> None:
        buffer[...] = jnp.zeros_like(buffer)
        turns[0] = 0
        move(0, 0, 0, lambda copy: copy.start())

    place = _places_of_rows(positions, row, q.shape[0], heads)

    def one_stretch(stretch: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        half = (turns[0] + stretch) & 1
        last = stretch == stretches(row) - 1
        following = jnp.where(last, row + 1, row)

        @pl.when(following < pl.num_programs(0))
        def _() -> None:
            move(following, jnp.where(last, 0, stretch + 1), 1 - half, lambda copy: copy.start())

        move(row, stretch, half, lambda copy: copy.wait())
        latent = buffer[half].astype(q.dtype)
        reach = stretch * keys + lax.broadcasted_iota(jnp.int32, (q.shape[0], keys), 1)
        return _fold(q[...], latent, reach <= place, carry, out.shape[1], scale)

    none = jnp.zeros((q.shape[0], 1))
    start = none + MASKED, none, jnp.zeros(out.shape, jnp.float32)
    _, total, mixed = lax.fori_loop(0, stretches(row), one_stretch, start)
    turns[0] += stretches(row)
    out[...] = (mixed / total).astype(out.dtype)


def _places_of_rows(positions: Any, row: Any, count: int, heads: int) -> Array:
    """How far each row of a product reaches, [count, 1]: heads of a query follow one another."""
    number = lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    place = jnp.full((count, 1), positions[row, 0])
    for query in range(1, count // heads):
        place = jnp.where(number >= query * heads, positions[row, query], place)
    return place


def _fold(
    q: Array, latent: Array, allowed: Array, carry: tuple[Array, Array, Array], values: int,
    scale: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Maximum, sum and mixed values with another stretch of keys."""
    maximum, total, mixed = carry
    apart = (slice(None, values), slice(values, q.shape[1]))  # Parts that begin at a whole lane.
    scores = sum(
        lax.dot_general(
            q[:, part], latent[:, part], (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        for part in apart
    )  # fmt: skip
    scores = jnp.where(allowed, scores * scale, MASKED)
    higher = jnp.maximum(maximum, scores.max(1, keepdims=True))
    weights = jnp.exp(scores - higher)
    shrink = jnp.exp(maximum - higher)
    added = lax.dot_general(
        weights.astype(latent.dtype), latent[:, :values], (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return higher, total * shrink + weights.sum(1, keepdims=True), mixed * shrink + added
