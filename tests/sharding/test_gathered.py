"""Weights that are gathered, and what becomes of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from sharding.by_hand import by_hand, gathered
from sharding.mesh import make_mesh
from sharding.rules import Layout, use_layout

FINE = 1 + 2**-12
"""A number that bfloat16 rounds to 1."""
AXES = ("norm", "embed")


def products(weight, wide):
    """A sum over 4 devices, each with the same factors."""
    whole = gathered(weight, AXES, jnp.bfloat16, wide=wide)
    return (whole.astype(jnp.float32) * FINE).sum(), whole


def gradient(wide, layout=None):
    weight = jnp.full((2, 8), FINE)

    def of(weight):
        return jax.grad(products, has_aux=True)(weight, wide)

    if layout is None:
        return of(weight)
    with use_layout(layout):
        place = layout.spec(AXES, weight.shape)
        whole = jax.sharding.PartitionSpec()
        return jax.jit(by_hand(of, (place,), (place, whole)))(weight)


def test_a_wide_weight_is_rounded_and_its_gradient_is_not():
    """On one device, and summed over four that gather the weight."""
    layout = Layout(make_mesh({"fsdp": 4}, jax.devices()[:4]))
    for where, times in ((None, 1), (layout, 4)):
        found, whole = gradient(True, where)
        assert found.dtype == whole.dtype == jnp.float32
        np.testing.assert_array_equal(whole, 1)
        np.testing.assert_array_equal(found, np.float32(FINE) * times)
        found, whole = gradient(False, where)
        assert (found.dtype, whole.dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(found, times)
