"""The routed experts where each device of a mesh axis owns some of them, and tokens travel.

    y_t = sum_d sum_{k: expert k of t lives on d} g_tk expert_k(x_t)

A device adds up what its experts make of a token before it sends it back, so a token crosses to a
device as one row and comes back as one, and at most min(K, n) are added here. `sharding`'s
`expert_parallel` tells which rows travel when, and why memory is bounded at any imbalance.

The gradient is one rule for all of it. The forward pass keeps its arguments and nothing else: the
backward pass sends x again, together with dy, makes the pre-activations again where the experts are
(DeepSeek-V3, arXiv:2412.19437, section 3.3.3 keeps them; here they would have to be kept for as
many tokens as may come), and sends back the gradients of x and of the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.kernels.experts import multiply, multiply_gradient
from dsjax.kernels.permutation import VisitorOrder, sort_visitors
from dsjax.kernels.rows import send_rows, sum_rows, unwritten
from dsjax.kernels.swiglu import SwiGLU
from dsjax.kernels.usual import usual_rows, usual_turns
from sharding.expert_parallel import (
    Journey,
    Window,
    count_rounds,
    exchange,
    exchange_whole,
    plan_journey,
    usual_visits,
)
from sharding.platform import by_platform

Sums = TypeVar("Sums")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def routed_experts_over(
    axis: str,
    reach: int,
    x: Float[Array, "T D"],
    weights: SwiGLU,
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
) -> Float[Array, "T D"]:
    """`routed_experts` for this device's tokens, with the experts of all devices along `axis`.

    Called inside a `jax.shard_map`. Where the width F is split over another axis, the result is a
    partial sum, for the caller to add up.

    Args:
        axis: the mesh axis, of n devices, that the experts are split over in order.
        reach: on how many devices the experts of a token are at most, n or fewer. Only plans are
            made with it.
        x: this device's tokens; in their dtype is computed.
        weights: the matrices of this device's E/n experts; in their dtype is the gradient of them.
        experts: the K experts of each token, counted over all devices; one may come twice.
        gates: what each choice counts.
    """
    return _forward(axis, reach, x, weights, experts, gates)[0]


PARTS = 2
"""Parts of a TPU's tokens that travel one behind the other in the forward pass, so that rows of the
one are on their way while experts compute the other's. The backward pass has gradients of weights
to compute meanwhile, and smaller groups of rows would cost it more than they hide."""

KEPT = "rounds of experts"
"""The name of a few numbers that are worth keeping: all devices had to be asked for them."""


class _Saved(NamedTuple):
    x: Array
    weights: SwiGLU
    experts: Array
    gates: Array
    rounds: Array
    given: Array
    """Nothing, in the dtype of the matrices as they came."""


class _Round(NamedTuple):
    """One round as this device sees it: what it sends, and who has come."""

    window: Window
    visitors: VisitorOrder
    gates: Array
    """Of the visitors' pairs, as `visitors` sorts them."""
    arrived: Array
    """How many rows each device has sent here."""


def _forward(
    axis: str, reach: int, x: Array, given: SwiGLU, experts: Array, gates: Array
) -> tuple[Array, _Saved]:
    weights, tokens = given.astype(x.dtype), (x, experts, gates)
    parts = list(zip(*(jnp.array_split(a, min(PARTS, len(x))) for a in tokens), strict=True))
    destinations = [part // len(weights.gate) for _, part, _ in (tokens, *parts)]
    rounds = checkpoint_name(count_rounds(destinations, lax.axis_size(axis)), KEPT)
    plan = partial(_plan, axis, weights)
    travel = partial(_travel, axis, reach)

    def whole() -> Array:
        return travel(weights, rounds[0], plan(experts), x, experts, gates)

    def in_parts() -> Array:
        journeys = [plan(experts) for _, experts, _ in parts]
        first = [
            _introduce(axis, journey, 0, weights, experts, gates)
            for journey, (_, experts, gates) in zip(journeys, parts, strict=True)
        ]
        # A few numbers go before rows, and wait for none.
        rows, first = lax.optimization_barrier(([x for x, _, _ in parts], first))
        y = [
            travel(weights, rounds[1 + i], journeys[i], rows[i], experts, gates, first[i])
            for i, (_, experts, gates) in enumerate(parts)
        ]
        return jnp.concatenate(y)

    y = by_platform(default=whole, tpu=in_parts)
    dtype = jnp.zeros((0,), given.gate.dtype)
    return y, _Saved(x, weights, experts, gates, rounds[0], dtype)


def _travel(
    axis: str,
    reach: int,
    weights: SwiGLU,
    rounds: Array,
    journey: Journey,
    x: Array,
    experts: Array,
    gates: Array,
    first: _Round | None = None,
) -> Array:
    """Tokens to their experts and back, added up; `first` is their first round, if it is known."""
    send = partial(_send, axis, reach, experts)

    def one_round(index: Array | int, y: Array | None) -> Array:
        known = first if isinstance(index, int) else None
        now = known or _introduce(axis, journey, index, weights, experts, gates)
        rows = send(send_rows(x, now.window.token_of_row), now.window.rows, now.arrived)
        with usual_rows(gates.size):
            out, _ = multiply(_flat(rows), weights, now.visitors, now.gates)
        back = send(out.reshape(rows.shape), now.arrived, now.window.rows)
        return _plus(y, sum_rows(_flat(back), journey.rows_of(index)))

    return _fold_rounds(rounds, one_round, x)


def _backward(axis: str, reach: int, saved: _Saved, dy: Array) -> tuple[Array, SwiGLU, None, Array]:
    weights, experts, rounds, given = saved.weights, saved.experts, saved.rounds, saved.given
    # The barrier keeps XLA from seeing that x travelled before, and keeping what arrived till now.
    # Weights, which may still be on their way, do not wait before it.
    x, gates, dy = lax.optimization_barrier((saved.x, saved.gates, dy))
    journey = _plan(axis, weights, experts)
    send = partial(_send, axis, reach, experts)

    def one_round(
        index: Array | int, sums: tuple[Array, SwiGLU, Array] | None
    ) -> tuple[Array, SwiGLU, Array]:
        dx, into, d_gates = sums or (None, None, None)
        now = _introduce(axis, journey, index, weights, experts, gates)
        x_rows, dy_rows = (
            send(send_rows(a, now.window.token_of_row), now.window.rows, now.arrived)
            for a in (x, dy)
        )
        with usual_rows(gates.size):
            d_rows, d_weights, d_pairs = multiply_gradient(
                _flat(x_rows),
                weights,
                now.visitors,
                now.gates,
                None,
                _flat(dy_rows),
                into,
                given.dtype,
            )
        back = send(d_rows.reshape(x_rows.shape), now.arrived, now.window.rows)
        d_pairs = exchange_whole(axis, d_pairs[now.visitors.row_of_pair])
        # A few numbers go before the matrices' gradients, whose sum over devices fills the links.
        d_weights, d_pairs = lax.optimization_barrier((d_weights, d_pairs))
        return (
            _plus(dx, sum_rows(_flat(back), journey.rows_of(index))),
            d_weights,
            _plus(d_gates, journey.pick_pairs(index, d_pairs)),
        )

    like = x, jax.eval_shape(lambda: weights.astype(given.dtype)), gates
    dx, d_weights, d_gates = _fold_rounds(rounds, one_round, like)
    return dx, d_weights, None, d_gates


routed_experts_over.defvjp(_forward, _backward)


def _plan(axis: str, weights: SwiGLU, experts: Array) -> Journey:
    return plan_journey(experts // len(weights.gate), lax.axis_size(axis))


def _send(
    axis: str, reach: int, experts: Array, rows: Array, sent: Array, received: Array
) -> Array:
    tokens, choices = experts.shape
    with usual_rows(round(tokens * usual_visits(choices, lax.axis_size(axis), reach))):
        return exchange(axis, rows, sent, received, unwritten)


def _fold_rounds(
    rounds: Array, one_round: Callable[[Array | int, Sums | None], Sums], like: Sums
) -> Sums:
    """Fold `one_round(index, sums)` over as many rounds, as a rule one.

    Sums are in float32, and in the dtypes of `like` in the end. The first round stands outside of
    the loop, for its exchange to run beside work that does not need it (the shared expert), and for
    sums of one round to be what it gives, without a copy in float32. A CPU overlaps nothing, and
    has less to compile where all are in the loop.
    """

    def shortened(sums: Sums) -> Sums:
        return jax.tree.map(lambda a, b: a.astype(b.dtype), sums, like)

    def others(_: Array, sums: Sums) -> Sums:
        exact = jax.tree.map(lambda a: a.astype(jnp.float32), sums)
        with usual_turns(0):
            return shortened(lax.fori_loop(1, rounds, one_round, exact))

    def all_in_one() -> Sums:
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), like)
        return shortened(lax.fori_loop(0, rounds, one_round, zeros))

    def with_first_outside() -> Sums:
        sums = shortened(one_round(0, None))
        with usual_turns(0):  # as a branch that is not taken would be, but sums stay in place
            return lax.fori_loop(0, jnp.minimum(rounds - 1, 1), others, sums)

    return by_platform(cpu=all_in_one, default=with_first_outside)


def _plus(total: Array | None, more: Array) -> Array:
    return more if total is None else total + more.astype(total.dtype)


def _introduce(
    axis: str,
    journey: Journey,
    index: Array | int,
    weights: SwiGLU,
    experts: Array,
    gates: Array,
) -> _Round:
    """Tell each device which pairs this round's rows bring, all in one message."""
    window, count = journey.pack(index), len(weights.gate)
    expert = jnp.where(window.real, experts.ravel()[window.pair] % count, count)
    gate = lax.bitcast_convert_type(gates.astype(jnp.float32), jnp.int32).ravel()[window.pair]
    message = jnp.concatenate([expert, window.row_of_pair, gate, window.pairs_of_row], axis=1)
    message = exchange_whole(axis, message.astype(jnp.int32))
    ends = [journey.room.pairs * n for n in (1, 2, 3)]
    expert, row, gate, pairs = jnp.split(message, ends, axis=1)
    visitors, pair = sort_visitors(expert, row, pairs, count, experts.shape[1])
    gate = lax.bitcast_convert_type(gate, jnp.float32).ravel()[pair]
    return _Round(window, visitors, gate, (pairs > 0).sum(1))


def _flat(rows: Array) -> Array:
    return rows.reshape(-1, rows.shape[-1])
