"""The blocks of scores of `mla_attention` on a TPU, and where its kernels find what one needs.

Arrays are flat, [B, S, heads x width]: what a product of tokens and weights gives, and what the
next one takes, with no transposition between. A program has a few heads, so many that their rotary
halves fill whole lanes, and goes through the blocks of scores on and below the diagonal: a table
says where each lies, the others are no steps at all.

Scores are transposed, keys by queries. So what belongs to a query (maximum, sum, log-sum-exp, the
inner product of output and gradient) lies along the lanes, and a sum over keys is one of registers
and not inside of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dsjax.kernels.attention_blocks import pad_ids
from dsjax.kernels.tpu_core import LANES, MEMORY_LIMIT, matrix_unit

BLOCKS = (512, 256, LANES)
"""Queries, and as many keys, of a block: the largest that divides a row."""

PARAMETERS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
)


class Attending(NamedTuple):
    """Queries, keys and values of H heads, those of a token one after the other.

    Inside of the kernels P queries, the last of K keys; whole blocks of both.
    """

    q_nope: Float[Array, "B P HN"]
    q_rope: Float[Array, "B P HR"]
    k_nope: Float[Array, "B K HN"]
    k_rope: Float[Array, "B K R"]
    v: Float[Array, "B K HV"]
    segment_ids: Int[Array, "B K"]


class Heads(NamedTuple):
    """How many heads, and how wide each part of one is."""

    count: int
    nope: int
    rope: int
    value: int

    @classmethod
    def of(cls, attending: Attending, count: int) -> Heads:
        """Those of so many heads."""
        nope, rope, value = (attending[i].shape[-1] for i in (0, 3, 4))
        return cls(count, nope // count, rope, value // count)

    @property
    def together(self) -> int:
        """Heads of one program; 0 where heads do not fill whole lanes."""
        fewest = LANES // math.gcd(self.rope, LANES)
        whole = self.nope % LANES == 0 == self.value % LANES and self.count % fewest == 0
        return fewest if whole else 0


class Blocks(NamedTuple):
    """The blocks of scores that are computed, and where a program finds what it needs for one."""

    heads: Heads
    size: int
    before: int
    """How many blocks of keys lie before the first of queries."""
    queries_of_step: np.ndarray
    keys_of_step: np.ndarray

    @classmethod
    def of(cls, attending: Attending, heads: Heads, *, keys_first: bool) -> Blocks:
        """One block of queries after another with all its keys, or the other way round."""
        queries, keys = attending.q_nope.shape[1], attending.v.shape[1]
        size = next(size for size in BLOCKS if queries % size == 0 == keys % size)
        before = (keys - queries) // size
        seen = np.tri(queries // size, keys // size, before, dtype=np.int32)
        query, key = np.nonzero(seen.T)[::-1] if keys_first else np.nonzero(seen)
        return cls(heads, size, before, query.astype(np.int32), key.astype(np.int32))

    def grid(self, rows: int) -> tuple[int, int, int]:
        """Of every row and every few heads each step."""
        return rows, self.heads.count // self.heads.together, len(self.keys_of_step)

    def arguments(self, attending: Attending) -> tuple[Any, ...]:
        """The steps, and what `inputs` describes: the ids of queries, then those of keys."""
        *apart, ids = attending
        own = ids[:, None, ids.shape[1] - attending.q_nope.shape[1] :]
        return (self.queries_of_step, self.keys_of_step, *apart, own, ids[:, :, None])

    def inputs(self) -> list[pl.BlockSpec]:
        """Ids of queries lie along the lanes, those of keys across them."""
        heads, size = self.heads, self.size
        return [
            self.queries(heads.nope),
            self.queries(heads.rope),
            self.keys(heads.nope),
            pl.BlockSpec((None, size, heads.rope), lambda row, _, step, q, k: (row, k[step], 0)),
            self.keys(heads.value),
            pl.BlockSpec((None, 1, size), lambda row, _, step, q, k: (row, 0, q[step])),
            pl.BlockSpec((None, size, 1), lambda row, _, step, q, k: (row, k[step], 0)),
        ]

    def queries(self, width: int) -> pl.BlockSpec:
        """So many numbers of each of a program's heads, of the step's queries."""
        shape = (None, self.size, self.heads.together * width)
        return pl.BlockSpec(shape, lambda row, group, step, q, k: (row, q[step], group))

    def keys(self, width: int) -> pl.BlockSpec:
        """And of the step's keys."""
        shape = (None, self.size, self.heads.together * width)
        return pl.BlockSpec(shape, lambda row, group, step, q, k: (row, k[step], group))

    def number_of_queries(self) -> pl.BlockSpec:
        """One number of each of a program's heads and the step's queries: [B, G, T, P] in all."""
        shape = (None, None, self.heads.together, self.size)
        return pl.BlockSpec(shape, lambda row, group, step, q, k: (row, group, 0, q[step]))

    def cost(
        self,
        attending: Attending,
        products: tuple[int, ...],
        every_step: int,
        once: int,
        beside: float = 0.0,
    ) -> pl.CostEstimate:
        """What one call does.

        Args:
            products: how wide each product of the scores is.
            beside: how many products as wide as a matrix unit take no longer than the vector work
                on the scores.
            every_step: numbers of a head and place that come anew with every step.
            once: those that come or go once, for the queries.
        """
        unit = matrix_unit()  # which no product fills less
        rows, places = attending.q_nope.shape[:2]
        came = len(self.keys_of_step) * self.size
        scores = rows * self.heads.count * came * self.size
        numbers = rows * self.heads.count * (came * every_step + places * once)
        return pl.CostEstimate(
            flops=round(2 * scores * unit * max(sum(-(-w // unit) for w in products), beside)),
            bytes_accessed=numbers * attending.v.dtype.itemsize,
            transcendentals=scores,
        )

    def allowed(self, ahead: Array, query_ids: Any, key_ids: Any) -> Array:
        """Which keys [K, .] a step's queries [., Q], so many blocks ahead of them, may see."""
        shape = (self.size, self.size)
        key = lax.broadcasted_iota(jnp.int32, shape, 0)
        query = lax.broadcasted_iota(jnp.int32, shape, 1)
        return (ahead * self.size + query >= key) & (query_ids[...] == key_ids[...])


def padded(attending: Attending) -> Attending:
    """Up to whole blocks, with a segment of their own."""
    *apart, ids = attending
    beyond = (0, 0), (0, -ids.shape[1] % LANES), (0, 0)
    return Attending(*(jnp.pad(x, beyond) for x in apart), segment_ids=pad_ids(ids))


def place_of(blocks: Blocks, queries: Any, keys: Any) -> tuple[Array, Array]:
    """How many blocks the step's queries lie ahead of its keys, and which block the keys are."""
    step = pl.program_id(2)
    return queries[step] + blocks.before - keys[step], keys[step]


def columns(heads: Heads, head: int) -> tuple[slice, slice, slice]:
    """Those of a head's no-rope and rotary halves, and of its value."""
    nope, rope, value = (slice(head * width, (head + 1) * width) for width in heads[1:])
    return nope, rope, value


def joined(nope: Array, rope: Array) -> Array:
    """A block of one head's queries or keys, [., N + R].

    A matrix unit that is 256 wide takes both halves at once; apart, each would fill a part of it.
    """
    return jnp.concatenate([nope, rope], axis=1)


def product(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """The product of two blocks over one dimension of each, in float32."""
    over = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, over, preferred_element_type=jnp.float32)
