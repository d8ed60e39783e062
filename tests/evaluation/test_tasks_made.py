"""Tasks that are made: every right answer counts, wrong and hostile ones do not."""

import itertools
import time

import pytest

from dsjax.errors import UserError
from dsjax.evaluation.puzzles import PUZZLES
from dsjax.evaluation.tasks import MADE, open_tasks
from dsjax.evaluation.tasks_made import reaches_target

OWN = [n for n in MADE if n not in ("countdown", "humaneval") and not n.startswith("gym-")]


def judge(task, question, text) -> bool:
    vote = task.vote(text)
    return vote is not None and task.check(vote, question.example)


@pytest.mark.parametrize("name", OWN)
def test_the_answer_counts_and_another_does_not(name):
    [task] = open_tasks([name], None)
    assert task.name == name and len(task.questions) >= 20
    assert len({question.id for question in task.questions}) == len(task.questions)
    assert len({question.prompt for question in task.questions}) == len(task.questions)
    for question in task.questions:
        answer = question.example["answer"]
        assert judge(task, question, f"I think 17.\n\nIt is \\boxed{{{answer}}}.")
        assert not judge(task, question, f"It is {answer}. No, \\boxed{{{answer}9}}.")
        assert not judge(task, question, "")


@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_arithmetic_is_that_of_python(level):
    [task] = open_tasks([f"arithmetic-{level}"], None)
    for question in task.questions:
        text = question.prompt.removeprefix("Calculate ").partition(". Please")[0]
        assert str(eval(text)) == question.example["answer"]


def test_strawberry_has_three():
    [task] = open_tasks(["letters"], None)
    assert task.questions[0].id == "strawberry-r"
    assert task.questions[0].example == {"answer": "3"}
    zeros = sum(question.example["answer"] == "0" for question in task.questions)
    assert 10 < zeros < 60


def test_questions_are_the_same_every_time():
    first, second = (open_tasks([*OWN, "countdown"], None) for _ in range(2))
    assert [t.questions for t in first] == [t.questions for t in second]
    digests = [question.digest for task in first for question in task.questions]
    assert len(set(digests)) == len(digests)


def test_puzzles_name_their_answers():
    assert len(PUZZLES) >= 20
    for puzzle in PUZZLES:
        assert puzzle.answer in puzzle.words if puzzle.words else puzzle.answer.isdigit()


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("surgeon", "\\boxed{The father}", True),
        ("surgeon", "\\boxed{\\text{his father}}", True),
        ("surgeon", "The surgeon is his mother. \\boxed{mother}", False),
        ("late-trolley", "**Answer: No.**", True),
        ("glass-doors", "\\boxed{\\text{door 1}}", True),
        ("glass-doors", "Switching wins in 2/3 of cases: \\boxed{2}", False),
    ],
)
def test_puzzles_take_the_usual_spellings(name, text, right):
    [task] = open_tasks(["puzzles"], None)
    [question] = (q for q in task.questions if q.id == name)
    assert judge(task, question, text) is right


def solve(numbers, target) -> str:
    """Any expression of the form ((a . b) . c) . d."""
    for order in itertools.permutations(numbers):
        for signs in itertools.product("+-*", repeat=3):
            a, b, c, d = order
            text = f"(({a}{signs[0]}{b}){signs[1]}{c}){signs[2]}{d}"
            if eval(text) == target:
                return text
    raise AssertionError("no solution")


def test_every_countdown_has_a_solution_that_counts():
    [task] = open_tasks(["countdown"], None)
    for question in task.questions:
        text = solve(**question.example)
        assert judge(task, question, f"So \\boxed{{{text} = {question.example['target']}}}.")
        assert judge(task, question, "\\boxed{" + text.replace("*", "\\times ") + "}")
        assert not judge(task, question, f"\\boxed{{{text}+1-1}}")
        assert not judge(task, question, f"\\boxed{{{question.example['target']}}}")


@pytest.mark.parametrize(
    "vote",
    [
        "9**9**9",
        "9**9**9**9",
        "__import__('os').system('true')",
        "1/0+9",
        "(" * 190 + "9" + ")" * 5,
        "9" * 190,
        "9+(9",
        "9 9",
        "9(9)",
        "",
    ],
)
def test_hostile_expressions_are_wrong_and_soon(vote):
    began = time.perf_counter()
    for example in ({"numbers": [9, 9, 9], "target": 9}, {"numbers": [], "target": 0}):
        assert not reaches_target(vote, example)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("names", "limit", "problem"),
    [
        (["leters"], None, "did you mean letters?"),
        (["letters", "letters"], None, "letters twice"),
        (["letters=x"], None, "reads no path"),
        (["gpqa"], None, "gpqa=PATH"),
        (["gpqa=none-such.csv"], None, "none-such.csv: no such file"),
        (["letters"], 0, "--limit is 0"),
    ],
)
def test_what_cannot_be_evaluated_is_said(names, limit, problem):
    with pytest.raises(UserError, match=problem.replace("?", r"\?")):
        open_tasks(names, limit)


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(UserError) as caught:
        open_tasks(["none"], None)
    for name in ("letters", "puzzles", "countdown", "gpqa=PATH", "harness:NAME"):
        assert name in str(caught.value)
