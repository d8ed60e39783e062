"""Runs of reinforcement learning from the command line: killed, resumed, measured, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint.export_config import make_config
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config_files import load_model_config, load_run_config
from dsjax.config_grpo import GrpoRunConfig
from dsjax.errors import UserError
from dsjax.posttraining.grpo import grpo, saved_state
from dsjax.training.metrics import read_metrics
from dsjax.training.run import make_layout
from tests.forked import Forks, forks
from tests.posttraining.grpo_runs import overrides
from tests.sharding.many import ROOT, ends, start_all
from tests.training.runs import ENVIRONMENT

CONFIG = "r1/cpu-comparison"
KILLS = 20
SECONDS = ("sampling_seconds", "scoring_seconds", "training_seconds")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All that a run recorded but how long it took."""
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in SECONDS} for record in found]


def newest_state(run_dir: Path) -> tuple[int, list[bytes], dict[str, Any]]:
    """The newest checkpoint: its step, every array's bytes, and the place among the questions."""
    config = load_run_config(run_dir / "config.yaml")
    assert isinstance(config, GrpoRunConfig)
    layout = make_layout(config, jax.devices()[:1])
    with closing(CheckpointStore(run_dir / "checkpoints", None)) as store:
        restored = store.restore(saved_state(config, layout))
    assert restored is not None
    step, arrays, extra = restored
    return step, [np.asarray(one).tobytes() for one in jax.tree.leaves(arrays)], extra


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_the_unbroken_one_bitwise(tmp_path: Path) -> None:
    """Parameters, moments, reference, place among the questions, and every reward on the way.

    Two steps a rollout, two inner epochs, refills and a reference that is replaced.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {
        "training__max_steps": 16,
        "grpo__steps_per_rollout": 2,
        "grpo__inner_epochs": 2,
        "grpo__refills": 1,
    }
    with forks(tmp_path / "output.txt", ENVIRONMENT) as processes:

        def start(run_dir: Path) -> None:
            processes.start("train", CONFIG, *overrides(run_dir, **changes))

        def finish(run_dir: Path) -> float:
            begin = time.monotonic()
            start(run_dir)
            assert processes.wait(300) == 0, processes.output.read_text()
            return time.monotonic() - begin

        finish(broken)  # Only the next one finds its programs compiled.
        duration = finish(whole)
        shutil.rmtree(broken)
        rng, kills = random.Random(0), 0
        while kills < KILLS:
            start(broken)
            # Twenty such stretches together are longer than the whole run.
            if processes.wait(rng.uniform(0, duration / 2)) is None:
                processes.kill()
                kills += 1
            else:  # It got through: begin again, so that every kill meets a run.
                shutil.rmtree(broken)
        finish(broken)
    print(f"\n{kills} kills of a run of {duration:.0f} s", file=sys.stderr)
    assert records(whole) == records(broken)
    assert newest_state(whole) == newest_state(broken)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_says_so_by_its_exit_code(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    settings = overrides(run_dir, training__max_steps=10_000)
    with forks(tmp_path / "output.txt", ENVIRONMENT) as processes:
        processes.start("train", CONFIG, *settings)
        wait_for_steps(processes, run_dir, 2)
        processes.send(signal.SIGTERM)
        assert processes.wait(120) == 143, processes.output.read_text()
    assert newest_state(run_dir)[0] == records(run_dir)[-1]["step"]


@pytest.mark.slow
def test_a_run_stopped_in_two_processes_and_ended_in_one_is_that_of_one_device(
    tmp_path: Path,
) -> None:
    """The same answers, and gradients but for rounding; rewards verified by both processes."""
    one, many, changes = tmp_path / "one", tmp_path / "many", {"evaluation": None}
    over_four = changes | {"mesh__fsdp": 2, "mesh__expert": 2}
    run_here(tmp_path, overrides(one, **changes), devices=1)

    arguments = [str(ROOT / "train.py"), CONFIG, *overrides(many, **over_four)]
    processes = start_all(2, arguments, devices=2)
    deadline = time.monotonic() + 300
    while not (many / "checkpoints/00000002").exists() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), ends(processes, 60)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    stopped = ends(processes, 120)
    assert [end.code for end in stopped] == [143, 143], stopped
    assert 2 <= len(records(many)) < 6
    run_here(tmp_path, overrides(many, **over_four), devices=4)

    alone, together = records(one), records(many)
    assert all(r["equal_groups"] < 1 for r in alone)
    for name in ("step", "reward", "reward_python", "answer_tokens"):
        assert [r[name] for r in alone] == [r[name] for r in together]
    for name in ("grad_norm", "entropy"):
        np.testing.assert_allclose(
            [r[name] for r in together], [r[name] for r in alone], rtol=1e-3, atol=1e-6
        )


def run_here(folder: Path, settings: list[str], devices: int) -> None:
    """A whole run in one process with so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    with forks(folder / "output.txt", ENVIRONMENT | {"XLA_FLAGS": flags}) as processes:
        processes.start("train", CONFIG, *settings)
        assert processes.wait(300) == 0, processes.output.read_text()


def wait_for_steps(processes: Forks, run_dir: Path, steps: int) -> None:
    file = run_dir / "metrics.jsonl"
    for _ in range(1200):
        if file.exists() and len(read_metrics(file)) > steps:
            return
        assert processes.wait(0.1) is None, processes.output.read_text()
    raise AssertionError("no step within two minutes")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grpo__group_size": 1}, "grpo: group_size=1: no answer is better than its group"),
        ({"rewards": [{"name": "wit"}]}, "rewards.0.*wit"),
        ({"rewards": []}, "rewards="),
        ({"sampling__temperature": 0}, "sampling.temperature=0"),
        ({"prompts__template": "no place"}, "prompts.template="),
        ({"grpo__kl_estimator": "k1"}, "grpo.kl_estimator='k1'"),
        ({"sampling__max_tokens": 60}, "prompt 1 has 9 tokens, and training.sequence_length"),
        ({"tokenizer": None}, "random weights have no tokenizer"),
        (
            {"prompts": {"path": "FILE"}},
            r"q.jsonl:2: the reward 'exact': the key 'answer' is missing",
        ),
        ({"prompts": {"path": "NONE"}}, "prompts.path: .*none.jsonl: no file matches"),
        ({"prompts": {"path": "EMPTY"}}, "expected a text or messages"),
        ({"prompts": {"path": "CHAT"}}, "the checkpoint has no chat template"),
        ({"rewards": [{"name": "python", "path": "RAISES"}]}, "raises.py.*no luck"),
        (
            {"rewards": [{"name": "exact"}, {"name": "python", "path": "ZERO"}]},
            "zero.py: called once with made-up answers, it fails: ZeroDivisionError in zero.py:2",
        ),
        ({"rewards": [{"name": "python", "path": "ONE"}]}, "one.py:1: returned 1 values for 2 ans"),
        (
            {"training__max_steps": 9, "grpo__inner_epochs": 2},
            "max_steps=9 is no multiple of the 2 steps of a rollout",
        ),
        ({"training__microbatch_size": 3}, "training.microbatch_size=3"),
        ({"prompts__held_out_fraction": 0}, "no question of comparison is held out"),
        ({"init": "MISSING"}, "missing: no such folder"),
        ({"grpo__reference": "OTHER"}, "model.vocab_size=261, but grpo.reference=.* has 512"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    files = {
        "FILE": ("q.jsonl", '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2="}\n'),
        "EMPTY": ("e.jsonl", '{"prompt": "", "answer": "2"}\n'),
        "CHAT": ("c.jsonl", '{"prompt": [{"role": "user", "content": "x"}], "answer": "2"}\n'),
        "ZERO": ("zero.py", "def reward(answers):\n    return [1 / 0 for _ in answers]\n"),
        "ONE": ("one.py", "def reward(answers): return [1.0]\n"),
        "RAISES": ("raises.py", "raise ValueError('no luck')\n"),
        "OTHER": ("other/config.json", json.dumps(make_config(load_model_config("cpu-tiny")))),
    }
    for name, text in files.values():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    paths = {key: str(tmp_path / name) for key, (name, _) in files.items()}
    paths |= {"NONE": str(tmp_path / "none.jsonl"), "MISSING": str(tmp_path / "missing")}
    paths["OTHER"] = str(tmp_path / "other")
    settings = overrides(tmp_path / "run", **changes)
    for key, path in paths.items():
        settings = [one.replace(f'"{key}"', f'"{path}"') for one in settings]
    with pytest.raises(UserError, match=says) as caught:
        config = load_run_config(CONFIG, settings)
        assert isinstance(config, GrpoRunConfig)
        grpo(config, Console(quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
