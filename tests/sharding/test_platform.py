"""Which implementation computes is decided while tracing, where a mesh tells."""

import jax
import jax.numpy as jnp

from sharding.mesh import make_mesh
from sharding.platform import by_platform
from sharding.rules import Layout, use_layout


def program():
    def choose(x):
        return by_platform(x, default=jnp.cos, cpu=jnp.sin, tpu=jnp.tan)

    return str(jax.make_jaxpr(choose)(1.0))


def test_the_devices_of_a_mesh_decide_and_no_branch_is_left():
    with use_layout(Layout(make_mesh({"fsdp": 2}, jax.devices()[:2]))):
        found = program()
    assert "sin" in found and "cos" not in found and "cond" not in found


def test_without_a_mesh_the_lowering_decides():
    found = program()
    assert all(name in found for name in ("sin", "cos", "tan", "cond"))
