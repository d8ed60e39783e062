"""Tiny runs of rejection sampling, over an engine that answers by a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsjax.config_files import load_sample_config
from dsjax.data.tokenizer import load_tokenizer
from dsjax.inference import opening
from dsjax.inference.request import Request
from dsjax.posttraining.sample import sample
from tests.evaluation.stand_ins import ScriptedEngine
from tests.serving.checkpoints import write_checkpoint

FILES = ("answers.jsonl", "sft.jsonl", "summary.json")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sampled") / "tiny")


def write_config(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """A configuration; `changes` replace its sections."""
    tree: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "output": str(folder / "out"),
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "rewards": [{"name": "exact"}],
        "sampling": {"k": 3, "max_tokens": 24, "rows": 4},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree | changes))
    return path


def write_prompts(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> list[Any]:
    """The files of a run, byte for byte but for how fast it was."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["tokens_per_second"]
    return [summary, *((folder / name).read_bytes() for name in FILES[:2])]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """`dsjax sample` over an engine that answers by a script."""

    def run(engine: ScriptedEngine, *overrides: str, **changes: Any) -> Path:
        monkeypatch.setattr(opening, "open_engine", lambda *_, **__: engine)
        path = write_config(tmp_path, checkpoint, **changes)
        config = load_sample_config(path, overrides)
        sample(config, Console())
        return Path(config.output)

    return run


def says(checkpoint: Path, *texts: str) -> Callable[[Request], list[int]]:
    """The texts, the n-th for sample n, each ended by eos."""
    tokenizer = load_tokenizer(checkpoint)
    eos = tokenizer.eos_id
    assert eos is not None
    return lambda request: [*tokenizer.encode(texts[int(request.id.rpartition("/")[2])]), eos]


def write_sums(folder: Path, count: int) -> None:
    write_prompts(folder, *({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(count)))
