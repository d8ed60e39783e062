"""docs/evaluation.md: every command of ours is understood; those on the demo run."""

import re
import shlex
from pathlib import Path

import pytest

from dsjax.cli import make_parser
from dsjax.evaluation.settings import HarnessSettings, Room, Settings, chosen
from dsjax.evaluation.tasks import MADE, READ, split_tasks
from tests.evaluation.stand_ins import ScriptedEngine, evaluate

TEXT = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(dsjax eval .*)$", TEXT, re.M) + re.findall(r"`(dsjax eval M .*?)`", TEXT)


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_understood(command):
    asked = vars(make_parser().parse_args(shlex.split(command)[1:]))
    own, theirs = split_tasks(asked["tasks"])
    assert {name.partition("=")[0] for name in own} <= set(MADE) | set(READ)
    assert own or theirs
    names = ("k", "temperature", "top_p", "max_tokens", "seed", "few_shot", "chat", "think")
    options = {name: asked[name] for name in names}
    chosen(HarnessSettings if theirs else Settings, options)
    Room(**{name: asked[name] for name in ("rows", "context", "dtype", "mesh")})


def test_all_commands_are_found():
    inline = "`dsjax eval DeepSeek-V3-Base --tasks harness:NAME --few-shot N`"
    assert len(COMMANDS) == TEXT.count("dsjax eval ") - TEXT.count(inline)


def test_the_first_command_runs(checkpoint, tmp_path, monkeypatch):
    asked = vars(make_parser().parse_args(shlex.split(COMMANDS[0])[1:]))
    assert str(asked["checkpoint"]) == "runs/cpu-tiny"
    evaluate(monkeypatch, ScriptedEngine(), checkpoint, tmp_path, *asked["tasks"],
             max_tokens=asked["max_tokens"], limit=asked["limit"])  # fmt: skip
    assert (tmp_path / "results.json").is_file()


def test_costs_follow_from_the_throughput_beside_them():
    service = re.search(r"\| ([\d,]+) a node \| \$(\d+) a GPU.*\| ([\d.]+) \|", TEXT)
    assert service is not None
    tokens, dollars, cost = (float(text.replace(",", "")) for text in service.groups())
    assert cost == pytest.approx(dollars * 8 / (tokens * 0.0036), abs=0.005)
    slice_ = re.search(r"\| ([\d.]+) x (\d+) = ([\d,]+) \| P .*\| ([\d.]+) P \|", TEXT)
    assert slice_ is not None
    each, count, tokens, cost = (float(text.replace(",", "")) for text in slice_.groups())
    assert tokens == pytest.approx(each * count, abs=0.5)
    assert cost == pytest.approx(64 / (tokens * 0.0036), abs=0.005)


def test_every_task_is_in_the_document():
    names = [n for n in [*MADE, *READ] if not n.startswith(("gym-", "arithmetic-"))]
    assert [name for name in names if f"`{name}`" not in TEXT] == []
