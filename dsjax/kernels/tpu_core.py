"""What the kernels for a TPU must know of its cores, and where they can be used."""

from __future__ import annotations

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

LANES = 128
"""Numbers side by side in a register."""

MEMORY_LIMIT = 56 * 2**20
"""Bytes of a core's memory for a kernel, with what the compiler adds to its blocks.

A core has 64 MiB on v5p and TPU7x, 128 on v5e and v6e.
"""

LEAST_ROWS = 64
"""A matrix unit takes a tile of weights no faster than it would multiply so many rows by it."""


def matrix_unit() -> int:
    """Its width, of the mesh's chips, or of jax's own where there is no mesh; or v5's.

    There may be no such chip: the kernels of a TPU are traced, not compiled, on every backend.
    """
    return pltpu.get_tpu_info().mxu_column_size if pltpu.is_tpu_device() else LANES


def alone() -> bool:
    """Whether arrays here are those of one device: XLA cannot split a kernel of ours over several.

    They are without a mesh, or in a `shard_map` over all of its axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return all(mesh.shape[axis] == 1 or axis in mesh.manual_axes for axis in mesh.axis_names)


def left_in_memory(matrix: Array) -> Array:
    """A matrix that a kernel reads itself: XLA would first move it to the core, if it has room."""
    return pltpu.with_memory_space_constraint(matrix, pltpu.HBM)
