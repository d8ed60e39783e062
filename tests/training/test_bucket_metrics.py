"""Records of a run in a bucket: in parts, each step once, whatever was killed and resumed."""

import json
import math

import pytest

from dsjax.places import ObjectPath, as_path
from dsjax.training.bucket_metrics import BucketMetrics, read_records
from tests.object_store import BUCKET, ObjectStore


@pytest.fixture
def folder(store: ObjectStore) -> ObjectPath:
    path = as_path(f"gs://{BUCKET}/run")
    assert isinstance(path, ObjectPath)
    return path


def record(log: BucketMetrics, steps: range, cut: int = 2) -> None:
    """Steps, and a save after every `cut`."""
    for step in steps:
        log.write(step, {"loss": 10.0 - step, "load": [[step]]})
        if step % cut == 0:
            log.cut()


def losses(folder: ObjectPath) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(folder) if "loss" in r]


def scalars(store: ObjectStore) -> list[bytes]:
    return [data for _, data in sorted(store.tree("run/tensorboard").items())]


def test_a_part_is_written_at_each_save_and_at_the_end(
    folder: ObjectPath, store: ObjectStore
) -> None:
    log = BucketMetrics(folder, 0)
    record(log, range(1, 6))
    assert sorted(store.tree("run/metrics")) == ["00000002-0.jsonl", "00000004-0.jsonl"]
    log.close()
    assert losses(folder) == [(step, 10.0 - step) for step in range(1, 6)]
    assert store.objects["run/metrics/00000004-0.jsonl"].count(b"\n") == 2
    assert len(scalars(store)) == 3
    assert [data.count(b"loss") for data in scalars(store)] == [2, 2, 1]


def test_a_run_that_is_killed_loses_what_it_makes_again(
    folder: ObjectPath, store: ObjectStore
) -> None:
    record(BucketMetrics(folder, 0), range(1, 6))
    resumed = BucketMetrics(folder, 2)
    assert losses(folder) == [(1, 9.0), (2, 8.0)]
    assert len(scalars(store)) == 1
    record(resumed, range(3, 5))
    resumed.close()
    assert losses(folder) == [(step, 10.0 - step) for step in range(1, 5)]


def test_what_follows_the_last_save_is_kept_with_its_step(
    folder: ObjectPath, store: ObjectStore
) -> None:
    """The final evaluation, of the step that was saved; by the same run or by the next one."""
    log = BucketMetrics(folder, 0)
    record(log, range(1, 5))
    log.write(4, {"held_out_loss": 1.5, "held_out_complete": False})
    log.close()
    again = BucketMetrics(folder, 4)
    assert not again.is_evaluated
    again.write(4, {"held_out_loss": 1.25, "held_out_complete": True})
    again.close()
    assert [r.get("held_out_loss") for r in read_records(folder)] == [None] * 4 + [1.5, 1.25]
    assert len(store.tree("run/metrics")) == len(scalars(store)) == 4
    finished = BucketMetrics(folder, 4)
    assert finished.is_evaluated
    finished.close()
    assert len(read_records(folder)) == 6


def test_numbers_that_are_not_finite_are_null(folder: ObjectPath, store: ObjectStore) -> None:
    log = BucketMetrics(folder, 0)
    log.write(1, {"loss": math.nan, "finite": False})
    log.close()
    [line] = store.objects["run/metrics/00000001-0.jsonl"].splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "finite": False}


def test_a_log_without_records_writes_nothing(folder: ObjectPath, store: ObjectStore) -> None:
    log = BucketMetrics(folder, 0)
    log.cut()
    log.close()
    assert store.objects == {}
