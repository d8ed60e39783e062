"""The routed experts on a CPU: one loop over blocks of each expert's rows, and one back.

Everything between a block's tokens and its output rows happens while the block is in cache, and no
array of gathered tokens is ever made.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from dsjax.kernels.blocks import BLOCKS, fold_blocks, fold_experts
from dsjax.kernels.permutation import Order, VisitorOrder
from dsjax.kernels.swiglu import SwiGLU, swiglu, swiglu_gradient


def forward(
    x: Array, weights: SwiGLU, order: Order | VisitorOrder, gates: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Sums over each token's choices [T, D], and W_gate x and W_up x of every row [N, F]."""
    rows, width = gates.size, weights.gate.shape[1]
    token, gates = _padded(order.token_of_row), _padded(gates)

    def one_expert(expert: Array, begin: Array, size: Array, carry: Any) -> Any:
        wide = jnp.concatenate([weights.gate[expert], weights.up[expert]])
        down = weights.down[expert]

        def one_block(at: Array, count: int, carry: Any) -> Any:
            out, h_rows, u_rows = carry
            h, u = _before(x[_rows(token, at, count)], wide)
            inner = swiglu(h, u, _rows(gates, at, count))
            out = _put(out, at, _times_transposed(inner, down))
            return out, _put(h_rows, at, h), _put(u_rows, at, u)

        return fold_blocks(begin, size, BLOCKS, one_block, carry)

    def empty(width: int) -> Array:
        return jnp.zeros((rows + BLOCKS[0], width), x.dtype)

    start = empty(x.shape[1]), empty(width), empty(width)
    out, h, u = fold_experts(order.sizes, one_expert, start)
    return order.sum_choices(out), (h[:rows], u[:rows])


def backward(
    x: Array,
    weights: SwiGLU,
    order: Order | VisitorOrder,
    gates: Array,
    before: tuple[Array, Array] | None,
    dy: Array,
    into: SwiGLU | None,
    dtype: DTypeLike,
) -> tuple[Array, SwiGLU, Array]:
    """Gradients of x [T, D], of the matrices and of the rows' gates [N], given that of y.

    Those of the matrices are added to `into`, if there is any, and are in `dtype` if not; without
    `before` the pre-activations are made again.
    """
    rows = gates.size
    token, gates = _padded(order.token_of_row), _padded(gates)
    kept = [] if before is None else [_padded(a) for a in before]

    def one_expert(expert: Array, begin: Array, size: Array, carry: Any) -> Any:
        wide = jnp.concatenate([weights.gate[expert], weights.up[expert]])
        down = weights.down[expert]

        def one_block(at: Array, count: int, carry: Any) -> Any:
            d_rows, d_gates, d_wide, d_down = carry
            here = _rows(token, at, count)
            mine = at + jnp.arange(count) < begin + size
            d_out = jnp.where(mine[:, None], dy[here], 0)
            h, u = (_rows(a, at, count) for a in kept) if kept else _before(x[here], wide)
            inner, d_h, d_u, d_here = swiglu_gradient(h, u, _rows(gates, at, count), d_out @ down)
            d_before = jnp.concatenate([d_h, d_u], axis=1)
            d_wide += _transposed_times(d_before, x[here])
            d_down += _transposed_times(d_out, inner)
            return _put(d_rows, at, d_before @ wide), _put(d_gates, at, d_here), d_wide, d_down

        d_rows, d_gates, d_weights = carry
        d_gate, d_up, d_down = (d[expert].astype(jnp.float32) for d in d_weights)
        start = d_rows, d_gates, jnp.concatenate([d_gate, d_up]), d_down
        d_rows, d_gates, d_wide, d_down = fold_blocks(begin, size, BLOCKS, one_block, start)
        d_gate, d_up = jnp.split(d_wide, 2)
        parts = SwiGLU(d_gate, d_up, d_down)
        return d_rows, d_gates, jax.tree.map(partial(_set_expert, expert), d_weights, parts)

    start = (
        jnp.zeros((rows + BLOCKS[0], x.shape[1]), x.dtype),
        jnp.zeros(rows + BLOCKS[0]),
        jax.tree.map(partial(jnp.zeros_like, dtype=dtype), weights) if into is None else into,
    )
    d_rows, d_gates, d_weights = fold_experts(order.sizes, one_expert, start)
    return order.sum_choices(d_rows), d_weights, d_gates[:rows]


def _before(x: Array, wide: Array) -> Any:
    """The two pre-activations of a block of rows, from one product."""
    return jnp.split(_times_transposed(x, wide), 2, axis=1)


def _padded(x: Array) -> Array:
    """Room for the last block to run over the end."""
    return jnp.pad(x, ((0, BLOCKS[0]),) + ((0, 0),) * (x.ndim - 1))


def _rows(x: Array, at: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, count)


def _put(x: Array, at: Array, rows: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, rows, at, 0)


def _set_expert(expert: Array, stack: Array, one: Array) -> Array:
    return stack.at[expert].set(one.astype(stack.dtype))


def _times_transposed(a: Array, b: Array) -> Array:
    """a b^T: XLA multiplies by the released layout as it lies."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def _transposed_times(a: Array, b: Array) -> Array:
    """a^T b in float32, a block's share of a matrix's gradient."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
