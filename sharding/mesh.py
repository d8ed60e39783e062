"""The mesh: devices laid out along named axes.

Axes, outermost first:

    data     replicas of everything; the slow network between slices belongs here
    fsdp     parameters and optimizer state are split over it, and so is the batch
    expert   routed experts are split over it, and so is the batch (DeepSeek-V3 section 3.2)
    context  the places of a sequence are split over it
    tensor   heads, feed-forward width and vocabulary are split over it
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from dsjax.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")


def make_mesh(
    sizes: Mapping[str, int | str] | None = None,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Lay devices out along `AXES`; an axis of size "auto" takes what the others leave.

    Axis types are Auto: XLA propagates shardings between the constraints that the model states.
    Without arguments: one mesh over all devices, everything along `fsdp`.

    Raises:
        UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"fsdp": "auto"} if sizes is None else sizes
    if unknown := set(sizes) - set(AXES):
        raise UserError(f"mesh: unknown axis {sorted(unknown)[0]!r}; expected one of {AXES}")
    free = [name for name, size in sizes.items() if size == "auto"]
    if len(free) > 1:
        raise UserError(f"mesh: {free} are all auto; only one axis can take what is left")
    fixed = {name: int(size) for name, size in sizes.items() if size != "auto"}
    left = max(1, len(devices) // math.prod(fixed.values()))
    shape = tuple(left if name in free else fixed.get(name, 1) for name in AXES)
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"mesh: {wanted} needs {math.prod(shape)} devices, but there are {len(devices)}; "
            "choose sizes whose product is the number of devices"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
