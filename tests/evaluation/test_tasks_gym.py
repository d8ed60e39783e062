"""Tasks of reasoning-gym: its answers are right here too, and its scorers are not asked."""

import sys

import pytest

from dsjax.errors import UserError
from dsjax.evaluation.tasks import open_tasks
from dsjax.evaluation.tasks_gym import GYM, SEED


@pytest.mark.parametrize("name", GYM)
def test_its_own_answers_count(name):
    gym = pytest.importorskip("reasoning_gym")
    [task] = open_tasks([f"gym-{name}"], None)
    made = gym.create_dataset(name, size=100, seed=SEED)
    assert len(task.questions) == 100
    for question, entry in zip(task.questions, made, strict=True):
        assert entry["question"].strip() in question.prompt
        vote = task.vote(f"I see.\n\nTherefore \\boxed{{{entry['answer']}}}.")
        assert vote is not None and task.check(vote, question.example)
        wrong = task.vote(f"\\boxed{{{entry['answer']} 1}}")
        assert wrong is None or not task.check(wrong, question.example)


def test_without_it_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'dsjax\[gym\]'"):
        open_tasks(["gym-maze"], None)
