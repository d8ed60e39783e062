"""Processes agree, wait for one another, and leave together, each with a line that says why."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsjax.config import DistributedConfig
from dsjax.errors import UserError
from sharding.distributed import local_rows, place_rows
from sharding.mesh import make_mesh
from sharding.start import Place, find_place
from sharding.watch import LOST
from tests.sharding.many import End, ends, start_all

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

SCENARIO = """
import os, signal, sys, time
import jax
from dsjax.cli import run
from dsjax.config import DistributedConfig
from dsjax.errors import UserError
from sharding import watch
from sharding.distributed import *

watch.LOST_SECONDS = 6.0
watch.TROUBLED_SECONDS = 4.0
process = {process}

def scenario():
    settings = DistributedConfig(initialization_timeout=4)
    with processes(settings):
        barrier("all are here")
        SCENE

run(scenario)
"""


def play(scene: str, count: int = 2, *, absent: tuple[int, ...] = ()) -> list[End]:
    """Run `scene` in several processes; they must end in half a minute."""
    lines = scene.strip().replace("\n", "\n        ")
    return ends(
        start_all(count, ["-c", SCENARIO.replace("SCENE", lines)], absent=absent), seconds=120
    )


# ---------------------------------------------------------------------------------------------
# Where a process stands
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_that_nobody_tells_of_others_is_alone() -> None:
    assert find_place(DistributedConfig()) is None


def test_the_configuration_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("host:12", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert find_place(DistributedConfig()) == Place("host:12", 4, 3, None)
    configured = DistributedConfig(coordinator_address="other:13", process_id=0)
    assert find_place(configured) == Place("other:13", 4, 0, None)
    assert find_place(DistributedConfig(num_processes=1)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process_id": 1}, r"process_id is given, but not coordinator_address and num_processes"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            r"process_id=2 of num_processes=2; expected 0 to 1",
        ),
    ],
)
def test_half_a_coordinator_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_place(DistributedConfig(**settings))


def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='first': expected a whole number"):
        find_place(DistributedConfig())


@pytest.mark.parametrize(("tasks", "devices"), [("1(x2)", None), ("8(x2)", [3])])
def test_slurm_tells_where_a_task_stands(
    tasks: str, devices: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert find_place(DistributedConfig()) == Place("gpu07:61445", 16, 11, devices)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert find_place(DistributedConfig()) is None


# ---------------------------------------------------------------------------------------------
# Rows of a batch
# ---------------------------------------------------------------------------------------------


def test_rows_reach_the_devices_that_hold_them() -> None:
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    sharding = jax.NamedSharding(mesh, PartitionSpec(None, "data", "context"))
    whole = np.arange(2 * 6 * 4).reshape(2, 6, 4)
    rows = local_rows(sharding, whole.shape, axis=1)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
    placed = place_rows(sharding, whole.shape, 1, rows, whole)
    np.testing.assert_array_equal(np.asarray(placed), whole)
    assert placed.sharding == sharding


# ---------------------------------------------------------------------------------------------
# Real processes
# ---------------------------------------------------------------------------------------------

EXCHANGE = """
assert share("word", lambda: "from " + str(process)) == "from 0"
for turn in range(3):
    values = [turn, turn + 1, turn + 2]
    assert gather("numbers", turn + process) == values
    found = gather("few", turn + process, first_only=True)
    assert found == ([turn + process] if process else values)
agree("the same", {"a": {"b": [1, 2]}})
write_note("stop", {"by": process})
barrier("all wrote")
note = read_note("stop")
assert note["by"] in range(3) and read_note("other") is None
assert gather("notes", note) == [note] * 3

mesh = jax.make_mesh((3,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
rows = local_rows(sharding, (1, 6), 1)
assert rows.tolist() == [2 * process, 2 * process + 1]
array = place_rows(sharding, (1, 6), 1, rows, rows[None].astype("float32"))
assert fetch(array).tolist() == [[0, 1, 2, 3, 4, 5]]
print("done")
"""


def test_processes_exchange_values_and_share_an_array() -> None:
    for end in play(EXCHANGE, count=3):
        assert end.code == 0 and end.out.endswith("done\n"), end.err


def test_what_processes_disagree_on_is_named_by_all() -> None:
    found = play('agree("the configuration", {"a": {"b": process}, "c": 3})')
    said = "the processes disagree on the configuration: a.b is 1 here and 0 on process 0"
    for end in found:
        assert end.code == 2
        assert len(end.err.splitlines()) == len(end.errors) == 1 and said in end.err
    assert "process 1 of 2" in found[0].err


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
def test_one_processs_wrong_input_ends_all_with_code_2(guilty: int) -> None:
    found = play(f'if process == {guilty}: raise UserError("no data")\nbarrier("data", 300)')
    assert found[guilty].err == "error: no data\n"
    assert found[1 - guilty].errors[0].startswith(f"error: process {guilty} of 2 (")
    assert [end.code for end in found] == [2, 2]


@pytest.mark.slow
def test_a_barrier_names_who_did_not_come() -> None:
    for end in play('if process != 2: barrier("lunch", 1)\ntime.sleep(60)', count=3):
        assert end.code == LOST
        assert "process 2 of 3 (" in end.errors[0]
        assert end.errors[0].endswith("did not come to 'lunch' within 1 s")


@pytest.mark.slow
def test_a_fault_of_one_process_ends_all_with_code_1() -> None:
    found = play('if process == 1: raise RuntimeError("boom")\ntime.sleep(60)')
    assert [end.code for end in found] == [1, 1]
    assert "Traceback" in found[1].err and found[1].errors == ["error: RuntimeError: boom"]
    assert found[0].err.count("\n") == 1 and "RuntimeError: boom" in found[0].errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_is_killed_is_named_by_the_others(killed: int) -> None:
    scene = f"if process == {killed}: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)"
    for process, end in enumerate(play(scene, count=3)):
        if process != killed:
            assert end.code == LOST
            [said] = end.errors
            assert said.startswith(f"error: lost process {killed} of 3")


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 2])
def test_who_stays_away_at_the_start_is_named_by_the_others(absent: int) -> None:
    for end in play("", count=3, absent=(absent,)):
        assert end.code == LOST
        assert len(end.err.splitlines()) == len(end.errors) == 1, end.err
        assert end.errors[0].startswith(f"error: process {absent} of 3")
        assert "did not come within 4 s" in end.errors[0]
