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
    """Every expert that was chosen, a block of its rows at a time; the others are not read.

    A matrix is sliced out of its stack inside the loop, where XLA copies it at the speed of memory;
    a gather of all chosen matrices before it is five times as slow. An expert's last block runs
    over into the next one's rows, which come later and overwrite what it left.
    """
    block = _block_size(x.shape[0], gates.size, weights.gate.shape[0])
    token = jnp.pad(order.token_of_row, (0, block))
    gates = jnp.pad(gates, (0, block))
    begins = jnp.cumsum(order.sizes) - order.sizes
    blocks = (order.sizes + block - 1) // block
    ends = jnp.cumsum(blocks)

    def one_block(index: Array, out: Array) -> Array:
        expert = (ends <= index).sum()
        at = begins[expert] + (index - (ends[expert] - blocks[expert])) * block
        rows = x[lax.dynamic_slice_in_dim(token, at, block)]
        gate, up, down = (_one(w, expert) for w in weights)
        inner = swiglu(rows @ gate, rows @ up, lax.dynamic_slice_in_dim(gates, at, block))
        return lax.dynamic_update_slice_in_dim(out, inner @ down, at, 0)

    out = jnp.zeros((order.pair_of_row.size + block, x.shape[1]), x.dtype)
    return lax.fori_loop(0, ends[-1], one_block, out)[: order.pair_of_row.size]


def _one(stack: Array, expert: Array) -> Array:
    return lax.dynamic_index_in_dim(stack, expert, 0, keepdims=False)


def _block_size(tokens: int, pairs: int, experts: int) -> int:
    """Rows of one product: twice as many as an expert gets, in four sizes; 1 for one token."""
    if tokens == 1:
        return 1
    return next((size for size in (4, 8, 32) if size * experts >= 2 * pairs), 128)
