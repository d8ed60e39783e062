"""SIGKILL at any moment: what is resumed is the run that was never killed."""

import random
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax.checkpoint.store import CheckpointStore
from dsjax.data.pipeline import training_iterator
from dsjax.data.sources import open_corpus
from dsjax.data.tokenizer import load_tokenizer
from dsjax.training.metrics import read_metrics
from dsjax.training.step import init_state
from tests.forked import Forks, forks
from tests.training.runs import ENVIRONMENT, config, overrides, write_corpus

MOST_KILLS = 60
STEPS = 40
CHANGES = {
    "training__tokens": STEPS * 8 * 32,
    "checkpoint__every_steps": 1,
    "evaluation__every_steps": 10**6,
    "data__fim_rate": 0.5,
    "data__held_out_fraction": 0.0,
}


def restored(settings, run_dir: Path):
    """The newest state as host arrays, and the 20 batches that would come next."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_state(settings)),
    )
    store = CheckpointStore(run_dir / "checkpoints", 3)
    step, state, extra = store.restore(abstract)
    store.close()
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    data = training_iterator(
        open_corpus(settings.data), tokenizer, settings.data, microbatch_size=8, seed=settings.seed
    )
    data.set_state(extra["data"])
    batches = [next(data) for _ in range(20)]
    data.close()
    return step, jax.tree.map(np.asarray, state), batches


@pytest.mark.parametrize(
    ("kills", "inside_a_save"), [(3, 1), pytest.param(20, 5, marks=pytest.mark.slow)]
)
def test_a_run_killed_many_times_equals_the_unbroken_one_bitwise(kills, inside_a_save, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with forks(tmp_path / "output.txt", ENVIRONMENT) as processes:
        kill(processes, corpus, whole, broken, kills, inside_a_save)

    settings = config(corpus, whole, **CHANGES)
    (step, state, batches), (step_2, state_2, batches_2) = (
        restored(settings, run) for run in (whole, broken)
    )
    assert step == step_2 == STEPS
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(state_2), strict=True):
        assert one.tobytes() == other.tobytes()
    for one, other in zip(batches, batches_2, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        np.testing.assert_array_equal(one["segment_ids"], other["segment_ids"])
    losses = [
        [
            (record["step"], record["loss"], record["mtp_loss"])
            for record in read_metrics(run / "metrics.jsonl")
            if "loss" in record
        ]
        for run in (whole, broken)
    ]
    assert losses[0] == losses[1]


def kill(
    processes: Forks, corpus: Path, whole: Path, broken: Path, fewest: int, fewest_inside: int
) -> None:
    """One run in one piece, another in one more than its kills, some of them within a save."""

    def start(run_dir: Path) -> None:
        processes.start("train", "cpu-tiny", *overrides(corpus, run_dir, **CHANGES))

    def finish(run_dir: Path) -> float:
        begin = time.monotonic()
        start(run_dir)
        assert processes.wait(300) == 0, processes.output.read_text()
        return time.monotonic() - begin

    finish(broken)  # Only the next one finds its programs compiled.
    duration = finish(whole)
    clear(broken)
    rng = random.Random(0)
    inside = kills = 0
    while kills < fewest or inside < fewest_inside:
        assert kills < MOST_KILLS, f"only {inside} of {kills} kills met an open save"
        start(broken)
        # From the start to well among the steps and their saves; twenty such stretches together
        # are longer than the whole run.
        code = processes.wait(rng.uniform(0, duration / 2))
        if code is None:
            processes.kill()
            kills += 1
            inside += any(broken.glob("checkpoints/*.tmp-*"))
            continue
        assert code == 0, processes.output.read_text()
        clear(broken)
    finish(broken)
    print(f"{kills} kills, {inside} of them inside an open save", file=sys.stderr)


def clear(run_dir: Path) -> None:
    """It got through: begin again, so that every kill meets a run."""
    for path in (run_dir / "checkpoints").iterdir():
        shutil.rmtree(path)
