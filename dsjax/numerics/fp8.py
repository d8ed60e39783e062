"""DeepSeek-V3's FP8 on devices: e4m3 in tiles of 1 x 128 and blocks of 128 x 128.

Each tile or block has one float32 scale, which multiplies. DeepSeek-V3 (arXiv:2412.19437) section
3.3.2, fine-grained and online quantization:

    s = max(amax |x|, 1e-4) / 448,   q = e4m3(x / s),   x' = q s

Activations are quantized per token and 128 channels, weights per 128 x 128; the last tile or block
along an axis may be smaller. `power_of_two` rounds s up to a power of two (ue8m0), which section
3.3.3 does where a tensor will be tiled again along its other axis.

e4m3 rounds to nearest, ties to even, and never overflows: x / s exceeds 448 by its own rounding at
most. A tile that holds NaN or infinity becomes NaN as a whole, and its scale is not finite.

`fp8_host` does the same in numpy, bit by bit, but for two things. Division on a CPU is exact; an
accelerator's may err in the last place of a scale, and where x / s is all but half way between two
values of e4m3. And XLA on a CPU takes products below the normal numbers of float32 for zero: under
a scale smaller than 2^-117, which none is that was made here.

Differs from the paper: the floor of amax is from DeepSeek's code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int

from dsjax.numerics.fp8_host import AMAX_FLOOR, BLOCK, E4M3, E4M3_MAX

TILE_AXES = (-1,)
BLOCK_AXES = (-2, -1)


class Quantized(NamedTuple):
    """An FP8 array: each value times the scale of its tile or block."""

    values: Float8e4m3fn[Array, "..."]
    scales: Float32[Array, "..."]


def quantize_tiles(x: Float[Array, "*batch D"], *, power_of_two: bool = False) -> Quantized:
    """Quantize activations: one scale for 128 channels of a token, [*batch, ceil(D / 128)]."""
    return _quantize(x, TILE_AXES, power_of_two)


def dequantize_tiles(
    values: Float8e4m3fn[Array, "*batch D"],
    scales: Float32[Array, "*batch _"],
    dtype: Any = jnp.float32,
) -> Float[Array, "*batch D"]:
    """Activations again: multiplied in float32, then rounded to `dtype`."""
    spread = _spread(scales, values.shape, TILE_AXES)
    return _round(values.astype(jnp.float32) * spread, dtype)


def quantize_blocks(w: Float[Array, "*stack O I"], *, power_of_two: bool = False) -> Quantized:
    """Quantize weights, each on its own: scales [*stack, ceil(O / 128), ceil(I / 128)]."""
    return _quantize(w, BLOCK_AXES, power_of_two)


def dequantize_blocks(
    values: Float8e4m3fn[Array, "..."],
    scales: Float32[Array, "*stack _ _"],
    dtype: Any = jnp.float32,
    merged: tuple[int, int] = (1, 1),
    first: tuple[Any, Any] | None = None,
) -> Float[Array, "..."]:
    """Weights again: multiplied in float32, then rounded to `dtype`.

    Args:
        values: [*stack, *rows, *columns].
        scales: of blocks of all rows by all columns, each taken as one dimension.
        dtype: what the products are rounded to.
        merged: how many of the values' last dimensions are rows, and how many columns.
        first: the first row and column of the values, which are a part of what has these scales.
    """
    begin, split = values.ndim - sum(merged), values.ndim - merged[1]
    sides = math.prod(values.shape[begin:split]), math.prod(values.shape[split:])
    spread = _spread(scales, (*values.shape[:begin], *sides), BLOCK_AXES, first)
    return _round(values.astype(jnp.float32) * spread.reshape(values.shape), dtype)


def _quantize(x: Float[Array, "..."], axes: tuple[int, ...], power_of_two: bool) -> Quantized:
    x = x.astype(jnp.float32)
    # Bits of what is not negative have its order, and NaN is the largest of them. XLA's maximum of
    # floats forgets NaN on a CPU, in arrays of some shapes.
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    for axis in axes:
        bits = _largest(bits, axis)
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    scales = _divide(jnp.maximum(amax, AMAX_FLOOR), jnp.float32(E4M3_MAX))
    if power_of_two:
        scales = _round_up(scales)
    return Quantized(_divide(x, _spread(scales, x.shape, axes)).astype(E4M3), scales)


def _round(x: Float32[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """x in `dtype`, rounded whatever follows.

    By default XLA may leave out a cast that a later one undoes (`xla_allow_excess_precision`), and
    a product would then be of numbers that are not in `dtype`. It does not touch this rounding.
    """
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


def _largest(x: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """The largest of each 128 along an axis, and of the fewer at its end; x is not negative."""
    axis %= x.ndim
    blocks = -(-x.shape[axis] // BLOCK)
    if short := blocks * BLOCK - x.shape[axis]:
        x = jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], blocks, BLOCK, *x.shape[axis + 1 :]).max(axis + 1)


def _spread(
    scales: Float32[Array, "..."],
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    first: tuple[Any, ...] | None = None,
) -> Float32[Array, "..."]:
    """Each scale wherever it applies: the shape of the values, whose places `first` may say.

    The values are left as they lie on a mesh, and the scales, of which every device has all, are
    looked up: each device finds its own. Repeated and cut to size, devices would exchange them
    wherever a part of the values ends within a block.
    """
    expected = list(shape)
    for axis in axes:
        expected[axis] = -(-shape[axis] // BLOCK)
    if first is None and list(scales.shape) != expected:
        raise ValueError(
            f"values of shape {list(shape)} need scales of shape {expected}, "
            f"found {list(scales.shape)}"
        )
    for axis, begin in zip(axes, first or (0,) * len(axes), strict=True):
        places = begin + jnp.arange(shape[axis])
        scales = jnp.take(scales, places // BLOCK, axis, mode="clip")
    return scales


def _divide(x: Float32[Array, "..."], y: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """x / y, rounded once.

    XLA turns division by a constant or by a broadcast into multiplication by a reciprocal, and half
    of all scales would miss their last bit. It leaves a divisor alone that depends on x; where x
    is NaN, the quotient is so anyway.
    """
    return x / jnp.where(jnp.isnan(x), x, y)


def _round_up(scales: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The next power of two, by the bits: a logarithm would be inexact."""
    mantissa = jnp.uint32((1 << 23) - 1)
    bits = lax.bitcast_convert_type(scales, jnp.uint32)
    rounded = lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    return jnp.where(scales < jnp.inf, rounded, scales)
