"""Products of groups of rows, each group with a matrix of its own; and the matrices' gradient.

    out[n] = rows[n] @ matrices[g]                     (`grouped_matmul`)
    out[g] = into[g] + sum_n left[n] right[n]^T        (`grouped_outer`),  g = the group of row n

Groups lie one after the other: `sizes[g]` rows each, none left out. There may be more rows than
groups have; what a product makes of them is undefined, and they may hold anything.

On a TPU both are Pallas kernels. A visit is a tile of rows and one of the groups that it has rows
of; tiles that lie in one group are multiplied as they are, others are masked. What stays in the
core's memory: a group's matrix over all of its inputs, so that each is read once however small
tiles are, and small tiles waste little where groups meet; and a group's sum.

Why not jax's own `megablox`, which is where the idea of visits is from: it takes no number of rows
that its tile does not divide; it masks every tile, in float32; it has no say in how much of the
core's memory it gets, which leaves it tiles that read matrices once a tile of rows; and what is
added to is missing in what it tells the compiler. tokamax's kernel (0.0.12) is the same one,
and adds to nothing.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

TILE = 256
"""Rows of a visit. Groups that end anywhere cost half a tile each, of their own matrices' work."""

CHUNK = 512
"""Columns of one product inside of a visit: what the compiler unrolls."""


class Visits(NamedTuple):
    """Which tile of rows meets which group, in order; the first `count` of them are real."""

    begins: Int[Array, "E+1"]
    """The first row of each group, and the end of the last one."""
    group: Int[Array, "V"]
    tile: Int[Array, "V"]
    count: Int[Array, ""]


def plan_visits(sizes: Int[Array, "E"], rows: int, *, empty: bool) -> Visits:
    """A visit for every group and tile that share a row; `empty`: and one for groups without."""
    tiles, groups = pl.cdiv(rows, TILE), sizes.size
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    begins = ends - sizes.astype(jnp.int32)
    first = jnp.minimum(begins // TILE, tiles - 1)
    counts = jnp.where(sizes > 0, (ends - 1) // TILE - first + 1, int(empty)).astype(jnp.int32)
    last = jnp.cumsum(counts)
    visit = jnp.arange(tiles + groups - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, visit, side="right"), groups - 1).astype(jnp.int32)
    tile = first[group] + visit - (last - counts)[group]
    begins = jnp.concatenate([begins, ends[-1:]])
    return Visits(begins, group, jnp.minimum(tile, tiles - 1), last[-1])


def _matmul_kernel(begins, group, tile, rows, matrix, out, *, transposed):
    visit = pl.program_id(1)
    begin, end = begins[group[visit]], begins[group[visit] + 1]
    first = tile[visit] * TILE
    inside = (begin <= first) & (first + TILE <= end)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    width = out.shape[1]
    chunk = math.gcd(width, CHUNK)

    def product(at):
        columns = pl.ds(at, chunk)
        part = matrix[columns, :] if transposed else matrix[:, columns]
        return lax.dot_general(rows[...], part, contract, preferred_element_type=jnp.float32)

    def all_chunks(store):
        @pl.loop(0, width // chunk)
        def _(c):
            store(pl.multiple_of(c * chunk, chunk))

    @pl.when(inside)
    def _():
        def store(at):
            out[:, pl.ds(at, chunk)] = product(at).astype(out.dtype)
        all_chunks(store)

    @pl.when(~inside)
    def _():
        def store(at):
            row = first + lax.broadcasted_iota(jnp.int32, (TILE, chunk), 0)
            mine = (row >= begin) & (row < end)
            old = out[:, pl.ds(at, chunk)].astype(jnp.float32)
            out[:, pl.ds(at, chunk)] = jnp.where(mine, product(at), old).astype(out.dtype)
        all_chunks(store)


def _split(size, count=2):
    return pl.cdiv(pl.cdiv(size, count), 128) * 128 if size > 128 else size


def matmul_tpu(rows, matrices, sizes, transposed, interpret=False):
    n, k = rows.shape
    width = matrices.shape[1 if transposed else 2]
    tile = _split(width)
    tiles = pl.cdiv(width, tile)
    visits = plan_visits(sizes, n, empty=False)
    block = (None, tile, k) if transposed else (None, k, tile)
    return pl.pallas_call(
        partial(_matmul_kernel, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((n, width), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles, visits.count),
            in_specs=[
                pl.BlockSpec((TILE, k), lambda j, v, begins, group, tile: (tile[v], 0)),
                pl.BlockSpec(block, lambda j, v, begins, group, tile: (group[v], j, 0) if transposed else (group[v], 0, j)),
            ],
            out_specs=pl.BlockSpec((TILE, tile), lambda j, v, begins, group, tile: (tile[v], j)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=80 * 2**20
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*visits[:3], rows, matrices)


def _outer_kernel(begins, group, tile, left, right, into, out, total):
    visit = pl.program_id(2)
    mine = group[visit]
    begin, end = begins[mine], begins[mine + 1]
    first = tile[visit] * TILE
    inside = (begin <= first) & (first + TILE <= end)
    opens = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != mine)
    last = pl.num_programs(2) - 1
    closes = (visit == last) | (group[jnp.minimum(visit + 1, last)] != mine)

    @pl.when(opens)
    def _():
        total[...] = into[...].astype(jnp.float32)

    def add(a, b):
        total[...] += lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when(inside)
    def _():
        add(left[...], right[...])

    @pl.when(~inside & (end > begin))
    def _():
        def kept(block):
            row = first + lax.broadcasted_iota(jnp.int32, block.shape, 0)
            return jnp.where((row >= begin) & (row < end), block[...].astype(jnp.float32), 0).astype(block.dtype)
        add(kept(left), kept(right))

    @pl.when(closes)
    def _():
        out[...] = total[...].astype(out.dtype)


def outer_tpu(left, right, sizes, into, tiles, interpret=False):
    n, a = left.shape
    b = right.shape[1]
    ta, tb = tiles
    visits = plan_visits(sizes, n, empty=True)
    stack = pl.BlockSpec((None, ta, tb), lambda i, j, v, begins, group, tile: (group[v], i, j))
    return pl.pallas_call(
        _outer_kernel,
        out_shape=jax.ShapeDtypeStruct(into.shape, into.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(a, ta), pl.cdiv(b, tb), visits.count),
            in_specs=[
                pl.BlockSpec((TILE, ta), lambda i, j, v, begins, group, tile: (tile[v], i)),
                pl.BlockSpec((TILE, tb), lambda i, j, v, begins, group, tile: (tile[v], j)),
                stack,
            ],
            out_specs=stack,
            scratch_shapes=[pltpu.VMEM((ta, tb), jnp.float32)],
        ),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=80 * 2**20
        ),
        interpret=interpret,
        name="grouped_outer",
    )(*visits[:3], left, right, into)
