"""The user's own reward function: called once before a run, and never failing in silence."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsjax.config_rewards import FormatReward, PythonReward
from dsjax.errors import UserError
from dsjax.rewards.answer import Answer
from dsjax.rewards.failures import count_failures, describe_failures, refuse_total_failure
from dsjax.rewards.jail import Outcome
from dsjax.rewards.namespaces import Limits
from dsjax.rewards.own_code import call_function, import_function
from dsjax.rewards.score import Score, Scorer
from dsjax.rewards.user_function import UserFunction
from tests.rewards.test_score import answer

ANSWERS = [Answer("p", text, number, False, {}) for number, text in enumerate("abc")]
HERE = Path(__file__).resolve()


def called(function: Any) -> Any:
    """What a jail is told of a call, without the jail."""
    read, write = os.pipe()
    call_function(function, ANSWERS, HERE, write)
    with os.fdopen(read) as file:
        return json.load(file)


def at(function: Any) -> str:
    return f"{HERE.name}:{function.__code__.co_firstlineno}"


async def _later(answers: list[Answer]) -> list[float]:
    await asyncio.sleep(0)
    return [float(one.tokens) for one in answers]


def _prints(answers: list[Answer]) -> list[int]:
    print("some words")
    return [one.tokens for one in answers]


def _yields(answers: list[Answer]) -> Iterator[int]:
    yield from range(len(answers))


def _threads(answers: list[Answer]) -> list[float]:
    found = [0.0] * len(answers)
    each = [threading.Thread(target=found.__setitem__, args=(n, float(n))) for n in range(3)]
    for thread in each:
        thread.start()
        thread.join()
    return found


class _Torch:
    """A scalar such as torch's, which is no number but has one."""

    def __init__(self, value: float):
        self.value = value

    def item(self) -> float:
        return self.value


@pytest.mark.parametrize(
    "function",
    [
        lambda answers: [0, 1.0, 2],
        lambda answers: (False, True, Decimal(2)),
        lambda answers: np.arange(3),
        lambda answers: [np.float32(0), np.array(1), np.array([2.0])],
        lambda answers: [_Torch(0.0), _Torch(1.0), Fraction(4, 2)],
        lambda answers: map(float, range(3)),
        _later,
        _prints,
        _yields,
        _threads,
    ],
)
def test_every_form_of_three_numbers_is_three_numbers(function: Any) -> None:
    assert called(function) == [[0.0, ""], [1.0, ""], [2.0, ""]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "returned nan"),
        (-float("inf"), "returned -inf"),
        (np.float32("nan"), "returned nan"),
        (None, "returned None"),
        ("1.0", "returned a str"),
        (1j, "returned a complex"),
        ([1.0], "returned a list"),
        (np.ones(2), "returned a ndarray"),
        (10**400, "returned a int"),
    ],
)
def test_an_answer_without_a_number_has_a_reason_and_the_others_their_values(
    value: Any, said: str
) -> None:
    def function(answers: list[Answer]) -> list[Any]:
        return [1.0, value, 2.0]

    assert called(function) == [[1.0, ""], [0.0, f"{said} in {at(function)}"], [2.0, ""]]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned 1 values for 3 answers"),
        ([1.0] * 4, "returned 4 values for 3 answers"),
        (np.ones((1, 3)), "returned 1 values for 3 answers"),
        (None, "returned None"),
        (1.0, "returned 1.0"),
        (np.array(1.0), "returned array(1.)"),
        ("123", "returned '123'"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned {0: 1.0"),
        ({1.0, 2.0, 3.0}, "returned {1.0"),
    ],
)
def test_what_is_no_list_of_as_many_is_an_error_of_the_function(returned: Any, said: str) -> None:
    def function(answers: list[Answer]) -> Any:
        return returned

    told = called(function)["wrong"]
    assert told.startswith(f"{at(function)}: {said}")
    assert told.endswith("expected a list of one number for each answer, in their order")


def _raises(error: BaseException) -> Any:
    def function(answers: list[Answer]) -> list[float]:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\nlines"), "ValueError in {} (two lines)"),
        (KeyError(), "KeyError in {}"),
        (SystemExit(0), "SystemExit in {} (0)"),
        (KeyboardInterrupt(), "KeyboardInterrupt in {}"),
        (ValueError("x" * 9999), "ValueError in {} (" + "x" * 200 + ")"),
    ],
)
def test_an_exception_is_told_by_its_line(error: BaseException, said: str) -> None:
    function = _raises(error)
    line = f"{HERE.name}:{function.__code__.co_firstlineno + 1}"
    assert called(function) == {"raised": said.format(line)}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\n1 / 0", "ZeroDivisionError in own.py:2 (division by zero)"),
        ("import nothing_of_this_name", "ModuleNotFoundError in own.py:1 (No module"),
        ("from .beside import x", "ImportError in own.py:1 (attempted relative import"),
        ("\ndef reward(:", "SyntaxError in own.py:2 (invalid syntax"),
        ("import sys\nsys.exit(3)", "SystemExit in own.py:2 (3)"),
        ("def other(answers): pass", "it has no function 'reward', but other; name one by"),
        ("reward = 3", "it has no function 'reward', but none at all"),
        ("def reward(): pass", "reward in own.py:1: it is called with one argument, a list of ans"),
        (
            "\ndef reward(prompts, completions, **kwargs): pass",
            "reward in own.py:2: it is called with one argument, a list of answers, and cannot be: "
            "missing a required argument: 'completions'",
        ),
    ],
)
def test_a_file_of_no_use_is_told_by_its_line(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(UserError) as raised:
        import_function(tmp_path / "own.py", "reward")
    assert said in str(raised.value)


# In a jail -------------------------------------------------------------------------------------

OWN = '''
import beside, os, time, socket

def reward(answers):
    """One value for each."""
    values = []
    for answer in answers:
        if answer.text == "hang":
            while True: pass
        if answer.text == "raise":
            raise KeyError("x")
        if answer.text == "leave":
            os._exit(0)
        if answer.text == "fork":
            os.fork()
        values.append(beside.worth(answer.text) + answer.tokens * answer.example["bonus"])
    return values

def short(answers):
    return [1.0]

def online(answers):
    socket.create_connection(("127.0.0.1", int(answers[0].text)), 5).close()
    return [1.0] * len(answers)

def right(answers):
    return [{"4": 1.0}[answer.text.split("</think>")[-1].strip()] for answer in answers]
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "beside.py").write_text("def worth(text): return len(text)\n")
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_one_answer_that_fails_spoils_one(own: str) -> None:
    texts = ["a", "bb", "raise", "leave", "fork", "ccc"]
    with Scorer([PythonReward(path=own, weight=0.5)]) as scorer:
        scores = scorer.score([answer(text, bonus=1) for text in texts])
    assert [score.total for score in scores] == [5.0, 5.5, 0.0, 0.0, 0.0, 6.0]
    assert [score.reasons.get("python") for score in scores] == [
        None, None, "KeyError in own.py:11 ('x')", "crash",
        "PermissionError in own.py:15 ([Errno 1] Operation not permitted)", None,
    ]  # fmt: skip


def test_a_function_that_hangs_does_not_hang_for_every_answer(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one that does is found, and so is a second one."""
    function = UserFunction(PythonReward(path=own))
    calls = []

    def do(job: dict[str, Any], limits: Limits) -> Outcome:
        calls.append(job)
        texts = [one["text"] for one in job["answers"]]
        values = json.dumps([[1.0, ""]] * len(texts)).encode()
        return Outcome("time") if "hang" in texts else Outcome("ok", values)

    monkeypatch.setattr(function._keeper, "do", do)
    few = function([answer("hang" if number in (3, 200) else "") for number in range(256)])
    assert {number for number, value in enumerate(few) if value.reason} == {3, 200}
    calls.clear()
    assert {value.reason for value in function([answer("hang")] * 256)} == {"time"}
    assert len(calls) < 40
    function.close()


def test_a_wrong_count_is_refused_and_never_halved(own: str) -> None:
    with (
        Scorer([PythonReward(path=own, function="short")]) as scorer,
        pytest.raises(UserError, match=r"own.py: own.py:19: returned 1 values for 2 answers; exp"),
    ):
        scorer.score([answer("a"), answer("b")])


def test_a_function_is_called_once_before_the_run_with_a_plausible_answer(own: str) -> None:
    with Scorer([FormatReward(), PythonReward(path=own, function="right")]) as scorer:
        scorer.try_functions("2+2=", {"answer": 4})
        scorer.try_functions("2+2=<think>\n", {"answer": "4"})
        said = "called once with made-up answers, it fails: KeyError in own.py:27 ('5')"
        with pytest.raises(UserError) as raised:
            scorer.try_functions("2+3=", {"answer": "5"})
    assert said in str(raised.value)


def test_a_function_that_hangs_is_told_before_the_run(own: str) -> None:
    with (
        Scorer([PythonReward(path=own, seconds=1)]) as scorer,
        pytest.raises(UserError, match="it did not end within seconds=1 of the processor"),
    ):
        scorer.try_functions("", {"answer": "hang", "bonus": 1})


def test_the_users_function_has_a_network_only_if_it_is_given(own: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = answer(str(server.getsockname()[1]))
        with Scorer([PythonReward(path=own, function="online")]) as scorer:
            assert scorer.score([port])[0].total == 0.0
        with Scorer([PythonReward(path=own, function="online", network=True)]) as scorer:
            assert scorer.score([port])[0].total == 1.0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "own.py: ZeroDivisionError in own.py:1 (division by zero)"),
        ("import os; os._exit(3)", "own.py: its process ended at its start"),
        (None, "own.py: no such file"),
    ],
)
def test_a_file_of_no_use_is_one_line(source: str | None, said: str, tmp_path: Path) -> None:
    if source is not None:
        (tmp_path / "own.py").write_text(source)
    with pytest.raises(UserError) as raised:
        Scorer([PythonReward(path=str(tmp_path / "own.py"))])
    assert said in str(raised.value)


# Answers without a value -----------------------------------------------------------------------


def scores(*reasons: dict[str, str]) -> list[Score]:
    return [Score(0.0, {}, one) for one in reasons]


def test_failures_are_counted_by_reason_and_said_in_one_line() -> None:
    found = scores(
        {"python": "KeyError in own.py:3 ('x')"},
        {"python": "KeyError in own.py:3 ('y')", "math": "time"},
        {},
        {"math": "time"},
        {"math": "unisolated"},
    )
    assert count_failures(found) == {
        "python: KeyError in own.py:3": 2, "math: time": 2, "math: unisolated": 1,
    }  # fmt: skip
    assert describe_failures(found) == (
        "4 of 5 answers without a score: 2 python: KeyError in own.py:3, 2 math: time, "
        "1 math: unisolated"
    )
    assert describe_failures(found[:1]) == (
        "1 of 1 answers without a score: python: KeyError in own.py:3"
    )
    assert describe_failures(scores({}, {})) == ""


@pytest.mark.parametrize(
    ("name", "reason", "refused"),
    [
        ("python", "KeyError in own.py:3 ('x')", True),
        ("python", "crash", True),
        ("math", "time", True),
        ("math", "unisolated", True),
        ("model", "refused: no number", True),
        ("code", "refused: the tests are of no use: they check nothing", True),
        ("code", "unisolated", True),
        ("code", "crash", False),  # a model that writes no program that runs
        ("code", "time", False),
    ],
)
def test_a_first_rollout_that_fails_as_a_whole_is_refused(
    name: str, reason: str, refused: bool
) -> None:
    refuse_total_failure([*scores({}), *scores({name: reason}) * 3], "the first rollout")
    refuse_total_failure(scores({name: reason}, {name: "another"}), "the first rollout")
    refuse_total_failure([], "the first rollout")
    if refused:
        said = f"the reward '{name}' has no value for any of the 4 answers of the first rollout: "
        with pytest.raises(UserError) as raised:
            refuse_total_failure(scores({name: reason}) * 4, "the first rollout")
        assert str(raised.value).startswith(f"{said}{reason}; mend it")
    else:
        refuse_total_failure(scores({name: reason}) * 4, "the first rollout")
