"""The routed experts without a gradient, for few tokens: decoding is reading weights.

    y_t = sum_k g_tk W_down^e (silu(W_gate^e x_t) * W_up^e x_t),   e = experts_tk

Matrices lie with their inputs first, [experts, in, out]: a few rows are multiplied by them half
again as fast on a CPU, and it is the layout of `jax.lax.ragged_dot`, which other backends use.
`experts.routed_experts_reference` is the meaning of both.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.kernels.permutation import Order, sort_by_expert, sum_choices
from dsjax.kernels.swiglu import SwiGLU, swiglu

BLOCKS = (128, 16, 4)
"""Rows of one product on a CPU: large ones are fast, small ones waste little at an expert's end."""


def apply_experts(
    x: Float[Array, "T D"],
    weights: SwiGLU,
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
) -> Float[Array, "T D"]:
    """sum_k gate_k * expert_k(x) for every token.

    Args:
        x: tokens, in the dtype of `weights`.
        weights: gate and up [E, D, F], down [E, F, D].
        experts: the K experts of each token.
        gates: what each choice counts.
    """
    order = sort_by_expert(experts, weights.gate.shape[0])
    gate_of_row = gates.ravel()[order.pair_of_row]
    rows = lax.platform_dependent(x, weights, order, gate_of_row, cpu=_in_blocks, default=_ragged)
    return sum_choices(rows, order)


def _ragged(x: Array, weights: SwiGLU, order: Order, gates: Array) -> Array:
    rows = x[order.token_of_row]
    h, u = (lax.ragged_dot(rows, w, order.sizes) for w in (weights.gate, weights.up))
    return lax.ragged_dot(swiglu(h, u, gates), weights.down, order.sizes)


def _in_blocks(x: Array, weights: SwiGLU, order: Order, gates: Array) -> Array:
    """Expert after expert that was chosen, its rows in blocks of falling size; no other is read.

    A matrix is sliced out of its stack once an expert, which XLA copies at the speed of memory; a
    gather of all chosen matrices at once is five times as slow. The last block of an expert can run
    over into the next one's rows, which come later and overwrite what it left.
    """
    blocks = (1,) if x.shape[0] == 1 else BLOCKS
    token = jnp.pad(order.token_of_row, (0, blocks[0]))
    gates = jnp.pad(gates, (0, blocks[0]))
    ends = jnp.cumsum(order.sizes)
    chosen = jnp.nonzero(order.sizes, size=order.sizes.size, fill_value=0)[0]

    def one_expert(index: Array, out: Array) -> Array:
        expert = chosen[index]
        end, size = ends[expert], order.sizes[expert]
        gate, up, down = (lax.dynamic_index_in_dim(w, expert, 0, keepdims=False) for w in weights)

        def one_block(at: Array, out: Array, block: int) -> Array:
            rows = x[lax.dynamic_slice_in_dim(token, at, block)]
            inner = swiglu(rows @ gate, rows @ up, lax.dynamic_slice_in_dim(gates, at, block))
            return lax.dynamic_update_slice_in_dim(out, inner @ down, at, 0)

        at = end - size
        for block in blocks:
            # What fills more than half of a block is worth one; the smallest takes all the rest.
            spared = 0 if block == blocks[-1] else block // 2
            count = jnp.maximum(end - at - spared + block - 1, 0) // block
            out = lax.fori_loop(
                0, count, lambda i, out, at=at, b=block: one_block(at + i * b, out, b), out
            )
            at += count * block
        return out

    out = jnp.zeros((order.pair_of_row.size + blocks[0], x.shape[1]), x.dtype)
    out = lax.fori_loop(0, (order.sizes > 0).sum(), one_expert, out)
    return out[: order.pair_of_row.size]
