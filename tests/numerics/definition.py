"""FP8 once more, from the format's definition: plain numpy, a block at a time, nothing of ours.

A byte s.eeee.mmm is (-1)^s (1 + m/8) 2^(e-7), or (-1)^s (m/8) 2^-6 where e is 0; s.1111.111 is NaN.
"""

import math
from itertools import product

import ml_dtypes
import numpy as np

BLOCKS, TILES = (128, 128), (1, 128)
"""What one scale covers: of a weight, and of activations [tokens, channels]."""


def value_of(byte):
    sign, exponent, mantissa = (-1.0) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


MAGNITUDES = np.array([value_of(byte) for byte in range(127)])
MIDPOINTS = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2


def encode(y):
    """Bytes of the nearest values, of two equally near the one with an even mantissa."""
    magnitude = np.abs(y.astype(np.float64))
    code = np.searchsorted(MIDPOINTS, magnitude, side="left")
    tie = magnitude == MIDPOINTS[np.minimum(code, MIDPOINTS.size - 1)]
    code += tie & (code % 2 == 1)
    return (code + 128 * np.signbit(y)).astype(np.uint8)


def scale_of(block, power_of_two):
    scale = np.maximum(np.abs(block).max(), np.float32(1e-4)) / np.float32(448)
    if power_of_two:
        mantissa, exponent = math.frexp(scale)
        scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
    return scale


def quantize(x, sides, power_of_two=False):
    """Bytes and scales of a float32 matrix."""
    values = np.zeros(x.shape, np.uint8)
    scales = np.zeros([math.ceil(n / side) for n, side in zip(x.shape, sides, strict=True)])
    scales = scales.astype(np.float32)
    for i, j in product(*(range(n) for n in scales.shape)):
        here = np.s_[i * sides[0] : (i + 1) * sides[0], j * sides[1] : (j + 1) * sides[1]]
        scales[i, j] = scale_of(x[here], power_of_two)
        values[here] = encode(x[here] / scales[i, j])
    return values, scales


def dequantize(values, scales, sides):
    """The exact products, rounded once, to float32."""
    rows, columns = (np.arange(n) // side for n, side in zip(values.shape, sides, strict=True))
    meant = np.array([value_of(byte) for byte in range(256)])[values]
    return (meant * scales.astype(np.float64)[rows][:, columns]).astype(np.float32)


def to_bfloat16(x):
    """Rounded to nearest, ties to even, by hand; no NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
