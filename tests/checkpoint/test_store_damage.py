"""Damage is noticed, a killed run leaves only sound steps, and nothing is deleted too early."""

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from training_states import abstract, bits_of, make_state, save_steps

from dsjax.checkpoint import steps_on_disk
from dsjax.checkpoint.manifest import MANIFEST, verify
from dsjax.checkpoint.store import CheckpointStore
from dsjax.errors import UserError

# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def test_two_hundred_bit_flips_are_all_noticed(tmp_path: Path):
    with closing(CheckpointStore(tmp_path, keep=1)) as store:
        store.save(1, make_state(1), {"iterator": list(range(500))})
    files = sorted(path for path in (tmp_path / "00000001").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chance = random.Random(0)
    hit = set()
    with closing(CheckpointStore(tmp_path, keep=1)) as store:
        target = abstract(make_state(1))
        for _ in range(200):
            (path,) = chance.choices(files, weights=sizes)
            sound = path.read_bytes()
            flipped = bytearray(sound)
            flipped[chance.randrange(len(sound))] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=f"no sound checkpoint.*{re.escape(path.name)}"):
                store.restore(target)
            path.write_bytes(sound)
            hit.add("array data" if path.parent.name == "d" else path.name)
        assert {MANIFEST, "extra.json", "array data"} <= hit
        assert store.restore(target) is not None


def damage_by_truncation(folder: Path) -> None:
    os.truncate(folder / "extra.json", 3)


def damage_by_deletion(folder: Path) -> None:
    next((folder / "state").rglob("d/*")).unlink()


def damage_by_addition(folder: Path) -> None:
    (folder / "state" / "more").touch()


def damage_by_losing_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_by_truncation, damage_by_deletion, damage_by_addition, damage_by_losing_the_manifest],
)
def test_a_damaged_newest_step_falls_back_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
):
    save_steps(tmp_path, 10, 20)
    damage(tmp_path / "00000020")
    with closing(CheckpointStore(tmp_path, keep=3)) as store:
        step, restored, extra = store.restore(abstract(make_state(0)))
        assert (step, extra) == (10, {"step": 10})
        assert bits_of(restored) == bits_of(make_state(10))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert re.search(r"step 20 is damaged: .*; falling back to step 10$", record.message)
        with pytest.raises(UserError, match="no sound checkpoint"):
            store.restore(abstract(make_state(0)), step=20)


def test_when_every_step_is_damaged_the_user_is_told(tmp_path: Path):
    save_steps(tmp_path, 10, 20)
    for step in ("00000010", "00000020"):
        damage_by_truncation(tmp_path / step)
    with (
        closing(CheckpointStore(tmp_path, keep=3)) as store,
        pytest.raises(UserError, match=r"no sound checkpoint .*step 20 is .*step 10 is") as error,
    ):
        store.restore(abstract(make_state(0)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("next_step", [15, 20, 25])
def test_a_run_that_resumed_below_a_damaged_step_replaces_it(tmp_path: Path, next_step: int):
    save_steps(tmp_path, 10, 20)
    damage_by_truncation(tmp_path / "00000020")
    save_steps(tmp_path, next_step, keep=1)
    with closing(CheckpointStore(tmp_path, keep=1)) as store:
        assert store.steps() == [next_step]
        assert store.restore(abstract(make_state(0)))[2] == {"step": next_step}


# ---------------------------------------------------------------------------------------------
# Deleting, and being killed
# ---------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000004", "00000005"]


def test_a_step_is_deleted_only_once_the_newer_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_steps(tmp_path, 1, keep=1)
    monkeypatch.setattr(steps_on_disk, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="step 2 was not saved"):
        save_steps(tmp_path, 2, keep=1)
    assert CheckpointStore(tmp_path, keep=1).steps() == [1]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path):
    save_steps(tmp_path, 1)
    for name in ("00000002.tmp-0a1b2c3d", "00000001.old", "notes", "2.old", "00000002.tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(json.dumps({}))
    with closing(CheckpointStore(tmp_path, keep=1)) as store:
        assert store.steps() == [1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"00000001", "notes", "2.old", "00000002.tmp-mine"}


def resume_and_save_until_killed(folder: Path, resumed: Connection) -> None:
    """A run: restore the newest step, check that it is the unbroken run's, and save on."""
    store = CheckpointStore(folder, keep=2)
    found = store.restore(abstract(large_state(0)))
    step = 0
    if found is not None:
        step, state, extra = found
        assert extra == {"step": step}
        assert bits_of(state) == bits_of(large_state(step))
    resumed.send(step)
    while True:
        step += 1
        store.save(step, large_state(step), {"step": step})


def large_state(step: int) -> dict[str, Any]:
    return make_state(step, size=2**14)


def test_a_kill_at_any_moment_leaves_only_sound_steps(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dsjax.checkpoint.store", "flax.nnx", "pytest"])
    chance = random.Random(0)
    kills, inside_a_save, resumed_at = 0, 0, [0]
    while kills < 10 or inside_a_save < 5:
        receiver, sender = context.Pipe(duplex=False)
        run = context.Process(target=resume_and_save_until_killed, args=(tmp_path, sender))
        run.start()
        sender.close()
        resumed_at.append(receiver.recv())  # raises EOFError when what was restored was wrong
        time.sleep(chance.uniform(0.0, 0.5))
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        kills += 1
        inside_a_save += any(tmp_path.glob("*.tmp-*"))
        for path in tmp_path.glob("[0-9]" * 8):
            verify(path, int(path.name))
    assert resumed_at == sorted(resumed_at) and resumed_at[-1] > 0
