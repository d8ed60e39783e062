"""The routed experts for few tokens as one Pallas kernel for TPUs from v5e on.

    y_t = sum_k g_tk W_down^e (silu(W_gate^e x_t) * W_up^e x_t),   e = experts_tk

Decoding is reading weights: the kernel goes through the chosen experts' matrices once, a part of
their width after the other, in FP8 where they are, and skips the experts that nobody chose. All
tokens stay in the core. Which of them an expert has is a matrix of zeros and ones, so its rows are
brought together, and put back where they belong, by products; nothing is sorted, no row goes
through memory, and any number of tokens may choose the same expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dsjax.kernels.block_scaled_tpu import WIDENED_ROWS, in_parts, scaled_products
from dsjax.kernels.swiglu import SwiGLU
from dsjax.kernels.tpu_core import LANES, LEAST_ROWS, MEMORY_LIMIT, left_in_memory

TOKENS = 256
"""So many are in the core at a time."""

CHUNK = 32
"""Rows of an expert that are multiplied together: more than most have."""

TILE = 6 * 2**20
"""Bytes of a part of an expert's three matrices."""


class Visitors(NamedTuple):
    """Who comes to which expert."""

    sizes: Int[Array, "E"]
    """Tokens of each expert."""
    read: Int[Array, "E"]
    """Whose matrices are in the core while it is an expert's turn: its own, or where nobody chose
    it, those that are there already."""
    place: Int[Array, "E T"]
    """Of a token among those of an expert; -1 where it has not chosen it."""
    gate: Float[Array, "E T"]


def sort_out(experts: Int[Array, "T K"], gates: Float[Array, "T K"], count: int) -> Visitors:
    """Who comes to which of `count` experts; other numbers are of nobody's."""
    chosen = experts[:, :, None] == jnp.arange(count)[None, None]
    mine = chosen.any(1).T
    sizes = mine.sum(1, dtype=jnp.int32)
    number = jnp.arange(count, dtype=jnp.int32)
    before = lax.cummax(jnp.where(sizes > 0, number, -1))
    read = jnp.where(before < 0, jnp.argmax(sizes > 0).astype(jnp.int32), before)
    place = jnp.where(mine, jnp.cumsum(mine, axis=1, dtype=jnp.int32) - 1, -1)
    gate = jnp.where(chosen, gates[:, :, None], 0).sum(1).T
    return Visitors(sizes, read, place, gate.astype(jnp.float32))


def apply_experts(
    x: Array, weights: SwiGLU, scales: SwiGLU | None, experts: Array, gates: Array
) -> Array:
    """`dsjax.kernels.experts_inference.apply_experts` on a TPU."""
    tokens = len(x)
    some = min(tokens, TOKENS)
    fill = -tokens % some

    def apart(array: Array, nothing: int) -> Array:
        padded = jnp.pad(array, ((0, fill), (0, 0)), constant_values=nothing)
        return padded.reshape(-1, some, array.shape[1])

    visitors = jax.vmap(partial(sort_out, count=len(weights.gate)))(
        apart(experts, -1), apart(gates, 0)
    )
    return _apply(apart(x, 0).reshape(-1, x.shape[1]), some, weights, scales, visitors)[:tokens]


def width_of_part(width: int, bytes_each: int) -> int:
    """Of an expert's width what is moved at a time: whole lanes that divide it, or all of it."""
    if width % LANES:
        return width
    lanes = width // LANES
    most = max(TILE // bytes_each // LANES, 1)
    return max(n for n in range(1, lanes + 1) if lanes % n == 0 and (n <= most or n == 1)) * LANES


def _apply(
    x: Array, tokens: int, weights: SwiGLU, scales: SwiGLU | None, visitors: Visitors
) -> Array:
    """So many tokens at a time, those of each part by its own `Visitors`."""
    inputs, (count, _, width) = x.shape[1], weights.gate.shape
    wide = width_of_part(width, 3 * inputs * weights.gate.dtype.itemsize)
    grid = len(x) // tokens, count, width // wide
    mine = pl.BlockSpec((tokens, inputs), lambda some, *_: (some, 0))
    whose = pl.BlockSpec((None, count, tokens), lambda some, *_: (some, 0, 0))
    read = (*weights, *(scales or ()))
    rows = LEAST_ROWS if scales is None else WIDENED_ROWS
    tall = pl.cdiv(tokens, CHUNK) * CHUNK
    return pl.pallas_call(
        _visit,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[mine, whose, whose, *_specs_of_experts(weights, scales, wide)],
            out_specs=mine,
            scratch_shapes=[
                pltpu.VMEM((tall, inputs), x.dtype),
                pltpu.VMEM((tall, inputs), jnp.float32),
                pltpu.VMEM((tokens, inputs), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=grid[0] * 2 * 3 * count * rows * inputs * width,
            bytes_accessed=grid[0] * sum(a.nbytes for a in read) + 2 * x.nbytes,
            transcendentals=grid[0] * count * CHUNK * width,
        ),
        name="experts_few",
    )(*visitors[:2], x, *visitors[2:], *map(left_in_memory, weights), *(scales or ()))


def _specs_of_experts(weights: SwiGLU, scales: SwiGLU | None, wide: int) -> list[Any]:
    """Which part of an expert's matrices a turn has; nothing moves where nobody chose it."""
    _, inputs, width = weights.gate.shape
    last = width // wide - 1

    def turn(some: Any, expert: Any, part: Any, sizes: Any, read: Any) -> Any:
        there = jnp.where(read[some, expert] < expert, last, 0)
        return jnp.where(sizes[some, expert] > 0, part, there)

    def columns(some: Any, expert: Any, part: Any, sizes: Any, read: Any) -> tuple[Any, ...]:
        return read[some, expert], 0, turn(some, expert, part, sizes, read)

    def rows(some: Any, expert: Any, part: Any, sizes: Any, read: Any) -> tuple[Any, ...]:
        return read[some, expert], turn(some, expert, part, sizes, read), 0

    def blocks(some: Any, expert: Any, part: Any, sizes: Any, read: Any) -> tuple[Any, ...]:
        return read[some, expert], 0, 0

    return [
        *[pl.BlockSpec((None, inputs, wide), columns)] * 2,
        pl.BlockSpec((None, wide, inputs), rows),
        *(pl.BlockSpec((None, *scale.shape[1:]), blocks, memory_space=pltpu.SMEM)
          for scale in scales or ()),
    ]  # fmt: skip


class _Core(NamedTuple):
    """What stays in the core, whichever expert it is."""

    x: Any
    place: Any
    gate: Any
    rows: Any
    """The tokens of an expert, one after the other; and what it makes of them."""
    sums: Any
    total: Any

    def chosen(self, expert: Any, begin: Any) -> tuple[Array, Array]:
        """Ones where a token is one of an expert's rows from here on, and the rows' gates."""
        number = begin + lax.broadcasted_iota(jnp.int32, (CHUNK, self.x.shape[0]), 0)
        here = self.place[pl.ds(expert, 1), :] == number
        gates = jnp.where(here, self.gate[pl.ds(expert, 1), :], 0).sum(1, keepdims=True)
        return here.astype(self.x.dtype), gates


def _visit(sizes: Any, _: Any, x: Any, place: Any, gate: Any, *others: Any) -> None:
    """A part of an expert's width, for all tokens that chose it."""
    *matrices, out, rows, sums, total = others
    core = _Core(x, place, gate, rows, sums, total)
    some, expert, part = (pl.program_id(axis) for axis in range(3))
    experts, parts = pl.num_programs(1), pl.num_programs(2)

    def each_chunk(do: Any) -> None:
        @pl.loop(0, sizes[some, expert], step=CHUNK)
        def _(begin: Any) -> None:
            do(core, expert, pl.multiple_of(begin, CHUNK))

    @pl.when((expert == 0) & (part == 0))
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    pl.when(part == 0)(lambda: each_chunk(_gather))
    each_chunk(partial(_multiply, matrices[:3], matrices[3:], part))
    pl.when(part == parts - 1)(lambda: each_chunk(_scatter))

    @pl.when((expert == experts - 1) & (part == parts - 1))
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _gather(core: _Core, expert: Any, begin: Any) -> None:
    """Bring the rows of a chunk together."""
    here, _ = core.chosen(expert, begin)
    mine = pl.ds(begin, CHUNK)

    def one_part(at: Any, width: int) -> None:
        part = pl.ds(at, width)
        found = _exactly(here, core.x[:, part], 1)
        core.rows[mine, part] = found.astype(core.x.dtype)
        core.sums[mine, part] = jnp.zeros_like(found)

    in_parts(CHUNK, core.x.shape[1], one_part)


def _scatter(core: _Core, expert: Any, begin: Any) -> None:
    """Add to each token what was made of its row."""
    here, _ = core.chosen(expert, begin)
    mine = pl.ds(begin, CHUNK)

    def one_part(at: Any, width: int) -> None:
        part = pl.ds(at, width)
        core.total[:, part] += _exactly(here, core.sums[mine, part].astype(core.x.dtype), 0)

    tokens, inputs = core.x.shape
    in_parts(tokens, inputs, one_part)


def _exactly(ones: Array, values: Array, contracted: int) -> Array:
    """A product that only picks: with float32 as it is, not by way of bfloat16."""
    return lax.dot_general(
        ones, values, (((contracted,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if values.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _multiply(matrices: Any, scales: Any, part: Any, core: _Core, expert: Any, begin: Any) -> None:
    """The three products of a chunk's rows with a part of the width."""
    gate_matrix, up, down = matrices
    inputs, (wide, _) = core.x.shape[1], down.shape
    first, mine = part * pl.cdiv(wide, LANES), pl.ds(begin, CHUNK)

    def of(matrix: int, inputs: Any, columns: Any) -> Any:
        """The scales of a matrix from these blocks on."""
        return (lambda i, o: scales[matrix][inputs + i, columns + o]) if scales else None

    inner = scaled_products(
        lambda at: core.rows[mine, at],
        [(lambda at: gate_matrix[at, :], of(0, 0, first)), (lambda at: up[at, :], of(1, 0, first))],
        (CHUNK, inputs, wide),
    )
    h, u = (value.astype(core.x.dtype).astype(jnp.float32) for value in inner)
    active = (jax.nn.silu(h) * u * core.chosen(expert, begin)[1]).astype(core.x.dtype)

    def one_part(at: Any, width: int) -> None:
        part = pl.ds(at, width)
        (product,) = scaled_products(
            lambda block: active[:, block.start : block.start + block.size],
            [(lambda block: down[block, part], of(2, first, lax.div(at, LANES)))],
            (CHUNK, wide, width),
            unrolled=True,
        )
        core.sums[mine, part] += product

    in_parts(CHUNK, inputs, one_part)
