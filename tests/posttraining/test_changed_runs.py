"""Runs that go on with other settings: each is accepted in one line, or refused in one."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint.store import CheckpointStore
from dsjax.config_files import load_run_config, write_config
from dsjax.config_grpo import GrpoRunConfig
from dsjax.errors import UserError
from dsjax.posttraining import grpo as grpo_module
from dsjax.posttraining import sft as sft_module
from dsjax.posttraining.grpo import grpo
from dsjax.posttraining.grpo_loop import Progress
from dsjax.posttraining.grpo_picture import draw_rewards
from dsjax.posttraining.rollouts import Sampler
from dsjax.posttraining.rows import Written
from dsjax.posttraining.sft import sft
from dsjax.training import pretrain as pretrain_module
from dsjax.training.metrics import MetricsLog, read_metrics
from dsjax.training.pretrain import pretrain
from dsjax.training.run import Run, make_layout
from dsjax.training.step import kept
from sharding.rules import use_layout
from tests.posttraining import chats, grpo_runs
from tests.training import runs

QUIET = Console(quiet=True)
GRPO_STEP = {
    "tokens": 32, "reward": 0.5, "reward_old": 0.5, "solved": 0.1, "equal_groups": 0.0,
    "truncated": 0.0, "answer_tokens": 2.0, "entropy": 1.0, "kl": 0.1, "clipped": 0.0,
    "sampling_seconds": 1.0, "scoring_seconds": 1.0, "training_seconds": 1.0, "finite": True,
}  # fmt: skip
STEP = {
    "loss": 2.0, "mtp_loss": [2.0], "max_violation": [0.1], "learning_rate": 0.1,
    "tokens_per_second": 9.0, "grad_norm": 1.0, "finite": True,
}  # fmt: skip
HELD_OUT = {
    "held_out_complete": True, "held_out_loss": 2.0, "held_out_bits_per_byte": 1.0,
    "held_out_acceptance": np.nan, "held_out_max_violation": [0.1], "held_out_load": [[0.5, 0.5]],
}  # fmt: skip


def grpo_config(folder: Path, **changes: Any) -> GrpoRunConfig:
    settings = {"training__max_steps": 2, "evaluation": None} | changes
    config = load_run_config("r1/cpu-comparison", grpo_runs.overrides(folder, **settings))
    assert isinstance(config, GrpoRunConfig)
    return config


def write_log(folder: Path, *values: dict[str, Any]) -> None:
    with closing(MetricsLog(folder, 0)) as log:
        for value in values:
            log.write(2, value)


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has taken its two steps, or looks so."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    config = grpo_config(folder)
    layout = make_layout(config)
    with closing(CheckpointStore(folder / "checkpoints", 1)) as store, use_layout(layout):
        state, reference, _ = grpo_module._begin(config, layout, store, QUIET)
        extra = {"progress": asdict(Progress(2, 2, 8, 64))}
        store.save(2, state._asdict() | {"reference": reference}, extra)
    write_config(config, folder)
    write_log(folder, GRPO_STEP)
    return folder


def capture(module: Any, call: Callable[[], None]) -> Run:
    """What a task hands to the loop."""
    found: list[Run] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", lambda run, console: found.append(run))
        call()
    return found[0]


def finish(run: Run) -> None:
    """Make the run's directory look as if all its tokens had been seen."""
    folder = Path(run.config.run_dir)
    with closing(CheckpointStore(folder / "checkpoints", 1)) as store, use_layout(run.layout):
        extra = {
            "tokens": run.tokens,
            "data": run.data.get_state(),
            "model": run.config.model.model_dump(),
        }
        store.save(2, kept(run.begin()), extra)
    write_config(run.settings, folder)
    run.write_files(folder)
    write_log(folder, {"tokens": run.tokens, **STEP}, {"tokens": run.tokens, **HELD_OUT})
    run.data.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def sft_run(base: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "run"
    config = chats.config(base, talk, folder, training__microbatch_size=8, training__batch_size=8)
    finish(capture(sft_module, lambda: sft(config, QUIET)))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"), documents=10)


@pytest.fixture(scope="module")
def pretrain_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    config = runs.config(corpus, folder)
    finish(capture(pretrain_module, lambda: pretrain(config, QUIET)))
    return folder


def go_on(run: Path, folder: Path, start: Callable[[Console], None]) -> str:
    """What a run says that goes on in a copy of a run's directory."""
    shutil.copytree(run, folder)
    said = io.StringIO()
    start(Console(file=said, width=1000))
    return said.getvalue()


# Accepted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        (
            {"rewards": [{"name": "exact"}, {"name": "format"}]},
            "rewards.1 was {'weight': 0.3, 'name': 'python'",
        ),
        ({"grpo__kl_weight": 0}, "grpo.kl_weight was 0.01, is 0"),
        (
            {
                "optimizer__learning_rate": 0.5,
                "training__compute_dtype": "bfloat16",
                "evaluation": {"every_steps": 1, "prompts": 8},
                "mesh__expert": 2,
                "rewards__1__weight": 0.5,
                "grpo__group_size": 8,
                "grpo__steps_per_rollout": 1,
                "seed": 3,
                "training__max_steps": 1,
            },
            "optimizer.learning_rate.0.value was 0.001, is 0.5",
        ),
    ],
)
def test_reinforcement_goes_on_with_other_settings_and_says_so(
    changes: dict[str, Any], says: str | None, grpo_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    said = go_on(grpo_run, folder, lambda console: grpo(grpo_config(folder, **changes), console))
    lines = [line for line in said.splitlines() if "with other settings: " in line]
    assert len(lines) == (says is not None) and all(str(says) in line for line in lines)
    assert (folder / "rewards.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_reference_that_a_run_had_not_is_made_when_it_is_wanted(
    grpo_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(grpo_run, folder)
    config, without = grpo_config(folder), grpo_config(folder, grpo__kl_weight=0)
    layout = make_layout(config)
    with closing(CheckpointStore(folder / "checkpoints", 1)) as store, use_layout(layout):
        state, reference, progress = grpo_module._begin(without, layout, store, QUIET)
        assert reference is None and progress.step == 2
        store.save(3, state._asdict() | {"reference": None}, {"progress": asdict(progress)})
        store.wait()
        _, reference, progress = grpo_module._begin(config, layout, store, QUIET)
        assert reference is not None and progress.step == 2
        weights = [model.embed.weight[...] for model in (reference, state.model)]
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {
                "optimizer__clip_norm": 2.0,
                "training__microbatch_size": 16,
                "training__batch_size": 16,
                "training__remat": "keep_all",
                "evaluation__batches": 2,
                "mesh__expert": 2,
            },
            "mesh.expert was 1, is 2; optimizer.clip_norm was 1.0, is 2.0; ",
        ),
    ],
)
def test_pretraining_goes_on_with_other_settings_and_says_so(
    changes: dict[str, Any], says: str | None, corpus: Path, pretrain_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = runs.config(corpus, folder, **changes)
    said = go_on(pretrain_run, folder, lambda console: pretrain(config, console))
    assert ("with other settings: " in said) == (says is not None) and (says or "") in said


def test_a_figure_that_older_records_lack_is_drawn_as_a_gap(tmp_path: Path) -> None:
    new = {**GRPO_STEP, "reward_new": 1.0, "unscored": 0.25}
    del new["reward_old"]
    records = [{"step": n, **(GRPO_STEP if n < 5 else new)} for n in range(1, 9)]
    draw_rewards(records, tmp_path / "rewards.png", "a run")
    assert (tmp_path / "rewards.png").stat().st_size > 10_000


# Refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__hidden_size": 64}, "another model: model.hidden_size was 32, is 64; restore"),
        ({"model__rope_theta": 500.0}, "another model: model.rope_theta was 10000.0, is 500.0"),
        ({"mesh__tensor": 3}, "mesh: "),
    ],
)
def test_reinforcement_refuses_what_its_checkpoint_cannot_be(
    changes: dict[str, Any], says: str, grpo_run: Path, tmp_path: Path
) -> None:
    refuse(grpo_run, tmp_path, says, lambda folder: grpo(grpo_config(folder, **changes), QUIET))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"rank": 4, "alpha": 8}}, "another model: lora was None, is {'rank': 4"),
        ({"model__rope_theta": 500.0}, "another model: model.rope_theta was 10000.0, is 500.0"),
        ({"model__hidden_size": 32}, "model.hidden_size=32, but .* has 64, and tensors of its sh"),
        ({"data__sequence_length": 128}, "other data: .*; data.sequence_length was 256, is 128"),
    ],
)
def test_tuning_refuses_what_its_checkpoint_cannot_be(
    changes: dict[str, Any], says: str, base: Path, talk: Path, sft_run: Path, tmp_path: Path
) -> None:
    settings = {"training__microbatch_size": 8, "training__batch_size": 8} | changes

    def start(folder: Path) -> None:
        sft(chats.config(base, talk, folder, **settings), QUIET)

    refuse(sft_run, tmp_path, says, start)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__hidden_size": 32}, "another model: model.hidden_size was 64, is 32"),
        ({"data__fim_rate": 0.5}, "other data: fim_rate was .*; data.fim_rate was 0.1, is 0.5"),
        ({"data__held_out_fraction": 0.3}, "other data: .*data.held_out_fraction was 0.2, is 0.3"),
        ({"seed": 4}, "other data: seed was 0, is 4"),
    ],
)
def test_pretraining_refuses_what_its_checkpoint_cannot_be(
    changes: dict[str, Any], says: str, corpus: Path, pretrain_run: Path, tmp_path: Path
) -> None:
    def start(folder: Path) -> None:
        pretrain(runs.config(corpus, folder, **changes), QUIET)

    refuse(pretrain_run, tmp_path, says, start)


def test_another_task_in_a_runs_directory_is_refused(grpo_run: Path, tmp_path: Path) -> None:
    says = "another model: task was 'grpo', is 'pretrain'"
    corpus = runs.write_corpus(tmp_path / "corpus", documents=10)
    refuse(grpo_run, tmp_path, says, lambda folder: pretrain(runs.config(corpus, folder), QUIET))


def refuse(run: Path, tmp_path: Path, says: str, start: Callable[[Path], None]) -> None:
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match=says) as caught:
        start(tmp_path / "run")
    assert "\n" not in str(caught.value)


# A model of a checkpoint, and some of its settings ---------------------------------------------


def test_settings_that_no_tensor_depends_on_replace_the_checkpoints(
    base: Path, talk: Path, tmp_path: Path
) -> None:
    changes = {"model.eos_token_id": 1, "model.rope_theta": 500.0, "training.batch_size": 8,
               "training.microbatch_size": 8}  # fmt: skip
    config = chats.config(base, talk, tmp_path / "run", **changes)
    said = io.StringIO()
    run = capture(sft_module, lambda: sft(config, Console(file=said, width=1000)))
    began = run.begin().model.config
    assert (began.eos_token_id, began.rope_theta) == (1, 500.0)
    assert "model.rope_theta=500.0 instead of 10000.0" in said.getvalue()


# A first rollout -------------------------------------------------------------------------------


def test_a_first_rollout_without_a_score_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function is right about the made-up answer, and about no other."""
    body = "[{'<': 0, '=': 1, '>': 2}[one.text.strip()] for one in answers]"
    source = f"def reward(answers):\n    return {body}\n"
    (tmp_path / "own.py").write_text(source)

    def draw(self: Any, model: Any, prompts: Any, count: int, *others: Any) -> Any:
        one = Written((1, 2), (65, 66), (0.0, 0.0), False, None)
        return [[one] * count for _ in prompts]

    monkeypatch.setattr(Sampler, "draw", draw)
    rewards = [{"name": "exact"}, {"name": "python", "path": str(tmp_path / "own.py")}]
    says = "no value for any of the 16 answers of the first rollout: KeyError in own.py:2"
    with pytest.raises(UserError, match=says):
        grpo(grpo_config(tmp_path / "run", rewards=rewards), QUIET)
    assert read_metrics(tmp_path / "run/metrics.jsonl") == []
