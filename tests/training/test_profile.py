"""A trace holds the steps that were asked for, and nothing of the others."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsjax.config import ProfileConfig
from dsjax.places import as_path
from dsjax.training.profile import StepProfiler
from tests.object_store import BUCKET, ObjectStore


@pytest.fixture(scope="module")
def advance() -> Callable:
    return jax.jit(lambda x: x + 1)


def run(profiler: StepProfiler, advance: Callable, steps: range) -> None:
    state = jnp.zeros(3)
    for number in steps:
        with profiler.step(number, state):
            state = advance(state)
    profiler.close()


def traced(data: list[bytes]) -> set[int]:
    """The numbers of the steps in a trace."""
    events = [event for d in data for event in json.loads(gzip.decompress(d))["traceEvents"]]
    return {int(e["args"]["step_num"]) for e in events if e.get("name") == "train"}


def written(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*.trace.json.gz")]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(range(1, 8), {3, 4}), (range(1, 4), {3}), (range(3, 6), {3, 4})],
    ids=["a run", "a run that ends within", "a run resumed just before"],
)
def test_the_steps_that_are_asked_for_are_traced(
    steps: range, expected: set[int], advance: Callable, tmp_path: Path
) -> None:
    run(StepProfiler(ProfileConfig(start_step=3, steps=2), tmp_path), advance, steps)
    assert traced(written(tmp_path / "profile")) == expected
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("config", "steps"),
    [(None, range(1, 4)), (ProfileConfig(start_step=3, steps=2), range(4, 8))],
    ids=["not asked for", "resumed beyond it"],
)
def test_otherwise_nothing_is_written(
    config: ProfileConfig | None, steps: range, advance: Callable, tmp_path: Path
) -> None:
    run(StepProfiler(config, tmp_path), advance, steps)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_of_a_run_in_a_bucket_is_put_there(store: ObjectStore, advance: Callable) -> None:
    folder = as_path(f"gs://{BUCKET}/run")
    run(StepProfiler(ProfileConfig(start_step=1, steps=1), folder), advance, range(1, 4))
    found = [d for name, d in store.tree("run/profile").items() if name.endswith("trace.json.gz")]
    assert traced(found) == {1}
