"""Tiny runs for tests: a small corpus, the smallest model, and the command that trains it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.config import PretrainConfig
from dsjax.config_files import load_pretrain_config

ROOT = Path(__file__).resolve().parents[2]

# Runs of their own process use one device, as a laptop would.
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}

WORDS = [
    "def",
    "return",
    "import",
    "class",
    "self",
    "for",
    "in",
    "if",
    "else",
    "not",
    "print",
    "len",
]


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """Text files that differ from one another, and compress."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        picks = [WORDS[(number * 7 + i * i + i // 3) % len(WORDS)] for i in range(120)]
        (folder / f"{number:03d}.txt").write_text(f"# {number}\n" + " ".join(picks) + "\n")
    return folder


def overrides(corpus: Path, run_dir: Path, **changes: Any) -> list[str]:
    """What turns `cpu-tiny` into a run of seconds; `changes` use __ for the dot."""
    settings: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data.sources": [{"kind": "text", "path": f"{corpus}/*.txt"}],
        "data.sequence_length": 32,
        "data.held_out_fraction": 0.2,
        "model.vocab_size": 300,
        "model.num_hidden_layers": 2,
        "training.tokens": 6 * 8 * 32,
        "training.batch_size": 8,
        "training.microbatch_size": 8,
        "optimizer.warmup_steps": 2,
        "checkpoint.every_steps": 2,
        "evaluation.every_steps": 3,
        "evaluation.batches": 1,
    }
    return as_overrides(settings, changes)


def as_overrides(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Settings with changes, whose names use __ for the dot, as the command line takes them."""
    changed = {**settings, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"{name}={json.dumps(value)}" for name, value in changed.items()]


def config(corpus: Path, run_dir: Path, **changes: Any) -> PretrainConfig:
    """The same as a configuration."""
    return load_pretrain_config("cpu-tiny", overrides(corpus, run_dir, **changes))


def train_command(corpus: Path, run_dir: Path, **changes: Any) -> list[str]:
    """The same as a command line."""
    settings = overrides(corpus, run_dir, **changes)
    return [sys.executable, str(ROOT / "train.py"), "cpu-tiny", *settings]


def train(corpus: Path, run_dir: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        train_command(corpus, run_dir, **changes),
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
