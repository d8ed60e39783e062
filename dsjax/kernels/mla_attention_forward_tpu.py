"""`mla_attention` as a Pallas kernel for TPUs: online softmax, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dsjax.kernels.attention_blocks import MASKED
from dsjax.kernels.mla_attention_blocks_tpu import (
    PARAMETERS,
    Attending,
    Blocks,
    Heads,
    columns,
    joined,
    padded,
    place_of,
    product,
)

VECTOR_WORK = 2.62
"""Of the scores, in products as wide as a matrix unit. The compiler's schedule for TPU7x has 1,973
bundles for two heads' scores of a block, whose two products take 1,024 cycles; at the efficiency
that plans count for products, 2.62 of them take as long. On v5p, with three, it takes no time."""


def forward(
    attending: Attending, heads: int, scale: float
) -> tuple[Float[Array, "B S HV"], Float[Array, "B H S"]]:
    """The output, and the log-sum-exp of every query's scores."""
    places = attending.v.shape[1]
    out, log_sum = _forward_of_blocks(padded(attending), Heads.of(attending, heads), scale)
    return out[:, :places], log_sum.reshape(len(out), heads, -1)[..., :places]


def _forward_of_blocks(attending: Attending, heads: Heads, scale: float) -> tuple[Array, Array]:
    """The output [B, P, HV], and log-sum-exp [B, G, T, P] of T heads of each of G programs."""
    blocks = Blocks.of(attending, heads, keys_first=False)
    rows, groups, _ = grid = blocks.grid(len(attending.v))
    shape = groups, heads.together, attending.q_nope.shape[1]
    each = pltpu.VMEM((heads.together, blocks.size), jnp.float32)
    gathered = pltpu.VMEM((heads.together, heads.value, blocks.size), jnp.float32)
    return pl.pallas_call(
        partial(_forward, blocks=blocks, scale=scale),
        out_shape=[
            jax.ShapeDtypeStruct(attending.v.shape, attending.v.dtype),
            jax.ShapeDtypeStruct((rows, *shape), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=blocks.inputs(),
            out_specs=[blocks.queries(heads.value), blocks.number_of_queries()],
            scratch_shapes=[each, each, gathered],
        ),
        compiler_params=PARAMETERS,
        cost_estimate=blocks.cost(
            attending,
            products=(heads.nope + heads.rope, heads.value),
            beside=VECTOR_WORK,
            every_step=heads.nope + heads.value + heads.rope // heads.together,
            once=heads.nope + heads.rope + heads.value,
        ),
        name="mla_attention",
    )(*blocks.arguments(attending))


def _forward(
    queries: Any, keys: Any, q_nope: Any, q_rope: Any, k_nope: Any, k_rope: Any, v: Any,
    query_ids: Any, key_ids: Any, out: Any, log_sum: Any, maximum: Any, total: Any, gathered: Any,
    *, blocks: Blocks, scale: float,
) -> None:  # fmt: skip
    """A block of scores of a program's heads: online softmax, and the output so far, transposed."""
    heads, (ahead, key) = blocks.heads, place_of(blocks, queries, keys)

    @pl.when(key == 0)
    def _() -> None:
        maximum[...] = jnp.full_like(maximum, MASKED)
        total[...] = jnp.zeros_like(total)
        gathered[...] = jnp.zeros_like(gathered)

    allowed = blocks.allowed(ahead, query_ids, key_ids)
    for head in range(heads.together):
        nope, rope, value = columns(heads, head)
        k = joined(k_nope[:, nope], k_rope[...])
        scores = product(k, joined(q_nope[:, nope], q_rope[:, rope]), 1, 1) * scale
        scores = jnp.where(allowed, scores, MASKED)
        mine = slice(head, head + 1)
        higher = jnp.maximum(maximum[mine], scores.max(0, keepdims=True))
        weights = jnp.exp(scores - higher)
        shrink = jnp.exp(maximum[mine] - higher)
        maximum[mine] = higher
        total[mine] = total[mine] * shrink + weights.sum(0, keepdims=True)
        gathered[head] = gathered[head] * shrink + product(
            v[:, value], weights.astype(v.dtype), 0, 0
        )

    @pl.when(ahead == 0)
    def _() -> None:
        for head in range(heads.together):
            mean = gathered[head] / total[head : head + 1]
            out[:, columns(heads, head)[2]] = mean.T.astype(out.dtype)
        log_sum[...] = maximum[...] + jnp.log(total[...])
