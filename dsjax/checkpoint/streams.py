"""A tensor on its way from one dtype to another, a few megabytes at a time. Imports no jax.

FP8 that stays FP8 is carried, bits and scales. Everything that is read is checked: a weight is
finite, a scale a positive number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dsjax.checkpoint.families import FP8, Tensor
from dsjax.checkpoint.safetensors import DTYPES, Stored
from dsjax.errors import UserError
from dsjax.numerics.fp8_host import (
    BLOCK,
    check_scales,
    dequantize_into,
    quantize_into,
    scale_shape,
)

SLAB = 1 << 20
"""Numbers that are read, changed, hashed and written at a time: they stay in the processor's cache.
More only where 128 rows are more."""

STEPS = (COPY, CAST, WIDEN, QUANTIZE) = ("copy", "cast", "widen", "quantize")
"""What can happen to a tensor."""

Slab = tuple[bool, np.ndarray]
"""Whether these are scales, and some of a tensor's numbers, in the order of the file."""

# The bits of the smallest number that is not finite, its sign apart. e4m3 knows NaN only.
_NOT_FINITE = {"F32": 0x7F80_0000, "BF16": 0x7F80, "F16": 0x7C00, FP8: 0x7F}


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor and what becomes of it. `scales` belong to a source in FP8."""

    tensor: Tensor
    source: Stored
    scales: Stored | None
    dtype: str

    @property
    def step(self) -> str:
        """What happens to it."""
        if self.source.dtype == self.dtype:
            return COPY
        if self.dtype == FP8:
            return QUANTIZE
        return WIDEN if self.source.dtype == FP8 else CAST

    @property
    def bytes_in(self) -> int:
        """What is read of it."""
        return self.source.nbytes + (self.scales.nbytes if self.scales else 0)

    @property
    def value_bytes(self) -> int:
        """What its numbers take when they are written."""
        return self.tensor.size * DTYPES[self.dtype].itemsize

    @property
    def scale_bytes(self) -> int:
        """What its scales take when they are written."""
        scale = self.tensor.scale if self.dtype == FP8 else None
        return 4 * math.prod(scale[1]) if scale else 0

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.source.file}: {self.tensor.name}"


def slabs(item: Item) -> Iterator[Slab]:
    """Everything that is written of a tensor: its numbers, then its scales if it is FP8.

    Raises:
        UserError: it cannot be read, is not finite, has scales that are none, or numbers that the
            new dtype cannot hold.
    """
    if item.step == QUANTIZE:
        yield from _quantized(item)
        return
    if item.step == WIDEN:
        yield from ((False, part) for part in _widened(item))
        return
    for begin, end in _ranges(item.tensor.size, SLAB):
        part = item.source.read_flat(begin, end)
        check_finite(part, item.source.dtype, item.where, "fetch it again")
        if item.step == CAST:
            with np.errstate(over="ignore"):
                part = part.astype(DTYPES[item.dtype])
            check_finite(part, item.dtype, item.where, f"a number is too large for {item.dtype}")
        yield False, part
    if item.dtype == FP8:
        yield True, _scales(item)


def check_finite(part: np.ndarray, dtype: str, where: str, remedy: str) -> None:
    """Refuse NaN and infinity.

    By the order of the bits, read as signed and as unsigned: two passes, and no memory.

    Raises:
        UserError: there is one.
    """
    limit, bits = _NOT_FINITE[dtype], 8 * part.itemsize
    if part.size == 0:
        return
    positive = part.view(f"i{part.itemsize}").max()
    negative = part.view(f"u{part.itemsize}").max()
    if positive >= limit or negative >= limit + (1 << (bits - 1)):
        raise UserError(f"{where} holds NaN or infinity; {remedy}")


def _widened(item: Item) -> Iterator[Float[np.ndarray, "R C"]]:
    scales = _scales(item)
    rows, columns = item.tensor.shape
    for begin, end in _ranges(rows, max(SLAB // columns, 1)):
        values = item.source.read_flat(begin * columns, end * columns).reshape(-1, columns)
        out = np.empty(values.shape, DTYPES[item.dtype])
        dequantize_into(out, values, scales, item.where, (begin, 0))
        check_finite(out, item.dtype, item.where, "fetch it again")
        yield out


def _quantized(item: Item) -> Iterator[Slab]:
    rows, columns = item.tensor.shape
    scales = np.empty(scale_shape((rows, columns)), np.float32)
    at_a_time = max(SLAB // columns // BLOCK, 1) * BLOCK
    for begin, end in _ranges(rows, at_a_time):
        weight = item.source.read_flat(begin * columns, end * columns).reshape(-1, columns)
        values = np.empty(weight.shape, DTYPES[FP8])
        quantize_into(values, scales[begin // BLOCK :], weight, item.where)
        yield False, values
    yield True, scales


def _scales(item: Item) -> np.ndarray:
    assert item.scales is not None
    shape = item.scales.shape
    scales = item.scales.read_flat(0, math.prod(shape)).reshape(shape)
    check_scales(scales, item.tensor.shape, item.where)
    return scales


def _ranges(size: int, at_a_time: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, at_a_time):
        yield begin, min(begin + at_a_time, size)
