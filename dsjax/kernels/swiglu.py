"""The experts' activation and its gradient, elementwise, in float32 inside.

a = g silu(h) u,   silu(h) = h sigmoid(h),   silu'(h) = sigmoid(h) (1 + h (1 - sigmoid(h)))
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class SwiGLU(NamedTuple):
    """Matrices of E experts (or their gradients)."""

    gate: Float[Array, "E F D"]
    up: Float[Array, "E F D"]
    down: Float[Array, "E D F"]

    def astype(self, dtype: DTypeLike) -> SwiGLU:
        """All three in another dtype."""
        return SwiGLU(*(matrix.astype(dtype) for matrix in self))


def swiglu(
    h: Float[Array, "N F"], u: Float[Array, "N F"], gates: Float[Array, "N"]
) -> Float[Array, "N F"]:
    """What enters the down projection."""
    h32, u32 = h.astype(jnp.float32), u.astype(jnp.float32)
    return (jax.nn.silu(h32) * u32 * gates[:, None]).astype(h.dtype)


def swiglu_gradient(
    h: Float[Array, "N F"],
    u: Float[Array, "N F"],
    gates: Float[Array, "N"],
    d: Float[Array, "N F"],
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N"]]:
    """The activation again, and the gradients of h, u and gates, given that of the activation."""
    h32, u32, d32 = (a.astype(jnp.float32) for a in (h, u, d))
    sigmoid = jax.nn.sigmoid(h32)
    silu = h32 * sigmoid
    ungated = silu * u32
    d_gates = (d32 * ungated).sum(-1)
    d32 *= gates[:, None]
    d_h = d32 * u32 * (sigmoid + silu * (1 - sigmoid))
    a, d_h, d_u = (v.astype(h.dtype) for v in (ungated * gates[:, None], d_h, d32 * silu))
    return a, d_h, d_u, d_gates
