"""Mesh axes laid out in boxes of a TPU slice's torus.

What a group of devices exchanges takes the links of the dimensions along which its chips differ. So
a box says which links an axis has, and how far its devices are from one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.errors import UserError


def fill_torus(
    sizes: Mapping[str, int],
    boxes: Mapping[str, Sequence[int]],
    across: Sequence[int],
    devices: Sequence[Any],
) -> np.ndarray:
    """Devices in the mesh's shape, an axis that has a box in boxes of so many chips.

    One axis may have none: it takes what is left of the torus, and all devices of a chip.

    Args:
        sizes: of all axes within a slice, outermost first.
        boxes: up to three sizes for some of them.
        across: slices along each axis.

    Raises:
        UserError: boxes have other sizes than their axes, do not fill the torus, or there is none.
    """
    if devices[0].platform != "tpu":
        raise UserError(f"mesh.boxes: {devices[0].platform} has no torus; leave them out")
    for name, box in boxes.items():
        if math.prod(box) != sizes[name]:
            raise UserError(
                f"mesh.boxes: {name} has {sizes[name]} devices and a box of {math.prod(box)} "
                "chips; choose one of as many, or leave the box out"
            )
    if len(free := [name for name, size in sizes.items() if size > 1 and name not in boxes]) > 1:
        raise UserError(f"mesh.boxes: {free} have none; only one axis can take what is left")
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    parts = [_fill_one(sizes, boxes, free, slices[number]) for number in sorted(slices)]
    blocks = np.stack(parts).reshape(*across, *sizes.values())
    return _interleave(blocks, 2).reshape(np.multiply(across, [*sizes.values()]))


def _fill_one(
    sizes: Mapping[str, int],
    boxes: Mapping[str, Sequence[int]],
    free: Sequence[str],
    devices: Sequence[Any],
) -> np.ndarray:
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    torus = np.empty(places.max(axis=0) + 1, object)
    torus[tuple(places.T)] = devices
    # How long each axis is along each dimension of the torus, and within a chip.
    lengths = {name: np.array([*[*boxes.get(name, ()), 1, 1, 1][:3], 1]) for name in sizes}
    left, more = np.divmod(torus.shape, np.prod([*lengths.values()], axis=0))
    if more.any():
        chips = "x".join(map(str, torus.shape[:-1]))
        raise UserError(f"mesh.boxes: {dict(boxes)} do not fill {chips} chips; choose divisors")
    for name in free:
        lengths[name] = lengths[name] * left
    split = np.array([*lengths.values()])  # [mesh axis, dimension]
    return _interleave(torus.reshape(split.T.ravel()), torus.ndim).reshape([*sizes.values()])


def _interleave(array: np.ndarray, groups: int) -> np.ndarray:
    """Of dimensions in so many groups the first of each, then the second of each, and so on."""
    return array.transpose(np.arange(array.ndim).reshape(groups, -1).T.ravel())
