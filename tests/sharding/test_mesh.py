"""Meshes follow slices, and impossible ones are refused on one line that says what would do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dsjax.config import DcnConfig, MeshConfig
from dsjax.errors import UserError
from sharding.mesh import AXES, make_mesh


class Device(SimpleNamespace):
    """As much of a device as a mesh looks at."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def tpus(slices: int, cores: int = 1) -> list[Any]:
    """Slices of 2x2x4 chips, v5p's or with more devices each, as a described topology has them."""
    return [
        Device(
            platform="tpu",
            device_kind="TPU v5",
            id=cores * (16 * number + 4 * z + 2 * y + x) + core,
            coords=(x, y, z),
            core_on_chip=core,
            slice_index=number,
            process_index=4 * number + z,
        )
        for number in range(slices)
        for z in range(4)
        for y in range(2)
        for x in range(2)
        for core in range(cores)
    ]


def gpus(hosts: int) -> list[Any]:
    """Hosts of four, that name no slice."""
    return [
        Device(platform="gpu", device_kind="H100", id=number, process_index=number // 4)
        for number in range(4 * hosts)
    ]


def test_the_configuration_has_every_axis() -> None:
    assert tuple(DcnConfig.model_fields) == AXES
    assert tuple(MeshConfig.model_fields) == (*AXES, "dcn", "boxes", "cpu_devices")


def test_axes_are_long_by_slices_and_devices_and_slices_are_outermost() -> None:
    mesh = make_mesh({"fsdp": "auto", "tensor": 2}, tpus(2), dcn={"fsdp": 2})
    assert dict(mesh.shape) == dict(data=1, fsdp=16, expert=1, context=1, tensor=2)
    of_slice = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (of_slice[:, :8] == 0).all() and (of_slice[:, 8:] == 1).all()
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_an_axis_takes_a_part_of_a_dimension_where_it_must() -> None:
    mesh = make_mesh({"fsdp": 8, "tensor": 2}, tpus(1))
    assert dict(mesh.shape) == dict(data=1, fsdp=8, expert=1, context=1, tensor=2)
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_processes_are_slices_where_devices_name_none() -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, gpus(2), dcn={"data": 2})
    assert [[d.process_index for d in part.flat] for part in mesh.devices] == [[0] * 4, [1] * 4]
    assert make_mesh({"fsdp": "auto"}, gpus(2)).shape["fsdp"] == 8


def test_an_axis_spans_boxes_of_the_torus_and_another_takes_what_is_left() -> None:
    boxes = {"expert": [2, 1, 2]}
    mesh = make_mesh({"fsdp": "auto", "expert": 4}, tpus(2, cores=2), dcn={"data": 2}, boxes=boxes)
    assert dict(mesh.shape) == dict(data=2, fsdp=8, expert=4, context=1, tensor=1)
    devices = mesh.devices[:, :, :, 0, 0]
    assert len(set(devices.flat)) == 64
    for number, of_slice in enumerate(devices):
        assert {device.slice_index for device in of_slice.flat} == {number}
        for group in of_slice:
            x, y, z = ({device.coords[axis] for device in group} for axis in range(3))
            assert x == {0, 1} and len(y) == 1 and z in ({0, 1}, {2, 3})
            assert len({device.core_on_chip for device in group}) == 1


@pytest.mark.parametrize(
    ("sizes", "devices", "boxes", "message"),
    [
        ({"expert": 4}, gpus(1), {"expert": [4]}, "gpu has no torus; leave them out"),
        ({"fsdp": 8, "tensor": 2}, tpus(1), {"exprt": [2]}, "mesh.boxes: unknown axis 'exprt'"),
        ({"fsdp": 8, "tensor": 2}, tpus(1), {"data": [1]}, r"\['fsdp', 'tensor'\] have none"),
        ({"fsdp": 4, "expert": 4}, tpus(1), {"expert": [2]}, "expert has 4 devices and a box of 2"),
        ({"fsdp": 4, "expert": 4}, tpus(1), {"expert": [4]}, r"\[4\]} do not fill 2x2x4"),
        ({"expert": 16}, tpus(1), {"expert": [2, 2, 2]}, "expert has 16 devices and a box of 8"),
        ({"expert": 32}, tpus(1, cores=2), {"expert": [2, 2, 8]}, "do not fill 2x2x4 chips"),
    ],
)
def test_boxes_that_do_not_fill_the_torus_are_refused(
    sizes: dict, devices: list, boxes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_mesh(sizes, devices, boxes=boxes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "devices", "dcn", "message"),
    [
        ({}, tpus(2), {"stage": 2}, r"mesh.dcn: unknown axis 'stage'; expected one of \('data'"),
        ({}, tpus(2), {}, r"needs 1 slices, but the number of slices is 2; .* mesh.dcn.data=2"),
        ({}, tpus(2), {"data": 3}, r"data 3 .* needs 3 slices, but the number of slices is 2"),
        ({}, gpus(3), {"fsdp": 2}, r"needs 2 slices, but the number of processes .* is 3"),
        ({"fsdp": 32}, tpus(2), {"data": 2}, r"in each of 2 slices needs 64 devices, .* are 32"),
        ({"fsdp": "auto", "data": "auto"}, gpus(1), {}, r"\['fsdp', 'data'\] are all auto"),
        ({"tensor": 0}, gpus(1), {}, r"tensor=0; expected a size of 1 or more"),
        ({"fsdp": 8}, gpus(1), {}, r"needs 8 devices, but there are 4; choose sizes"),
    ],
)
def test_impossible_meshes_are_refused(sizes: dict, devices: list, dcn: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_mesh(sizes, devices, dcn=dcn)
    assert "\n" not in str(error.value)
