"""The routed experts: a SwiGLU for every (token, choice) pair, with a gradient written by hand.

    y_t = sum_k g_tk W_down^e (silu(W_gate^e x_t) * W_up^e x_t),   e = experts_tk

Pairs are rows sorted by expert, so each product is that of a group of rows with one matrix.
Matrices keep the released layout [experts, out, in]. No pair is dropped: memory is that of T x K
rows at any imbalance. The backward pass finds x and the two pre-activations and makes the rest
again (DeepSeek-V3, arXiv:2412.19437, section 3.3.3, keeps the same).

On a CPU, XLA lowers a grouped product to one of every group with every row; `experts_blocked` does
only the useful work there. Elsewhere rows are gathered, and `grouped_matmul` multiplies them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.kernels import experts_blocked
from dsjax.kernels.grouped_matmul import grouped_matmul, grouped_outer
from dsjax.kernels.permutation import Order, VisitorOrder, sort_by_expert
from dsjax.kernels.rows import take_rows
from dsjax.kernels.swiglu import SwiGLU, swiglu, swiglu_gradient
from sharding.platform import by_platform


def routed_experts_reference(
    x: Float[Array, "T D"],
    weights: SwiGLU,
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
) -> Float[Array, "T D"]:
    """The meaning of `routed_experts`: every pair with its own copy of its three matrices."""
    gate, up, down = (matrix[experts] for matrix in weights)
    inner = jax.nn.silu(jnp.einsum("td,tkfd->tkf", x, gate)) * jnp.einsum("td,tkfd->tkf", x, up)
    return jnp.einsum("tkf,tkdf,tk->td", inner, down, gates.astype(x.dtype))


@jax.custom_vjp
def routed_experts(
    x: Float[Array, "T D"],
    weights: SwiGLU,
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
) -> Float[Array, "T D"]:
    """sum_k gate_k * expert_k(x) for every token.

    The gate multiplies the narrow inner activation: the same sum, for F numbers instead of D.

    Args:
        x: tokens; in their dtype is computed.
        weights: all experts' matrices, stacked; in their dtype is the gradient of them.
        experts: the K experts of each token; the same one may come twice.
        gates: what each choice counts.
    """
    return _forward(x, weights, experts, gates)[0]


class _Saved(NamedTuple):
    """What the backward pass needs."""

    x: Array
    weights: SwiGLU
    order: Order
    gates: Array
    before: tuple[Array, Array]
    """W_gate x and W_up x of every row, [N, F] each."""
    given: Array
    """Nothing, in the dtype of the matrices as they came."""


def _forward(x: Array, given: SwiGLU, experts: Array, gates: Array) -> tuple[Array, _Saved]:
    weights = given.astype(x.dtype)
    order = sort_by_expert(experts, weights.gate.shape[0])
    y, before = multiply(x, weights, order, gates.ravel()[order.pair_of_row])
    return y, _Saved(x, weights, order, gates, before, jnp.zeros((0,), given.gate.dtype))


def _backward(saved: _Saved, dy: Array) -> tuple[Array, SwiGLU, None, Array]:
    order = saved.order
    gates = saved.gates.ravel()[order.pair_of_row]
    dx, d_weights, d_gates = multiply_gradient(
        saved.x, saved.weights, order, gates, saved.before, dy, None, saved.given.dtype
    )
    return dx, d_weights, None, d_gates[order.row_of_pair].astype(saved.gates.dtype)


routed_experts.defvjp(_forward, _backward)


def multiply(
    x: Float[Array, "T D"],
    weights: SwiGLU,
    order: Order | VisitorOrder,
    gates: Float[Array, "N"],
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "N F"], Float[Array, "N F"]]]:
    """The sum of each token's pairs; and W_gate x and W_up x of every pair.

    Pairs stand as `order` sorts them, and so do their gates.
    """
    return by_platform(
        x, weights, order, gates, cpu=experts_blocked.forward, default=_forward_grouped
    )


def multiply_gradient(
    x: Float[Array, "T D"],
    weights: SwiGLU,
    order: Order | VisitorOrder,
    gates: Float[Array, "N"],
    before: tuple[Float[Array, "N F"], Float[Array, "N F"]] | None,
    dy: Float[Array, "T D"],
    into: SwiGLU | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, "T D"], SwiGLU, Float[Array, "N"]]:
    """Gradients of x, weights and gates, given `multiply`'s second result and the gradient of y.

    Args:
        before: made again from x where it is None.
        into: what the gradient of the matrices is added to; None is zeros.
        dtype: of that gradient where nothing is added to; else it has that of `into`.
    """
    return by_platform(
        x,
        weights,
        order,
        gates,
        before,
        dy,
        into,
        cpu=partial(experts_blocked.backward, dtype=dtype),
        default=partial(_backward_grouped, dtype=dtype),
    )


# ---------------------------------------------------------------------------------------------
# TPU and GPU: grouped products
# ---------------------------------------------------------------------------------------------


def _forward_grouped(
    x: Array, weights: SwiGLU, order: Order | VisitorOrder, gates: Array
) -> tuple[Array, tuple[Array, Array]]:
    rows = take_rows(x, order.token_of_row, order.sizes.sum())
    h, u = _before(rows, weights, order.sizes)
    inner = swiglu(h, u, gates)
    out = grouped_matmul(order.sizes, (inner, weights.down), inputs_first=False, apart=True)
    return order.sum_choices(out), (h, u)


def _before(rows: Array, weights: SwiGLU, sizes: Array) -> tuple[Array, Array]:
    h, u = (
        grouped_matmul(sizes, (rows, m), inputs_first=False) for m in (weights.gate, weights.up)
    )
    return h, u


def _backward_grouped(
    x: Array,
    weights: SwiGLU,
    order: Order | VisitorOrder,
    gates: Array,
    before: tuple[Array, Array] | None,
    dy: Array,
    into: SwiGLU | None,
    dtype: DTypeLike,
) -> tuple[Array, SwiGLU, Array]:
    token, sizes = order.token_of_row, order.sizes
    rows, d_out = (take_rows(a, token, sizes.sum()) for a in (x, dy))
    h, u = _before(rows, weights, sizes) if before is None else before
    d_inner = grouped_matmul(sizes, (d_out, weights.down), inputs_first=True)
    inner, d_gate, d_up, d_gates = swiglu_gradient(h, u, gates, d_inner)
    d_rows = grouped_matmul(
        sizes, (d_gate, weights.gate), (d_up, weights.up), inputs_first=True, apart=True
    )
    factors = (d_gate, rows), (d_up, rows), (d_out, inner)
    stacks = into or (None, None, None)
    d_weights = SwiGLU(
        *(
            grouped_outer(*pair, sizes, stack, dtype)
            for pair, stack in zip(factors, stacks, strict=True)
        )
    )
    return order.sum_choices(d_rows), d_weights, d_gates
