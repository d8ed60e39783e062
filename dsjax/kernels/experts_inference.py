"""The routed experts without a gradient, for few tokens: decoding is reading weights.

    y_t = sum_k g_tk W_down^e (silu(W_gate^e x_t) * W_up^e x_t),   e = experts_tk

Matrices lie with their inputs first, [experts, in, out]: a few rows are multiplied by them half
again as fast on a CPU, and on others every product takes either layout. On a TPU one kernel does
all of it, `experts_few_tpu`, unless XLA's partitioner splits the program.
`experts.routed_experts_reference` is the meaning of both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.kernels import experts_few_tpu as few_tpu
from dsjax.kernels.blocks import BLOCKS, fold_blocks, fold_experts
from dsjax.kernels.grouped_matmul import grouped_matmul
from dsjax.kernels.permutation import Order, sort_by_expert
from dsjax.kernels.rows import sum_rows
from dsjax.kernels.swiglu import SwiGLU, swiglu
from dsjax.kernels.tpu_core import alone
from dsjax.numerics.fp8 import dequantize_blocks
from sharding.platform import by_platform


def apply_experts(
    x: Float[Array, "T D"],
    weights: SwiGLU,
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    scales: SwiGLU | None = None,
) -> Float[Array, "T D"]:
    """sum_k gate_k * expert_k(x) for every token.

    Args:
        x: tokens, in the dtype of `weights` unless these are in FP8.
        weights: gate and up [E, D, F], down [E, F, D].
        experts: the K experts of each token; a number that `weights` do not have is of nobody here.
        gates: what each choice counts.
        scales: of the 128 x 128 blocks of every expert's matrices, which are then in FP8.
    """
    if not alone():
        return _sorted(x, weights, scales, experts, gates)
    return by_platform(
        x, weights, scales, experts, gates, tpu=few_tpu.apply_experts, default=_sorted
    )


def _sorted(
    x: Array, weights: SwiGLU, scales: SwiGLU | None, experts: Array, gates: Array
) -> Array:
    """Rows sorted by expert, and products of groups of them."""
    count = weights.gate.shape[0]
    order = sort_by_expert(jnp.where((experts < 0) | (experts >= count), count, experts), count)
    gate_of_row = gates.ravel()[order.pair_of_row]
    rows = by_platform(x, weights, scales, order, gate_of_row, cpu=_in_blocks, default=_grouped)
    of_somebody = order.row_of_pair < order.sizes.sum()  # The others are undefined.
    return sum_rows(rows, jnp.where(of_somebody, order.row_of_pair, len(rows)))


def _widened(weights: SwiGLU, scales: SwiGLU | None, dtype: Any) -> SwiGLU:
    if scales is None:
        return weights
    return SwiGLU(*(dequantize_blocks(w, s, dtype) for w, s in zip(weights, scales, strict=True)))


def _grouped(x: Array, weights: SwiGLU, scales: SwiGLU | None, order: Order, gates: Array) -> Array:
    weights = _widened(weights, scales, x.dtype)  # All of a layer: a product wants them whole.
    rows = x[order.token_of_row]
    h, u = (
        grouped_matmul(order.sizes, (rows, w), inputs_first=True)
        for w in (weights.gate, weights.up)
    )
    return grouped_matmul(order.sizes, (swiglu(h, u, gates), weights.down), inputs_first=True)


def _in_blocks(
    x: Array, weights: SwiGLU, scales: SwiGLU | None, order: Order, gates: Array
) -> Array:
    """Every expert that was chosen, a block of its rows at a time; the others are not read.

    A matrix is sliced out of its stack once an expert, which XLA copies at the speed of memory; a
    gather of all chosen matrices at once is five times as slow. Only then is FP8 widened.
    """
    blocks = (1,) if x.shape[0] == 1 else BLOCKS  # a single token is one row of each of its experts
    token = jnp.pad(order.token_of_row, (0, blocks[0]))
    gates = jnp.pad(gates, (0, blocks[0]))

    def one_expert(expert: Array, begin: Array, size: Array, out: Array) -> Array:
        def mine(stack: Array) -> Array:
            # Bits, because XLA slices no FP8 or bfloat16 on a CPU: it would turn all of the stack
            # to wider numbers before the loop. The barrier keeps it from taking the bits out, too.
            stack, at = lax.optimization_barrier((stack, expert))
            bits = lax.bitcast_convert_type(stack, f"uint{8 * stack.dtype.itemsize}")
            bits = lax.dynamic_index_in_dim(bits, at, 0, keepdims=False)
            return lax.bitcast_convert_type(bits, stack.dtype)

        chosen = jax.tree.map(mine, weights), jax.tree.map(mine, scales)
        gate, up, down = _widened(*chosen, x.dtype)

        def one_block(at: Array, count: int, out: Array) -> Array:
            rows = x[lax.dynamic_slice_in_dim(token, at, count)]
            inner = swiglu(rows @ gate, rows @ up, lax.dynamic_slice_in_dim(gates, at, count))
            return lax.dynamic_update_slice_in_dim(out, inner @ down, at, 0)

        return fold_blocks(begin, size, blocks, one_block, out)

    out = jnp.zeros((order.pair_of_row.size + blocks[0], x.shape[1]), x.dtype)
    return fold_experts(order.sizes, one_expert, out)[: order.pair_of_row.size]
