"""Products of groups of rows and their outer products equal their plain meaning, on every backend."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels import grouped_matmul as kernel
from dsjax.kernels import grouped_matmul_tpu as tpu
from dsjax.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_reference,
    grouped_outer,
    grouped_outer_reference,
)

pytestmark = pytest.mark.usefixtures("thorough_compiler")

SIZES = {
    "one tile": (3, 4),
    "odd": (7, 1, 30, 2, 23),
    "whole tiles": (16, 32, 16),
    "empty": (0, 0, 21, 0, 40, 0),
    "one has all": (0, 61, 0),
    "none has any": (0, 0, 0),
}
BEYOND = [0, 19]
"""Rows of no group."""


def inputs(sizes, beyond, dtype, inner=24, outer=40):
    rows = sum(sizes) + beyond
    keys = jax.random.split(jax.random.key(rows), 3)
    left = jax.random.normal(keys[0], (rows, inner)).astype(dtype)
    right = jax.random.normal(keys[1], (rows, outer)).astype(dtype)
    stack = jax.random.normal(keys[2], (len(sizes), inner, outer)).astype(dtype)
    # What is in rows of no group must not matter.
    left, right = (a.at[sum(sizes) :].set(jnp.nan) for a in (left, right))
    return left, right, stack, jnp.asarray(sizes, jnp.int32)


@pytest.fixture(params=["pallas", "plain XLA"])
def backend(request, monkeypatch):
    """The kernels of a TPU, interpreted with memory that is NaN at first; and what others run."""
    pallas = request.param == "pallas"

    def choose(*arguments, tpu, default):
        return (tpu if pallas else default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    with pltpu.force_tpu_interpret_mode():
        yield


def assert_close(found, expected, dtype):
    assert found.dtype == expected.dtype
    a, b = (np.asarray(x, np.float32) for x in (found, expected))
    scale = np.abs(b).max(initial=1)
    np.testing.assert_allclose(a, b, atol=scale * (1e-5 if dtype == jnp.float32 else 1e-2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("beyond", BEYOND)
@pytest.mark.parametrize("name", SIZES)
def test_products_equal_their_meaning(name, beyond, dtype, backend):
    sizes = SIZES[name]
    if sum(sizes) + beyond == 0:
        return
    left, right, stack, counts = inputs(sizes, beyond, dtype)
    for rows, inputs_first in ((left, True), (right, False)):
        found = grouped_matmul(rows, stack, counts, inputs_first=inputs_first)
        expected = grouped_matmul_reference(rows, stack, counts, inputs_first=inputs_first)
        assert_close(found[: sum(sizes)], expected[: sum(sizes)], dtype)
    assert_close(
        grouped_outer(left, right, counts, stack),
        grouped_outer_reference(
            jnp.nan_to_num(left), jnp.nan_to_num(right), counts, stack
        ),
        dtype,
    )
