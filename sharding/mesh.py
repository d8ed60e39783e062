"""The mesh: devices laid out along named axes.

Axes, outermost first:

    data     replicas of everything; the slow network between slices belongs here
    fsdp     parameters and optimizer state are split over it, and so is the batch
    expert   routed experts are split over it, and so is the batch (DeepSeek-V3 section 3.2)
    context  the places of a sequence are split over it
    tensor   heads, feed-forward width and vocabulary are split over it

An axis has a size within a slice, where devices are joined by a fast network (ICI, NVLink), and one
between slices (DCN); the axis is as long as their product, the slices outermost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsjax.errors import UserError
from sharding.cpu_devices import make_cpu_devices
from sharding.torus import fill_torus

AXES = ("data", "fsdp", "expert", "context", "tensor")


def make_mesh(
    sizes: Mapping[str, int | str] | None = None,
    devices: Sequence[Any] | None = None,
    *,
    dcn: Mapping[str, int] | None = None,
    boxes: Mapping[str, Sequence[int]] | None = None,
) -> Mesh:
    """Lay devices out along `AXES`; an axis of size "auto" takes what the others leave.

    Without arguments: one mesh over all devices, everything along `fsdp`. Axis types are Auto: XLA
    propagates shardings between the constraints that the model states.

    Args:
        sizes: devices along each axis within a slice; axes left out have one.
        devices: all by default, of which a CPU has as many as are asked for; those of a described
            topology do as well.
        dcn: slices along each axis. A slice is what the devices say they are in; where they do
            not say (GPUs of older runtimes, CPUs), what one process has.
        boxes: chips of a TPU slice's torus that an axis spans, such as (4, 2, 1). All axes but one
            have a box then, or one device; that one takes what is left, with all devices of a chip.
            By default jax chooses.

    Raises:
        UserError: an axis is unknown, the sizes do not multiply to the number of devices, those
            between slices not to the number of slices, or boxes do not fill the torus.
    """
    sizes = {"fsdp": "auto"} if sizes is None else sizes
    if devices is None:
        make_cpu_devices(devices_wanted(sizes, dcn or {}))
        devices = jax.devices()
    across = _across(dcn or {}, devices)
    within = _within(sizes, len(devices), math.prod(across))
    if boxes:
        _check_names(boxes, "mesh.boxes")
        arranged = fill_torus(dict(zip(AXES, within, strict=True)), boxes, across, devices)
    else:
        arranged = _arrange(within, across, devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def devices_wanted(sizes: Mapping[str, int | str], dcn: Mapping[str, int]) -> int:
    """How many devices a mesh needs at least: an axis of size "auto" is content with one."""
    named = [int(size) for size in sizes.values() if size != "auto"]
    return math.prod([*named, *dcn.values()])


def _arrange(
    within: tuple[int, ...], across: tuple[int, ...], devices: Sequence[Any]
) -> np.ndarray:
    """Devices in the mesh's shape, neighbours of an axis near each other in the network."""

    def arrange(split: bool) -> np.ndarray:
        if math.prod(across) == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(
            within,
            across,
            devices,
            process_is_granule=not _has_slices(devices),
            allow_split_physical_axes=split,
        )

    try:
        return arrange(split=False)
    except NotImplementedError:
        # What jax says when no axis of the mesh can have a dimension of the torus to itself; they
        # share one then, at the price of longer ways.
        return arrange(split=True)


def _within(sizes: Mapping[str, int | str], devices: int, slices: int) -> tuple[int, ...]:
    """The mesh of one slice."""
    _check_names(sizes, "mesh")
    free = [name for name, size in sizes.items() if size == "auto"]
    if len(free) > 1:
        raise UserError(f"mesh: {free} are all auto; only one axis can take what is left")
    fixed = {name: int(size) for name, size in sizes.items() if size != "auto"}
    if wrong := [name for name, size in fixed.items() if size < 1]:
        raise UserError(f"mesh: {wrong[0]}={fixed[wrong[0]]}; expected a size of 1 or more")
    left = max(1, devices // slices // math.prod(fixed.values()))
    shape = tuple(left if name in free else fixed.get(name, 1) for name in AXES)
    if math.prod(shape) * slices != devices:
        wanted = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        times = f" in each of {slices} slices" if slices > 1 else ""
        raise UserError(
            f"mesh: {wanted}{times} needs {math.prod(shape) * slices} devices, but there are "
            f"{devices}; choose sizes whose product is the number of devices"
        )
    return shape


def _across(dcn: Mapping[str, int], devices: Sequence[Any]) -> tuple[int, ...]:
    """How slices lie along the axes; all ones where there is a single slice."""
    _check_names(dcn, "mesh.dcn")
    shape = tuple(int(dcn.get(name, 1)) for name in AXES)
    by_slice = _has_slices(devices)
    slices = len({d.slice_index if by_slice else d.process_index for d in devices})
    wanted = math.prod(shape)
    # GPUs and CPUs need not be told apart: their order is that of their hosts in any case.
    if wanted == 1 and not (by_slice and devices[0].platform == "tpu"):
        return shape
    if wanted != slices:
        what = "slices" if by_slice else "processes (their devices name no slice)"
        asked = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"mesh.dcn: {asked} needs {wanted} slices, but the number of {what} is {slices}; "
            f"choose sizes whose product is {slices}, such as mesh.dcn.data={slices}"
        )
    return shape


def _has_slices(devices: Sequence[Any]) -> bool:
    """Whether the devices say that they are of more than one slice."""
    return len({getattr(device, "slice_index", 0) for device in devices}) > 1


def _check_names(sizes: Mapping[str, Any], where: str) -> None:
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"{where}: unknown axis {unknown[0]!r}; expected one of {AXES}")
