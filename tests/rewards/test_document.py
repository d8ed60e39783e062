"""docs/rewards.md is true: its configurations are read, its code runs, its table is complete."""

import re
from pathlib import Path

import pytest
import yaml
from test_score import Recipe

from dsjax.config_files import parse
from dsjax.config_rewards import NAMES, PythonReward
from dsjax.rewards.answer import Answer
from dsjax.rewards.score import Scorer

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/rewards.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.S | re.M)


def test_every_reward_stands_in_the_table():
    assert tuple(re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.M)) == NAMES


def test_the_configurations_are_read():
    names = [
        [reward.name for reward in parse(Recipe, yaml.safe_load(block), "docs").rewards]
        for block in blocks("yaml")
    ]
    assert names == [["math", "format", "language", "length"], ["python"]]


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    (source,) = (block for block in blocks("python") if "print(" in block)
    exec(source, {})
    assert capsys.readouterr().out.strip() in DOCUMENT


def test_the_function_scores(tmp_path: Path):
    (source,) = (block for block in blocks("python") if "def brevity" in block)
    (tmp_path / "my_rewards.py").write_text(source)
    reward = PythonReward(path=str(tmp_path / "my_rewards.py"), function="brevity")
    answers = [Answer("", "", tokens, False, {"budget": 10}) for tokens in (5, 15)]
    with Scorer([reward]) as scorer:
        assert [score.total for score in scorer.score(answers)] == [1.0, 0.0]
