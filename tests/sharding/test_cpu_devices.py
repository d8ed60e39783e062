"""A CPU is as many devices as a mesh asks for: each test in a process that has none yet."""

import os
import subprocess
import sys

import pytest

MESH = "from sharding.mesh import make_mesh; print(make_mesh({sizes}).devices.size)"
DEMO = """
from rich.console import Console
from dsjax.config_files import load_pretrain_config
from dsjax.training.run import make_layout, together
config = load_pretrain_config("cpu-demo", {overrides})
with together(config, Console(quiet=True)):
    print(make_layout(config).mesh.shape["data"])
"""


def said_by(code: str, **environment: str) -> str:
    """The last line of what a fresh Python says to this."""
    clean = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("sizes", [{"data": 2}, {"expert": 2, "tensor": 2}])
def test_a_mesh_has_the_devices_that_it_asks_for(sizes):
    assert said_by(MESH.format(sizes=sizes)) == str(2 ** len(sizes))


def test_devices_start_collectives_in_one_order():
    code = f"{MESH.format(sizes={'data': 2})}; import os; print(os.environ['XLA_FLAGS'])"
    assert "--xla_cpu_enable_concurrency_optimized_scheduler=false" in said_by(code)


@pytest.mark.parametrize(
    "said",
    [
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        {"JAX_NUM_CPU_DEVICES": "3"},
    ],
    ids=["in XLA_FLAGS", "to jax"],
)
def test_who_has_said_how_many_there_are_is_obeyed(said):
    code = MESH.format(sizes={"expert": 2})
    assert "needs 2 devices, but there are 3" in said_by(code, **said)


def test_a_mesh_far_too_large_makes_no_devices():
    code = MESH.format(sizes={"expert": 512})
    assert "needs 512 devices, but there are 1" in said_by(code)


@pytest.mark.parametrize(("overrides", "devices"), [([], 2), (["mesh.cpu_devices=1"], 1)])
def test_the_demo_takes_as_many_devices_as_it_is_told(overrides, devices):
    assert said_by(DEMO.format(overrides=overrides)) == str(devices)
