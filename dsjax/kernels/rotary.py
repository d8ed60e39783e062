"""Rotary position embedding of heads that lie flat, one after the other.

    (x_i, x_i+P) -> (x_i cos_i - x_i+P sin_i, x_i+P cos_i + x_i sin_i),   i < P, of every 2P numbers

RoPE: arXiv:2104.09864. The gradient is the same turn backwards. On a TPU a Pallas kernel turns
whole registers of 128 numbers: XLA, which has no shape for them, would lay the array out anew.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dsjax.kernels.tpu_core import LANES, alone
from sharding.platform import by_platform

ROWS = 512
"""Places of a program, or all where there are fewer."""


@jax.custom_vjp
def rotate_flat(
    x: Float[Array, "B S N"], cos: Float[Array, "B S P"], sin: Float[Array, "B S P"]
) -> Float[Array, "B S N"]:
    """Turn the pairs of every 2P numbers, in float32; there is no gradient of the angles."""
    pairs = cos.shape[-1]
    if not alone() or LANES % (2 * pairs) or x.shape[-1] % LANES:
        return _rotate(x, cos, sin)
    return by_platform(x, cos, sin, tpu=_rotate_registers, default=_rotate)


def _forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotate_flat(x, cos, sin), (cos, sin)


def _backward(angles: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    cos, sin = angles
    return rotate_flat(dy, cos, -sin), None, None


rotate_flat.defvjp(_forward, _backward)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    rows, places, _ = x.shape
    pairs = x.reshape(rows, places, -1, 2, cos.shape[-1]).astype(jnp.float32)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


def _rotate_registers(x: Array, cos: Array, sin: Array) -> Array:
    rows, places, width = x.shape
    high, half = min(ROWS, places), cos.shape[-1]
    repeats = LANES // (2 * half)
    cos = jnp.tile(cos, 2 * repeats)
    sin = jnp.tile(jnp.concatenate([-sin, sin], axis=-1), repeats)
    tile = pl.BlockSpec((None, high, LANES), lambda row, place, part: (row, place, part))
    angle = pl.BlockSpec((None, high, LANES), lambda row, place, part: (row, place, 0))
    return pl.pallas_call(
        partial(_turn, half=half),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(rows, pl.cdiv(places, high), width // LANES),
        in_specs=[tile, angle, angle],
        out_specs=tile,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=3 * x.size,
            bytes_accessed=2 * x.nbytes + cos.nbytes + sin.nbytes,
            transcendentals=0,
        ),
        name="rotate_flat",
    )(x, cos, sin)


def _turn(x: Any, cos: Any, sin: Any, out: Any, *, half: int) -> None:
    """A register's lanes, each with the other of its pair; the sine of a first one is negative."""
    wide = x[...].astype(jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, wide.shape, 1)
    other = jnp.where(
        lane & half == 0, pltpu.roll(wide, LANES - half, 1), pltpu.roll(wide, half, 1)
    )
    out[...] = (wide * cos[...] + other * sin[...]).astype(out.dtype)
