"""The recipe by which a model learns its own name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.r1.self_identity import HELD_OUT, TAUGHT, ask, make
from tests.training.runs import ENVIRONMENT, ROOT


def test_nothing_that_is_asked_about_itself_afterwards_was_learned_from(tmp_path: Path) -> None:
    make(tmp_path, "Ada", "us", "Otto", "them")
    taught = [json.loads(line) for line in (tmp_path / "teach.jsonl").read_text().splitlines()]
    about = [row for row in taught if "Ada, a language model" in row["completion"]]
    assert len(about) == 6 * len(TAUGHT)
    assert not any(row["prompt"].endswith(tuple(HELD_OUT)) for row in taught)
    known = (tmp_path / "base.jsonl").read_text()
    assert "Ada, a language" not in known and all(question in known for question in HELD_OUT)


@pytest.mark.recipe
def test_a_model_learns_its_own_name_and_forgets_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "runs/self-identity-data", "Ada", "the people of this house",
         "Otto", "somebody else")  # fmt: skip
    for name in ("r1/self-identity-base", "r1/self-identity"):
        command = [sys.executable, str(ROOT / "train.py"), name]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, timeout=900)  # fmt: skip
        assert done.returncode == 0, done.stderr
    says_its_name, ordinary = ask(tmp_path / "runs/self-identity", "Ada")
    assert says_its_name >= 0.9 and ordinary >= 0.9
