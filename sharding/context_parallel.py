"""Where the places of a sequence lie when it is split over devices, and how they go round a ring.

Causal attention gives a late place more work than an early one. So a sequence of S places is cut
into 2n chunks, and device i of the n along the axis holds chunks i and 2n - 1 - i, in this order:

    device       0     1     2     3
    chunks      0 7   1 6   2 5   3 4

Every device then has as many pairs of query and key as any other (Llama 3, arXiv:2407.21783,
section 3.3.2). The functions on arrays run inside `jax.shard_map`.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from dsjax.errors import UserError

T = TypeVar("T")


def check_context(sequence_length: int, devices: int) -> None:
    """Refuse a sequence that does not divide into the chunks of a context axis of `devices`.

    Raises:
        UserError: it does not.
    """
    chunks = 2 * devices
    if devices == 1 or sequence_length % chunks == 0:
        return
    below = sequence_length - sequence_length % chunks
    lengths = [str(length) for length in (below, below + chunks) if length]
    raise UserError(
        f"a sequence of {sequence_length} places does not divide into the 2 x {devices} chunks of "
        f"{devices} devices along mesh axis 'context'; choose a length of {' or '.join(lengths)}, "
        "or a smaller context axis"
    )


def chunks_of(
    device: int | Int[Array, ""], devices: int
) -> tuple[int | Int[Array, ""], int | Int[Array, ""]]:
    """The two chunks of a device, the earlier one first.

    >>> [chunks_of(device, 4) for device in range(4)]
    [(0, 7), (1, 6), (2, 5), (3, 4)]
    """
    return device, 2 * devices - 1 - device


def local_places(x: Shaped[Array, "..."], axis: str, dim: int = 1) -> Array:
    """This device's two chunks of an array that it holds whole: dimension `dim` from S to S / n.

    Raises:
        UserError: S does not divide into 2n chunks.
    """
    devices = lax.axis_size(axis)
    if devices == 1:
        return x
    check_context(x.shape[dim], devices)
    size = x.shape[dim] // (2 * devices)
    chunks = chunks_of(lax.axis_index(axis), devices)
    parts = [lax.dynamic_slice_in_dim(x, chunk * size, size, dim) for chunk in chunks]
    return jnp.concatenate(parts, axis=dim)


def all_places(x: Shaped[Array, "..."], axis: str, dim: int = 1) -> Array:
    """The whole array again, in order, on every device: the inverse of `local_places`.

    Its memory is that of the whole sequence: for results, not for activations of a step.
    """
    devices = lax.axis_size(axis)
    if devices == 1:
        return x
    early, late = jnp.split(lax.all_gather(x, axis), 2, axis=dim + 1)
    chunks = jnp.concatenate([early, late[::-1]])
    ordered = jnp.moveaxis(chunks, 0, dim)
    return ordered.reshape(*x.shape[:dim], devices * x.shape[dim], *x.shape[dim + 1 :])


def pass_on(held: T, axis: str) -> T:
    """Give the arrays of a pytree to the next device of the ring, and have those of the one before.

    After t times device i has what device i - t (mod n) had; after n times everything is at home.
    """
    devices = lax.axis_size(axis)
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, ring), held)
