"""The scorer: weights, order, reasons, the user's own file, and what it refuses in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from dsjax.architecture import Section
from dsjax.config_files import parse
from dsjax.config_rewards import (
    NAMES,
    ChoiceReward,
    CodeReward,
    ExactReward,
    FormatReward,
    LanguageReward,
    LengthReward,
    MathReward,
    RewardConfig,
)
from dsjax.errors import UserError
from dsjax.rewards import keeper
from dsjax.rewards.answer import Answer
from dsjax.rewards.score import Scorer

HOUSE = Path(__file__).resolve().parents[2]


def answer(text: str, **example: object) -> Answer:
    return Answer("Q<think>\n", text, 9, False, example)


def code(source: str, tests: object, **example: object) -> Answer:
    return answer(f"hm</think>```python\n{source}\n```", tests=tests, **example)


class Recipe(Section):
    """A configuration that has rewards."""

    rewards: list[RewardConfig]


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


def test_rewards_are_told_apart_by_name():
    tree = {"rewards": [{"name": "exact"}, {"name": "length", "limit": 9, "margin": 3}]}
    rewards = parse(Recipe, tree, "run.yaml").rewards
    assert rewards == [ExactReward(), LengthReward(limit=9, margin=3)]
    assert TypeAdapter(list[RewardConfig]).validate_python(rewards) == rewards


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (
            {"name": "maths"},
            f"rewards.0: unknown reward 'maths'; expected one of {', '.join(NAMES)}",
        ),
        ({}, f"rewards.0: unknown reward None; expected one of {', '.join(NAMES)}"),
        ({"name": "math", "second": 3}, "'rewards.0.second'; the nearest valid key is 'seconds'"),
        ({"name": "length", "limit": 3, "margin": 4}, "margin=4 is more than limit=3"),
        ({"name": "language", "language": "xx"}, "unknown language 'xx'; expected one of ar, "),
    ],
)
def test_a_wrong_reward_is_one_line(item: dict, said: str):
    with pytest.raises(UserError) as raised:
        parse(Recipe, {"rewards": [item]}, "run.yaml")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("reward", "example", "said"),
    [
        (
            ExactReward(),
            {"q": 1},
            "line 3: the reward 'exact': the key 'answer' is missing; the li",
        ),
        (CodeReward(), {}, "the key 'tests' is missing; the line has none"),
        (CodeReward(), {"tests": []}, "'tests' is neither Python source"),
        (CodeReward(), {"tests": [{"input": 3}]}, "'tests' is neither Python source"),
        (LanguageReward(), {}, "the key 'language' is missing, and the reward names none"),
        (LanguageReward(), {"language": "xx"}, "unknown language 'xx'"),
        (ChoiceReward(), {"answer": "A", "choices": []}, "'choices' has to be a list of at most"),
    ],
)
def test_a_line_that_lacks_something_is_refused(reward, example: dict, said: str):
    needing = Scorer([FormatReward()])
    needing._rewards = [reward]  # none of them is needed to run
    with pytest.raises(UserError, match="line 3") as raised:
        needing.check(example, "line 3")
    assert said in str(raised.value)


def test_a_reward_that_stands_twice_is_refused():
    with pytest.raises(UserError, match="'exact' stands twice"):
        Scorer([ExactReward(), ExactReward(weight=2)])


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def test_a_score_is_the_weighed_sum_in_the_answers_order():
    rewards = [ExactReward(weight=2.0), FormatReward(weight=0.5), LengthReward(limit=9, margin=3)]
    answers = [answer("hm</think>4", answer="4"), answer("hm</think>5", answer="4")]
    with Scorer(rewards) as scorer:
        right, wrong = scorer.score(answers)
        assert scorer.score([]) == []
    assert (right.total, wrong.total) == (1.5, -0.5)
    assert right.values == {"exact": 1.0, "format": 1.0, "length": -1.0}
    assert right.reasons == {}


def test_mathematics_is_compared_by_its_meaning():
    cases = [
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1),
        (r"so $x^2 + 2x + 1$", "(x+1)^2", 1),
        ("The answer is 1,234.", "1234", 1),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
        (r"\boxed{3}", 4, 0),
        (r"\boxed{3}", 3, 1),
        ("no idea", "4", 0),
        ("", "4", 0),
    ]
    answers = [answer(f"so 4</think>{text}", answer=gold) for text, gold, _ in cases]
    with Scorer([MathReward()], workers=1) as scorer:
        scores = scorer.score([*answers, answer(r"\boxed{4}", answer="4")])
    assert [score.total for score in scores] == [*(float(right) for *_, right in cases), 0.0]
    assert all(score.reasons == {} for score in scores)


PAIRS = [{"input": "2\n3\n", "output": "5\n"}, {"input": "4\n5\n", "output": "9"}]
STACK = """
import math
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
def mixed(): return {'a': [1, (2.5, None), {3}, b'x', 1j, True, frozenset()], 2: 10 ** 5000}
def fails(): raise KeyError('no')
def numbers():
    yield from range(3)
"""

CODE = [
    ("print(int(input()) + int(input()))", PAIRS, 1.0, ""),
    ("print(int(input()) - int(input()))", PAIRS, 0.0, ""),
    ("import sys\nprint(sum(map(int, sys.stdin)), '  \\n\\n')\nsys.exit()", PAIRS, 1.0, ""),
    (
        "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def f(n): return n and 1 + f(n - 1)\n"
        "threading.Thread(target=lambda: print(f(int(input()) * 1000 + int(input())))).start()",
        [{"input": "20\n7\n", "output": "20007\n"}],
        1.0,
        "",
    ),
    ("print(5)\nraise SystemExit(1)", PAIRS[:1], 0.0, "crash"),
    ("no python at all", PAIRS, 0.0, "crash"),
    ("x = bytearray(1 << 40)", PAIRS, 0.0, "memory"),
    ("while True: print('x' * 999)", PAIRS, 0.0, "output"),
    (STACK, "s = Stack()\ns.push([1])\nassert s.pop() == [1] and len(s) == 0", 1.0, ""),
    (
        STACK,
        "s = Stack()\nfor i in range(3): s.push(i)\nassert list(s) == [0, 1, 2] == s.items",
        1.0,
        "",
    ),
    (STACK, "assert Stack() != [] and not Stack() == []", 1.0, ""),
    (
        STACK,
        "assert mixed() == {'a': [1, (2.5, None), {3}, b'x', 1j, True, frozenset()], 2: 10**5000}",
        1.0,
        "",
    ),
    (
        STACK,
        "try: fails()\nexcept KeyError as e: assert 'no' in str(e)\nelse: assert False",
        1.0,
        "",
    ),
    (STACK, ["assert sorted(numbers()) == [0, 1, 2]", "assert math.isclose(1, 1)"], 1.0, ""),
    (STACK, "assert sorted(numbers()) == [0, 1, 3]", 0.0, ""),
    (STACK, "assert absent() == 3", 0.0, ""),
    (STACK, "numbers()", 0.0, "refused: the tests are of no use: they check nothing"),
    ("import os\nos._exit(0)", "try: add(1)\nexcept: assert True", 0.0, "crash"),
    (
        "import os\ndef add(a): os._exit(0)",
        "try: add(1)\nexcept BaseException: assert True",
        0.0,
        "crash",
    ),
]


def test_code_is_run_against_pairs_and_assertions():
    with Scorer([CodeReward()], workers=2) as scorer:
        scores = scorer.score([code(source, tests) for source, tests, *_ in CODE])
    found = [(score.total, score.reasons.get("code", "")) for score in scores]
    assert found == [(total, reason) for _, _, total, reason in CODE]


def test_humanevals_check_is_called_with_the_entry_point():
    check = (
        "def check(candidate):\n    assert candidate([3, 1]) == 4\n    assert candidate([]) == 0"
    )
    answers = [
        code("def total(x): return sum(x)", check, entry_point="total"),
        code("def total(x): return 4", check, entry_point="total"),
    ]
    with Scorer([CodeReward()], workers=1) as scorer:
        assert [score.total for score in scorer.score(answers)] == [1.0, 0.0]


def test_an_argument_is_a_copy():
    """What the model's code does to it is not seen by the tests."""
    tests = "x = [2, 1]\nassert change(x) is None and x == [2, 1]"
    with Scorer([CodeReward()], workers=1) as scorer:
        assert scorer.score([code("def change(x): x.sort()", tests)])[0].total == 1.0


# ---------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsjax\[post\]'"):
        keeper._mathematics()


NARROW = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
from dsjax.config_rewards import CodeReward
from dsjax.rewards.answer import Answer
from dsjax.rewards.score import Scorer
text = "`" * 3 + "python\\nprint(5)\\n" + "`" * 3
with Scorer([CodeReward()], workers=1) as scorer:
    print(scorer.score([Answer("", text, 9, False, {"tests": [{"input": "", "output": "5"}]})]))
"""


def test_a_user_who_has_less_than_a_jail_may_have_gets_that():
    done = subprocess.run(
        [sys.executable, "-c", NARROW], cwd=HOUSE, capture_output=True, text=True, timeout=60
    )
    assert "total=1.0" in done.stdout, done.stderr


REFUSING = """
import ctypes, os
from pathlib import Path
user = os.geteuid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {user} 1")
Path("/proc/sys/user/max_user_namespaces").write_text("0")
from dsjax.config_rewards import CodeReward
from dsjax.errors import UserError
from dsjax.rewards.score import Scorer
try:
    Scorer([CodeReward()])
except UserError as error:
    print(error)
"""


def test_without_isolation_code_is_refused():
    """In a namespace in which there may be no further ones."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSING], cwd=HOUSE, capture_output=True, text=True, timeout=60
    )
    assert "the reward 'code': this machine refuses isolation (unshare: No space" in done.stdout
    assert done.stdout.count("\n") == 1, done.stderr
