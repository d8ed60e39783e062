"""Runs of supervised tuning: what they leave behind, resumed, spread over devices, refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import dsjax
from dsjax.checkpoint.source import model_of
from dsjax.config_files import load_run_config
from dsjax.config_sft import SftConfig
from dsjax.data.language import read_language
from dsjax.errors import UserError
from dsjax.posttraining.sft import sft
from dsjax.posttraining.tuned import Tuned
from dsjax.training.metrics import Record, read_metrics
from dsjax.training.run import make_layout
from tests.forked import Forks, forks
from tests.posttraining.chats import chat, newest, overrides, write_base, write_chats
from tests.training.runs import ENVIRONMENT

KILLS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("output") / "output.txt", ENVIRONMENT) as found:
        yield found


def tune(processes: Forks, *settings: str) -> str:
    """Run the command to its end; what it said."""
    processes.start("train", "cpu-sft", *settings)
    assert processes.wait(300) == 0, processes.output.read_text()
    return processes.output.read_text()


def records(run_dir: Path) -> list[Record]:
    """All that a run recorded but how fast it was."""
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in found]


def newest_state(run_dir: Path) -> tuple[int, list[bytes], dict[str, Any]]:
    """The newest checkpoint: its step, every array's bytes, and the place in the data."""
    config = load_run_config(run_dir / "config.yaml")
    assert isinstance(config, SftConfig)
    tuned = Tuned(config, make_layout(config, jax.devices()[:1]))
    step, arrays, extra = newest(run_dir, tuned)
    return step, [np.asarray(one).tobytes() for one in jax.tree.leaves(arrays)], extra


@pytest.fixture(scope="module")
def finished(
    base: Path, chats: Path, processes: Forks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    return run_dir, tune(processes, *overrides(base, chats, run_dir))


def test_a_run_learns_and_leaves_what_a_run_of_pre_training_does(
    finished: tuple[Path, str],
) -> None:
    run_dir, said = finished
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "training.png"):
        assert (run_dir / name).stat().st_size > 0, name
    steps = [r for r in records(run_dir) if "loss" in r]
    held_out = [r["held_out_loss"] for r in records(run_dir) if "held_out_loss" in r]
    assert steps[-1]["loss"] < steps[0]["loss"] and held_out[-1] < held_out[0]
    assert len(steps[0]["mtp_loss"]) == 1 and steps[0]["mtp_weight"] == pytest.approx(0.1)
    assert "examples of" in said and "held out" in said
    language = read_language(run_dir)
    assert language.template is not None
    [made] = dsjax.generate(dsjax.load(run_dir), [language.chat(chat(3)["messages"][:1])],
                            max_new_tokens=3)  # fmt: skip
    assert 1 <= len(made) <= 3


def test_the_model_is_the_checkpoints_where_the_configuration_names_none(
    finished: tuple[Path, str], base: Path
) -> None:
    config = load_run_config(finished[0] / "config.yaml")
    assert isinstance(config, SftConfig) and config.model == model_of(base)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bitwise_as_the_unbroken_one(
    base: Path, chats: Path, processes: Forks, tmp_path: Path
) -> None:
    settings = {"training__epochs": 4, "checkpoint__every_steps": 1}
    tune(processes, *overrides(base, chats, tmp_path / "whole", **settings))
    rng, kills = random.Random(0), 0
    for _ in range(KILLS):
        processes.start("train", "cpu-sft", *overrides(base, chats, tmp_path / "run", **settings))
        if processes.wait(rng.uniform(2, 12)) is not None:
            break
        processes.kill()
        kills += 1
    tune(processes, *overrides(base, chats, tmp_path / "run", **settings))
    assert kills > 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert newest_state(tmp_path / "run") == newest_state(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_with_adapters_over_four_devices_is_that_of_one(
    base: Path, chats: Path, processes: Forks, tmp_path: Path
) -> None:
    """With all weights it is pre-training's step, whose marks of targets have a test on meshes."""
    lora = {"rank": 4, "alpha": 8}
    tune(processes, *overrides(base, chats, tmp_path / "one", lora=lora))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2}
    with forks(tmp_path / "output.txt", ENVIRONMENT | {"XLA_FLAGS": flags}) as others:
        tune(others, *overrides(base, chats, tmp_path / "four", lora=lora, **mesh))
    one, four = records(tmp_path / "one"), records(tmp_path / "four")
    for name in ("loss", "mtp_loss", "grad_norm", "held_out_loss"):
        pairs = [(r[name], f[name]) for r, f in zip(one, four, strict=True) if name in r]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__paths": []}, "data.paths="),
        ({"data__paths": ["NONE"]}, "none.jsonl: no file matches"),
        ({"data__paths": ["UNANSWERED"]}, "u.jsonl:2: no answer of the assistant is to be trained"),
        ({"data__paths": ["FIELD"]}, "f.jsonl:1: the keys are prompt, text; expected `messages`"),
        ({"data__chat_template": None}, "has no chat template; name one by data.chat_template"),
        ({"data__chat_template": "none"}, "data.chat_template=none: no such file"),
        ({"data__chat_template": "SILENT"}, "does not write an assistant's message as it is"),
        ({"data__chat_template": "PICKY"}, r"chats.jsonl:1: .*no numbers; change it"),
        ({"data__sequence_length": 16}, "sequence_length=16: all .* examples are longer"),
        ({"data__held_out_fraction": 1e-9}, "holds out 0 of 40 conversations"),
        ({"training__epochs": 0}, "training.epochs=0"),
        ({"training__microbatch_size": 3}, "batch_size=8 is not a multiple"),
        ({"init": "NONE"}, "none.jsonl: no such folder"),
        ({"model": "cpu-tiny"}, "model.vocab_size=512, but .* has 300, and tensors of its shape"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    changes: dict[str, Any], says: str, base: Path, chats: Path, tmp_path: Path
) -> None:
    question = {"role": "user", "content": "hi"}
    files = {
        "UNANSWERED": ("u.jsonl", f"{json.dumps(chat(1))}\n{json.dumps({'messages': [question]})}"),
        "FIELD": ("f.jsonl", json.dumps({"prompt": "hi", "text": "no"})),
        "SILENT": ("silent.jinja", "{% for m in messages %}{{ m.role }}{% endfor %}"),
        "PICKY": (
            "picky.jinja",
            "{% for m in messages %}{% if m.content[0] in '0123456789' %}"
            "{{ raise_exception('no numbers') }}{% endif %}{{ m.content }}{% endfor %}",
        ),
    }
    for name, text in files.values():
        (tmp_path / name).write_text(f"{text}\n")
    paths = {key: str(tmp_path / name) for key, (name, _) in files.items()}
    paths["NONE"] = str(tmp_path / "none.jsonl")
    eight = {"training__batch_size": 8, "training__microbatch_size": 8}
    settings = overrides(base, chats, tmp_path / "run", **eight | changes)
    settings = ["model=cpu-tiny" if one.startswith("model=") else one for one in settings]
    for key, path in paths.items():
        settings = [one.replace(f'"{key}"', f'"{path}"') for one in settings]
    with pytest.raises(UserError, match=says) as caught:
        config = load_run_config("cpu-sft", settings, model_of)
        assert isinstance(config, SftConfig)
        sft(config, Console(quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
