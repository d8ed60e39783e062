"""A run in several processes is the run in one: killed, restarted in other numbers, or refused."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsjax.checkpoint.store import CheckpointStore
from dsjax.training.metrics import read_metrics
from dsjax.training.step import init_state
from sharding.watch import LOST
from tests.sharding.many import ROOT, ends, start_all
from tests.training.runs import config, overrides, write_corpus

STEPS = 10
CHANGES = {
    "training__tokens": STEPS * 8 * 32,
    "checkpoint__every_steps": 1,
    "checkpoint__keep": 20,
    "evaluation__every_steps": 10**6,
    "data__held_out_fraction": 0.0,
    "data__fim_rate": 0.5,
    "data__streams": 4,
    # A moment that is rounded to the other bfloat16 moves a parameter by a 256th of this; what
    # is really wrong moves it by all of this, which is 30 times what the test lets pass.
    "optimizer__learning_rate": 2e-5,
}
IN_TWO: dict[str, Any] = {"mesh__fsdp": 2}
IN_FOUR: dict[str, Any] = {"mesh__fsdp": 2, "mesh__expert": 2}


def start(run_dir: Path, corpus: Path, count: int, *, devices: int = 1, **changes) -> list:
    settings = overrides(corpus, run_dir, **CHANGES | changes)
    return start_all(count, [str(ROOT / "train.py"), "cpu-tiny", *settings], devices=devices)


def finish(run_dir: Path, corpus: Path, count: int, *, devices: int = 1, **changes) -> None:
    for end in ends(start(run_dir, corpus, count, devices=devices, **changes), 900):
        assert end.code == 0, end.err


def wait_for(step: int, run_dir: Path, processes: list[subprocess.Popen]) -> None:
    """Return once a step is saved."""
    deadline = time.monotonic() + 900
    while not (run_dir / f"checkpoints/{step:08d}").exists():
        if any(process.poll() is not None for process in processes):
            pytest.fail(str(ends(processes, 60)))
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_one(processes: list[subprocess.Popen], run_dir: Path, step: int, victim: int) -> None:
    """SIGKILL one process once a step is saved; the others must leave in time, and say why."""
    wait_for(step, run_dir, processes)
    processes[victim].kill()
    begin = time.monotonic()
    found = ends(processes, 90)
    assert time.monotonic() - begin < 60
    for process, end in enumerate(found):
        if process != victim:
            assert end.code == LOST, end.err
            [said] = end.errors
            assert said.startswith(f"error: lost process {victim} of {len(processes)}")


def restored(corpus: Path, run_dir: Path) -> tuple[int, list[np.ndarray], dict]:
    """The newest step, its arrays, and the rest of it."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    settings = config(corpus, run_dir, **CHANGES)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_state(settings)),
    )
    store = CheckpointStore(run_dir / "checkpoints", 20)
    found = store.restore(abstract)
    store.close()
    assert found is not None
    step, state, extra = found
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(state)], extra


def losses(run_dir: Path) -> np.ndarray:
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [*range(1, STEPS + 1)]
    return np.array([[record["loss"], *record["mtp_loss"]] for record in records])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
def test_a_run_killed_and_restarted_in_other_numbers_equals_the_unbroken_one(corpus, tmp_path):
    """2 processes, then 1 on the same mesh: bitwise. 2, then 4, then 1: within rounding."""
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    finish(whole, corpus, 1, devices=2, **IN_TWO)

    kill_one(start(same, corpus, 2, **IN_TWO), same, step=4, victim=1)
    shutil.copytree(same, other)
    finish(same, corpus, 1, devices=2, **IN_TWO)
    step, state, extra = restored(corpus, whole)
    step_2, state_2, extra_2 = restored(corpus, same)
    assert step == step_2 == STEPS and extra == extra_2
    for one, two in zip(state, state_2, strict=True):
        assert one.tobytes() == two.tobytes()
    np.testing.assert_array_equal(losses(whole), losses(same))

    kill_one(start(other, corpus, 4, **IN_FOUR), other, step=7, victim=0)
    finish(other, corpus, 1)
    step_3, state_3, extra_3 = restored(corpus, other)
    assert step_3 == STEPS and extra_3 == extra
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)
    for one, three in zip(state, state_3, strict=True):
        largest = np.abs(one.astype(np.float64)).max(initial=0.0)
        near = 1e-5 if one.dtype == np.float32 else 2**-7  # a moment may be rounded otherwise
        difference = np.abs(one.astype(np.float64) - three.astype(np.float64)).max(initial=0.0)
        assert difference <= near * largest


@pytest.mark.slow
def test_sigterm_at_one_process_stops_all_at_one_step(corpus, tmp_path):
    held_out = {"data__held_out_fraction": 0.2, "evaluation__every_steps": 2}
    changes = IN_TWO | held_out | {"training__tokens": "10M"}
    processes = start(tmp_path / "run", corpus, 2, devices=1, **changes)
    wait_for(3, tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGTERM)
    found = ends(processes, 120)
    assert [end.code for end in found] == [143, 143], found
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert any("held_out_loss" in record for record in records)
    last = records[-1]["step"]
    assert (tmp_path / f"run/checkpoints/{last:08d}/manifest.json").exists()


WRONG = {
    "more devices than there are": ({"mesh__data": 4}, "needs 4 devices, but there are 2"),
    "experts that do not divide": (
        {
            "mesh__expert": 2,
            "model__n_routed_experts": 9,
            "model__n_group": 1,
            "model__topk_group": 1,
        },
        "expert=9 is not divisible by the 2 devices",
    ),
    "another seed each": (
        {"seed": "{process}"},
        "the processes disagree on the configuration: seed is 1 here",
    ),
    "a value that only one cannot read": ({"checkpoint__keep": "{process}"}, "checkpoint.keep='0'"),
    "data that one has not": ({"data__sources.0.path": "here/*.txt"}, "here/*.txt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_by_every_process_in_one_line(name, corpus, tmp_path):
    changes, expected = WRONG[name]
    settings = overrides(corpus, tmp_path / "run", **CHANGES | changes)
    (tmp_path / "1").mkdir()
    shutil.copytree(corpus, tmp_path / "0/here")
    begin = time.monotonic()
    arguments = [str(ROOT / "train.py"), "cpu-tiny", *settings]
    for end in ends(start_all(2, arguments, folder=f"{tmp_path}/{{process}}"), 60):
        assert end.code == 2, end.err
        assert len(end.err.splitlines()) == len(end.errors) == 1 and expected in end.err, end.err
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "run/config.yaml").exists()
