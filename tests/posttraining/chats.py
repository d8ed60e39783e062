"""Tiny conversations and checkpoints, and what turns `cpu-sft` into a run of seconds on them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from dsjax.checkpoint.save import save
from dsjax.checkpoint.source import model_of
from dsjax.checkpoint.store import CheckpointStore, abstract_on
from dsjax.config_files import load_model_config, load_run_config
from dsjax.config_sft import SftConfig
from dsjax.data.tokenizer import train_tokenizer
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from dsjax.posttraining.tuned import Tuned
from dsjax.training.step import TrainState, kept
from tests.training.runs import as_overrides

WORDS = ["def", "self", "return", "the", "user", "asks", "assistant", "answers", "x", "0", "1"]


def chat(number: int, turns: int = 1) -> dict[str, Any]:
    """A conversation of some turns, unlike the others."""
    messages = []
    for turn in range(turns):
        picks = [WORDS[(number * 5 + turn * 3 + i * i) % len(WORDS)] for i in range(6)]
        messages.append({"role": "user", "content": f"{number} " + " ".join(picks)})
        answer = " ".join(picks[: 2 + number % 4])
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def write_chats(file: Path, count: int = 40) -> Path:
    """JSONL of conversations of one to three turns."""
    lines = (json.dumps(chat(number, 1 + number % 3)) for number in range(count))
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def write_base(folder: Path, name: str = "cpu-tiny", **changes: Any) -> Path:
    """A released folder with random weights of a tiny model and a tokenizer of bytes."""
    small = {"vocab_size": 300, "num_hidden_layers": 2} | changes
    config = load_model_config(name).model_copy(update=small)
    save(Transformer(config, jax.random.key(7)), folder, "hf")
    train_tokenizer([], 261).save(folder)
    return folder


def overrides(init: Path, chats: Path, run_dir: Path, /, **changes: Any) -> list[str]:
    """The settings; `changes` use __ for the dot."""
    settings: dict[str, Any] = {
        "run_dir": str(run_dir),
        "init": str(init),
        "data.paths": [str(chats)],
        "data.sequence_length": 256,
        "data.held_out_fraction": 0.2,
        "training.loss_chunk": 64,
        "training.batch_size": 4,
        "training.microbatch_size": 4,
        "optimizer.warmup_steps": 1,
        "checkpoint.every_steps": 2,
        "evaluation.every_steps": 4,
        "evaluation.batches": 1,
    }
    return as_overrides(settings, changes)


def config(init: Path, chats: Path, run_dir: Path, /, **changes: Any) -> SftConfig:
    """The same as a configuration."""
    found = load_run_config("cpu-sft", overrides(init, chats, run_dir, **changes), model_of)
    assert isinstance(found, SftConfig)
    return found


def newest(run_dir: Path, tuned: Tuned) -> tuple[int, TrainState, dict[str, Any]]:
    """The newest checkpoint of a run: its step, `kept` of the state, and the data's place."""
    saved = kept(tuned.abstract)
    with closing(CheckpointStore(run_dir / "checkpoints", None)) as store:
        restored = store.restore(abstract_on(saved, tree_shardings(saved, tuned.layout)))
    assert restored is not None
    return restored
