"""The routed experts on a CPU: one loop over blocks of each expert's rows, and one back.

Everything between a block's tokens and its output rows happens while the block is in cache, and no
array of gathered tokens is ever made. Block starts are not aligned to groups: a group's last block
runs into the next group's rows, whose own blocks come later and overwrite what it left there. An
expert without rows costs nothing, so decoding reads only the experts it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsjax.kernels.permutation import Order, sum_choices
from dsjax.kernels.swiglu import SwiGLU, swiglu, swiglu_gradient

BLOCK = 128
"""Rows of one product: large enough for full speed, small enough to waste little."""


def forward(
    x: Array, weights: SwiGLU, order: Order, gates: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Sums over each token's choices [T, D], and W_gate x and W_up x of every row [N, F]."""
    rows, width = gates.size, weights.gate.shape[1]
    block = _block_size(rows)
    token, gates = _padded(order.token_of_row, block), _padded(gates, block)

    def one_expert(expert: Array, begin: Array, size: Array, carry: Any) -> Any:
        wide = jnp.concatenate([weights.gate[expert], weights.up[expert]])
        down = weights.down[expert]

        def one_block(index: Array, carry: Any) -> Any:
            out, h_rows, u_rows = carry
            at = begin + index * block
            h, u = jnp.split(_times_transposed(x[_rows(token, at, block)], wide), 2, axis=1)
            inner = swiglu(h, u, _rows(gates, at, block))
            out = _put(out, at, _times_transposed(inner, down))
            return out, _put(h_rows, at, h), _put(u_rows, at, u)

        return lax.fori_loop(0, _blocks(size, block), one_block, carry)

    def empty(width: int) -> Array:
        return jnp.zeros((rows + block, width), x.dtype)

    start = empty(x.shape[1]), empty(width), empty(width)
    out, h, u = _over_experts(order.sizes, one_expert, start)
    return sum_choices(out, order), (h[:rows], u[:rows])


def backward(
    x: Array,
    weights: SwiGLU,
    order: Order,
    gates: Array,
    before: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, SwiGLU, Array]:
    """Gradients of x [T, D], of the matrices and of the rows' gates [N], given that of y."""
    rows = gates.size
    block = _block_size(rows)
    token, gates = _padded(order.token_of_row, block), _padded(gates, block)
    h_rows, u_rows = (_padded(a, block) for a in before)

    def one_expert(expert: Array, begin: Array, size: Array, carry: Any) -> Any:
        wide = jnp.concatenate([weights.gate[expert], weights.up[expert]])
        down = weights.down[expert]

        def one_block(index: Array, carry: Any) -> Any:
            d_rows, d_gates, d_wide, d_down = carry
            at = begin + index * block
            here = _rows(token, at, block)
            mine = index * block + jnp.arange(block) < size
            d_out = jnp.where(mine[:, None], dy[here], 0)
            h, u, gate = (_rows(a, at, block) for a in (h_rows, u_rows, gates))
            inner, d_h, d_u, d_here = swiglu_gradient(h, u, gate, d_out @ down)
            d_before = jnp.concatenate([d_h, d_u], axis=1)
            return (
                _put(d_rows, at, d_before @ wide),
                _put(d_gates, at, d_here),
                d_wide + _transposed_times(d_before, x[here]),
                d_down + _transposed_times(d_out, inner),
            )

        d_rows, d_gates, d_weights = carry
        start = d_rows, d_gates, jnp.zeros(wide.shape), jnp.zeros(down.shape)
        d_rows, d_gates, d_wide, d_down = lax.fori_loop(0, _blocks(size, block), one_block, start)
        d_gate, d_up = jnp.split(d_wide, 2)
        parts = SwiGLU(d_gate, d_up, d_down)
        return d_rows, d_gates, jax.tree.map(partial(_set_expert, expert), d_weights, parts)

    start = (
        jnp.zeros((rows + block, x.shape[1]), x.dtype),
        jnp.zeros(rows + block),
        jax.tree.map(jnp.zeros_like, weights),
    )
    d_rows, d_gates, d_weights = _over_experts(order.sizes, one_expert, start)
    return sum_choices(d_rows, order), d_weights, d_gates[:rows]


def _over_experts(
    sizes: Array, one_expert: Callable[[Array, Array, Array, Any], Any], start: Any
) -> Any:
    """Fold `one_expert(expert, begin, size, carry)` over the experts with rows, in order."""
    begins = jnp.cumsum(sizes) - sizes
    active = jnp.argsort(sizes == 0, stable=True)

    def body(index: Array, carry: Any) -> Any:
        expert = active[index]
        return one_expert(expert, begins[expert], sizes[expert], carry)

    return lax.fori_loop(0, (sizes > 0).sum(), body, start)


def _block_size(rows: int) -> int:
    """BLOCK, or fewer when there are not that many rows, in whole vectors of 8."""
    return min(BLOCK, -(-rows // 8) * 8)


def _blocks(size: Array, block: int) -> Array:
    return (size + block - 1) // block


def _padded(x: Array, block: int) -> Array:
    """Room for the last block to run over the end."""
    return jnp.pad(x, ((0, block),) + ((0, 0),) * (x.ndim - 1))


def _rows(x: Array, at: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, block)


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
