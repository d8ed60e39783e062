"""The gradient of `mla_attention` as one Pallas kernel for TPUs.

The gradients of a block of keys are added up while all its queries pass, and those of the queries
stay in the core's memory meanwhile. No score is made twice, and no part of a gradient goes to HBM
to be added up there. Queries that are too many for that memory come in parts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

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

QUERIES_AT_ONCE = 8192
"""Of a backward pass: in float32 the gradients of two heads of V3 take 12 MiB then."""


def backward(
    attending: Attending, out: Array, log_sum: Array, d_out: Array, heads: int, scale: float
) -> tuple[Array, ...]:
    """Gradients of all but the ids, given `forward`'s results and the gradient of its first."""
    widths, shape = Heads.of(attending, heads), attending.v.shape
    whole = padded(attending)
    rows, places = whole.segment_ids.shape
    beyond = (0, 0), (0, places - shape[1]), (0, 0)
    out, d_out = jnp.pad(out, beyond), jnp.pad(d_out, beyond)
    log_sum = jnp.pad(log_sum, (*beyond[::2], beyond[1]))
    log_sum = log_sum.reshape(rows, -1, widths.together, places)
    # What several parts add up is added in float32.
    dtype = out.dtype if places <= QUERIES_AT_ONCE else jnp.dtype(jnp.float32)
    d_queries, d_keys = [], [jnp.zeros((), dtype)] * 3
    for begin in range(0, places, QUERIES_AT_ONCE):
        end = min(begin + QUERIES_AT_ONCE, places)
        mine = slice(begin, end)
        part = Attending(*(x[:, mine] for x in whole[:2]), *(x[:, :end] for x in whole[2:]))
        known = out[:, mine], d_out[:, mine], log_sum[..., mine]
        *d_q, d_k_nope, d_k_rope, d_v = _backward_of_blocks(part, *known, widths, scale, dtype)
        d_queries.append(d_q)
        after = (0, 0), (0, places - end), (0, 0)
        new = (jnp.pad(d, after) for d in (d_k_nope, d_k_rope.sum(1), d_v))
        d_keys = [old + d for old, d in zip(d_keys, new, strict=True)]
    gradients = (*(jnp.concatenate(d, axis=1) for d in zip(*d_queries, strict=True)), *d_keys)
    return tuple(
        d[:, : shape[1]].astype(x.dtype) for d, x in zip(gradients, attending[:5], strict=True)
    )


def _backward_of_blocks(
    attending: Attending,
    out: Array,
    d_out: Array,
    log_sum: Array,
    heads: Heads,
    scale: float,
    dtype: Any,
) -> tuple[Array, ...]:
    """`backward` of queries that fit; that of `k_rope` is [B, G, K, R], one of each program."""
    blocks = Blocks.of(attending, heads, keys_first=True)
    grid = blocks.grid(len(attending.v))
    apart = heads.nope, heads.rope
    return pl.pallas_call(
        partial(_backward, blocks=blocks, scale=scale),
        out_shape=[
            jax.ShapeDtypeStruct(attending.q_nope.shape, attending.q_nope.dtype),
            jax.ShapeDtypeStruct(attending.q_rope.shape, attending.q_rope.dtype),
            jax.ShapeDtypeStruct(attending.k_nope.shape, dtype),
            jax.ShapeDtypeStruct((*grid[:2], *attending.k_rope.shape[1:]), jnp.float32),
            jax.ShapeDtypeStruct(attending.v.shape, dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[*blocks.inputs(), *_passed_back(blocks)],
            out_specs=_gradients(blocks),
            scratch_shapes=_sums(blocks, attending.q_nope.shape[1]),
        ),
        compiler_params=PARAMETERS,
        cost_estimate=blocks.cost(
            attending,
            (*[sum(apart)] * 3, heads.value, heads.value),
            every_step=sum(apart) + heads.value,
            once=2 * heads.value + 2 * sum(apart) + heads.nope,
        ),
        name="mla_attention_backward",
    )(*blocks.arguments(attending), out, d_out, log_sum)


def _passed_back(blocks: Blocks) -> list[pl.BlockSpec]:
    """Output, its gradient, log-sum-exp. The first is needed only while the first keys are."""
    shape = (None, blocks.size, blocks.heads.together * blocks.heads.value)
    out = pl.BlockSpec(
        shape, lambda row, group, step, q, k: (row, jnp.where(k[step] == 0, q[step], 0), group)
    )
    return [out, blocks.queries(blocks.heads.value), blocks.number_of_queries()]


def _gradients(blocks: Blocks) -> list[pl.BlockSpec]:
    """Those of queries are whole, and leave, when keys of the same place have come to them."""
    heads, size = blocks.heads, blocks.size

    def whole(row: Any, group: Any, step: Any, q: Any, k: Any) -> tuple[Any, ...]:
        return row, jnp.maximum(k[step] - blocks.before, 0), group

    return [
        pl.BlockSpec((None, size, heads.together * heads.nope), whole),
        pl.BlockSpec((None, size, heads.together * heads.rope), whole),
        blocks.keys(heads.nope),
        pl.BlockSpec(
            (None, None, size, heads.rope), lambda row, group, step, q, k: (row, group, k[step], 0)
        ),
        blocks.keys(heads.value),
    ]


def _sums(blocks: Blocks, places: int) -> list[Any]:
    """Of all queries' gradients, of a block of keys' and values'; and inner products of queries."""
    heads, size = blocks.heads, blocks.size
    shapes = (
        (places, heads.together * heads.nope),
        (places, heads.together * heads.rope),
        (size, heads.together * heads.nope),
        (size, heads.rope),
        (size, heads.together * heads.value),
        (heads.together, places),
    )
    return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def _backward(
    queries: Any, keys: Any, q_nope: Any, q_rope: Any, k_nope: Any, k_rope: Any, v: Any,
    query_ids: Any, key_ids: Any, out: Any, d_out: Any, log_sum: Any,
    d_q_nope: Any, d_q_rope: Any, d_k_nope: Any, d_k_rope: Any, d_v: Any,
    q_nope_sum: Any, q_rope_sum: Any, k_nope_sum: Any, k_rope_sum: Any, v_sum: Any, inner: Any,
    *, blocks: Blocks, scale: float,
) -> None:  # fmt: skip
    """A block of scores of a program's heads: what they pass back to the five."""
    heads, (ahead, key) = blocks.heads, place_of(blocks, queries, keys)
    step = pl.program_id(2)
    at = pl.ds(pl.multiple_of(queries[step] * blocks.size, blocks.size), blocks.size)

    @pl.when(key == 0)
    def _() -> None:
        q_nope_sum[at] = jnp.zeros((blocks.size, q_nope_sum.shape[1]), jnp.float32)
        q_rope_sum[at] = jnp.zeros((blocks.size, q_rope_sum.shape[1]), jnp.float32)
        _inner_products(heads, out, d_out, inner, at)

    @pl.when((step == 0) | (keys[jnp.maximum(step - 1, 0)] != key))
    def _() -> None:
        for total in (k_nope_sum, k_rope_sum, v_sum):
            total[...] = jnp.zeros_like(total)

    allowed = blocks.allowed(ahead, query_ids, key_ids)
    for head in range(heads.together):
        mine, (nope, rope, value) = slice(head, head + 1), columns(heads, head)
        q = joined(q_nope[:, nope], q_rope[:, rope])
        k = joined(k_nope[:, nope], k_rope[...])
        weights = jnp.where(allowed, jnp.exp(product(k, q, 1, 1) * scale - log_sum[mine]), 0)
        d_weights = product(v[:, value], d_out[:, value], 1, 1)
        d_scores = (weights * (d_weights - inner[mine, at]) * scale).astype(v.dtype)
        v_sum[:, value] += product(weights.astype(v.dtype), d_out[:, value], 1, 0)
        d_k, d_q = product(d_scores, q, 1, 0), product(d_scores, k, 0, 0)
        k_nope_sum[:, nope] += d_k[:, : heads.nope]
        k_rope_sum[...] += d_k[:, heads.nope :]
        q_nope_sum[at, nope] += d_q[:, : heads.nope]
        q_rope_sum[at, rope] += d_q[:, heads.nope :]

    @pl.when(ahead == 0)
    def _() -> None:
        d_q_nope[...] = q_nope_sum[at].astype(d_q_nope.dtype)
        d_q_rope[...] = q_rope_sum[at].astype(d_q_rope.dtype)

    last = pl.num_programs(2) - 1

    @pl.when((step == last) | (keys[jnp.minimum(step + 1, last)] != key))
    def _() -> None:
        d_k_nope[...] = k_nope_sum[...].astype(d_k_nope.dtype)
        d_k_rope[...] = k_rope_sum[...]
        d_v[...] = v_sum[...].astype(d_v.dtype)


def _inner_products(heads: Heads, out: Any, d_out: Any, inner: Any, at: Any) -> None:
    """out_i . d_out_i of a block of queries: sum_j p_ij dp_ij of the softmax's gradient."""
    for head in range(heads.together):
        value = columns(heads, head)[2]
        products = out[:, value].astype(jnp.float32) * d_out[:, value].astype(jnp.float32)
        inner[head : head + 1, at] = products.T.sum(0, keepdims=True)
