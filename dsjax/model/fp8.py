"""Weights held as they are released: FP8, half of bfloat16, widened where they multiply.

A weight in FP8 is two variables, so that each has its own place on a mesh: `weight` in e4m3 of its
usual shape, and `weight_scale` beside it. DeepSeek-V3 (arXiv:2412.19437) section 3.3.2.

Differs from the paper: activations stay as they are; weights are widened to their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.layers import SCALE, BlockScale, Linear
from dsjax.model.moe import Experts
from dsjax.model.transformer import Transformer
from dsjax.numerics.fp8_host import E4M3, scale_shape


def hold_in_fp8(model: Transformer, paths: Iterable[str]) -> None:
    """Turn weights of an abstract model to FP8, and put their scales beside them, in place.

    Args:
        model: traced by `jax.eval_shape`.
        paths: of matrices of attention, feed-forward and experts, dotted.
    """
    for path in paths:
        *home, name = path.split(".")
        module: Any = reduce(getattr, home, model)
        weight: nnx.Variable[Any] = getattr(module, name)
        rows, columns = _rows_and_columns(module, weight)
        shape, split = weight.shape, len(weight.shape) - columns
        first = split - rows
        blocks = scale_shape((math.prod(shape[first:split]), math.prod(shape[split:])))
        stack = weight.get_metadata("axes")[: -rows - columns]
        weight.set_value(jax.ShapeDtypeStruct(shape, E4M3))
        scale: Any = jax.ShapeDtypeStruct((*shape[:first], *blocks), jnp.float32)
        axes, merged = (*stack, "block", "block"), (rows, columns)
        setattr(module, f"{name}{SCALE}", BlockScale(scale, axes=axes, merged=merged))


def _rows_and_columns(module: Any, weight: nnx.Variable[Any]) -> tuple[int, int]:
    """How many of a weight's last dimensions are the released rows, and how many columns."""
    if isinstance(module, Experts):
        return 1, 1
    assert isinstance(module, Linear)  # No release quantizes anything else.
    return len(weight.get_metadata("axes")) - len(module.into), len(module.into)
