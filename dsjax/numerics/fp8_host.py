"""DeepSeek-V3's FP8 weights on the host, for checkpoints that stream by. No jax.

A weight [out, in] is e4m3, and each of its blocks of 128 x 128 has one float32 scale, which
multiplies; the blocks at its lower and right edge may be smaller. DeepSeek-V3 (arXiv:2412.19437)
section 3.3.2; the release calls the scales `weight_scale_inv`.

    s = max(amax |w|, 1e-4) / 448,   q = e4m3(w / s),   w' = q s

Both directions look values up, because ml_dtypes casts from and to e4m3 an element at a time. On
one core, with scales, its cast made 0.34 GB/s of bfloat16 and 0.7 of float32; tables make 1.8
and 3.5, and quantize 3.7 times as fast. numpy lets other threads run meanwhile, memory beside
the given arrays is bounded, and nothing is shared: threads may work on different tensors, or on
different slices of one.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float8e4m3fn, Float32, UInt8

from dsjax.errors import UserError

BLOCK = 128
"""Sides of a weight's block, and length of an activation's tile."""

E4M3_MAX = 448.0
"""The largest finite value: s.1111.110. The format has no infinity, and s.1111.111 is NaN."""

AMAX_FLOOR = 1e-4
"""Taken for amax where that is smaller, by DeepSeek for activations and weights alike: a block of
zeros has a scale, and no product is a denormal of float32, which XLA flushes on a CPU."""

E4M3: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
"""What each byte means."""

with np.errstate(invalid="ignore"):
    E4M3_OF_BFLOAT16 = (
        np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16).astype(E4M3).view(np.uint8)
    )
"""Each bfloat16 rounded to the nearest e4m3, ties to even, by its bits."""

LOOKUPS = 1 << 16
"""Values widened at a time: their indices stay in the second-level cache."""

WIDTH = 8 * BLOCK
"""Columns quantized at a time, over the rows of one block, for the same reason."""


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a weight, down and across; [576, 7168] has [5, 56].

    >>> scale_shape((576, 7168))
    (5, 56)
    """
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantize_into(
    out: Float[np.ndarray, "R C"],
    values: Float8e4m3fn[np.ndarray, "R C"],
    scales: Float32[np.ndarray, "_ _"],
    where: str,
    start: tuple[int, int] = (0, 0),
) -> None:
    """Widen a weight, or a slice of one: multiplied in float32, then rounded to `out`'s dtype.

    Args:
        out: float32 or bfloat16, written in place.
        values: the weight's e4m3 values, or a slice of them.
        scales: of the whole weight.
        where: file and name of the weight, for messages.
        start: row and column at which `values` begins in the weight.

    Raises:
        UserError: a scale is NaN, infinite, zero or negative, or scales do not reach far enough.
    """
    check_scales(scales, values.shape, where, start)
    if values.size == 0:
        return
    row, column = start
    rows, columns = values.shape
    block_of = (column + np.arange(columns)) // BLOCK
    table_of = 256 * (block_of - column // BLOCK)
    blocks = slice(column // BLOCK, (column + columns - 1) // BLOCK + 1)
    at_a_time = max(LOOKUPS // columns, 1)
    index = np.empty((min(at_a_time, rows), columns), np.intp)
    for begin, end in _cut_at_blocks(row, rows):
        tables = _tables(scales[(row + begin) // BLOCK, blocks], out.dtype)
        for first in range(begin, end, at_a_time):
            some = slice(first, min(first + at_a_time, end))
            here = index[: some.stop - first]
            np.add(values[some].view(np.uint8), table_of, out=here)
            # No index is out of range; "wrap" spares numpy a copy of its output.
            np.take(tables, here, out=out[some], mode="wrap")


def _cut_at_blocks(row: int, rows: int) -> list[tuple[int, int]]:
    """Begin and end of the parts of `rows` rows, the first of which is `row`, in each block."""
    cuts = [0, *range(BLOCK - row % BLOCK, rows, BLOCK), rows]
    return list(pairwise(cuts))


def _tables(scales: Float32[np.ndarray, "B"], dtype: np.dtype[Any]) -> Float[np.ndarray, "N"]:
    """The 256 values that each of a row of blocks can have, one block after the other."""
    with np.errstate(over="ignore"):  # A damaged scale: the reader of the weight finds infinity.
        return (E4M3_VALUES * scales[:, None]).astype(dtype).ravel()


def check_scales(
    scales: Float32[np.ndarray, "_ _"],
    shape: tuple[int, ...],
    where: str,
    start: tuple[int, int] = (0, 0),
) -> None:
    """Refuse scales that are not positive numbers, or too few for values of this shape.

    Raises:
        UserError: as `dequantize_into` says, whose arguments these are.
    """
    needed = scale_shape((start[0] + shape[0], start[1] + shape[1]))
    if scales.shape[0] < needed[0] or scales.shape[1] < needed[1]:
        raise UserError(
            f"{where}: values of shape {list(shape)} from {list(start)} on need scales of shape "
            f"{list(needed)}, found {list(scales.shape)}"
        )
    good = (scales > 0) & (scales < np.inf)
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise UserError(
            f"{where}: the scale of block [{row}, {column}] is {scales[row, column]}, expected a "
            f"positive number ({np.sum(~good)} of {good.size} are none); fetch it again"
        )


def quantize_into(
    values: Float8e4m3fn[np.ndarray, "R C"],
    scales: Float32[np.ndarray, "_ _"],
    weight: Float[np.ndarray, "R C"],
    where: str,
    *,
    power_of_two: bool = False,
) -> None:
    """Quantize a float32 or bfloat16 weight.

    A weight that was dequantized to float32 gives its values and scales back, if its scales were
    made like these. From bfloat16 the values come back, but under other scales, and `power_of_two`
    changes nearly all of both. So FP8 that is to stay FP8 is carried, not made again.

    Args:
        values: written in place.
        scales: of shape `scale_shape(weight.shape)`, written in place.
        weight: what to quantize.
        where: file and name of the weight, for messages.
        power_of_two: round scales up to powers of two (ue8m0).

    Raises:
        UserError: the weight holds NaN or infinity. What was written until then is void.
    """
    rows, columns = weight.shape
    for row, column in product(range(0, rows, BLOCK), range(0, columns, WIDTH)):
        here = slice(row, row + BLOCK), slice(column, column + WIDTH)
        part = weight[here].astype(np.float32)
        amax = np.maximum.reduceat(np.abs(part).max(0), np.arange(0, part.shape[1], BLOCK))
        if not np.isfinite(amax).all():
            _refuse(part, row, column, where)
        scale = np.maximum(amax, np.float32(AMAX_FLOOR)) / np.float32(E4M3_MAX)
        if power_of_two:
            scale = _round_up(scale)
        part /= np.repeat(scale, BLOCK)[: part.shape[1]]
        values[here] = _round(part)
        scales[row // BLOCK, column // BLOCK :][: scale.size] = scale


def _refuse(part: Float32[np.ndarray, "R C"], row: int, column: int, where: str) -> None:
    i, j = np.argwhere(~np.isfinite(part))[0]
    raise UserError(
        f"{where}: the value at [{row + i}, {column + j}] is {part[i, j]}; "
        "only finite weights can be stored in FP8"
    )


def _round_up(scales: Float32[np.ndarray, "B"]) -> Float32[np.ndarray, "B"]:
    """The next power of two, of normal numbers, by their bits: a logarithm would be inexact."""
    mantissa = np.uint32((1 << 23) - 1)
    return ((scales.view(np.uint32) + mantissa) & ~mantissa).view(np.float32)


def _round(x: Float32[np.ndarray, "R C"]) -> Float8e4m3fn[np.ndarray, "R C"]:
    """The nearest e4m3, ties to even.

    First to bfloat16 and to odd: what is cut off leaves a one in the last bit if it was not zero.
    That bit lies below the one that decides a tie, so the second rounding, by table, is as good
    as a single one. No quotient is above 448 by more than its own rounding: none overflows.
    """
    bits = x.view(np.uint32)
    odd = (((bits & 0xFFFF) + 0xFFFF) | bits) >> 16
    found: UInt8[np.ndarray, "R C"] = np.take(E4M3_OF_BFLOAT16, odd, mode="wrap")
    return found.view(E4M3)
