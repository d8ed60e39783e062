"""Products with matrices in DeepSeek's FP8: 128 x 128 blocks, each with a scale.

DeepSeek-V3 (arXiv:2412.19437) section 3.3.2. On a TPU a matrix is widened inside of the core, by
the Pallas kernel of `block_scaled_tpu`; elsewhere, and where XLA's partitioner splits the program,
before the product.

Differs from the paper: activations stay in bfloat16.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Float8e4m3fn, Float32

from dsjax.kernels import block_scaled_tpu as tpu
from dsjax.kernels.tpu_core import alone
from dsjax.numerics.fp8 import dequantize_blocks
from dsjax.numerics.fp8_host import BLOCK
from sharding.platform import by_platform


def block_scaled_matmul(
    x: Float[Array, "T I"],
    matrix: Float8e4m3fn[Array, "I O"],
    scales: Float32[Array, "_ _"],
    first: tuple[Any, Any] = (0, 0),
) -> Float[Array, "T O"]:
    """x times the widened matrix, in the dtype of x.

    The kernel multiplies by a scale after a block's sum, in float32, and so does not round the
    widened weight to the dtype of x, as its plain meaning does.

    Args:
        scales: of all blocks of the matrix of which this one is a part.
        first: the part's first block, of inputs and of outputs.
    """
    if not alone():
        return _widened(x, matrix, scales, first)
    return by_platform(x, matrix, scales, first, tpu=tpu.block_scaled_matmul, default=_widened)


def _widened(x: Array, matrix: Array, scales: Array, first: tuple[Any, Any]) -> Array:
    places = first[0] * BLOCK, first[1] * BLOCK
    return x @ dequantize_blocks(matrix, scales, x.dtype, first=places)
