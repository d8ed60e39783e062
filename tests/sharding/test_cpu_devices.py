"""A CPU is as many devices as a mesh asks for: each test in a process that has none yet."""

import os
import subprocess
import sys

import pytest

MAKE = "from sharding.mesh import make_mesh; print(make_mesh({sizes}).devices.size)"


def devices_of(sizes: dict[str, int], flags: str = "") -> str:
    """What comes of this mesh: how many devices it has, or why there is none."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MAKE.format(sizes=sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("sizes", [{"data": 2}, {"expert": 2, "tensor": 2}])
def test_a_mesh_has_the_devices_that_it_asks_for(sizes):
    assert devices_of(sizes) == str(2 ** len(sizes))


def test_flags_that_say_how_many_there_are_are_obeyed():
    said = devices_of({"expert": 2}, "--xla_force_host_platform_device_count=3")
    assert "needs 2 devices, but there are 3" in said


def test_a_mesh_far_too_large_makes_no_devices():
    assert "needs 512 devices, but there are 1" in devices_of({"expert": 512})


def test_devices_start_collectives_in_one_order():
    code = (
        "import os; from sharding.mesh import make_mesh; make_mesh({'data': 2});"
        "print(os.environ['XLA_FLAGS'])"
    )
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "--xla_cpu_enable_concurrency_optimized_scheduler=false" in done.stdout
