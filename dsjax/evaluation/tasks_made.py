"""Tasks that are made here: arithmetic, countdown and counting letters. The same every time.

Each has a seed of its own, so that no two tasks, and no two versions of one, share questions by
chance.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from dsjax.evaluation.task import BOXED, Question, Task
from dsjax.rewards.extraction import final_number, final_value, final_words
from dsjax.rewards.notation import clean

COUNT = 100
"""Questions of a made task."""

_OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


def is_answer(vote: str, example: Mapping[str, Any]) -> bool:
    """Whether a vote is the answer itself."""
    return vote == example["answer"]


def arithmetic(level: str) -> Task:
    """Sums and products of integers; `level` is easy, medium or hard.

    easy: two numbers below 100, added or subtracted. medium: three numbers below 100 with any of
    +, - and *. hard: five numbers below 1,000 in nested parentheses.
    """
    rng = random.Random(f"arithmetic-{level}")
    make = {"easy": _easy, "medium": _medium, "hard": _hard}[level]
    texts = _different(lambda: make(rng))
    questions = tuple(
        Question(
            str(place),
            f"Calculate {text}. {BOXED}",
            {"answer": str(_evaluate(text))},
        )
        for place, text in enumerate(texts)
    )
    return Task(f"arithmetic-{level}", questions, is_answer, final_number)


def _easy(rng: random.Random) -> str:
    return f"{rng.randrange(100)} {rng.choice('+-')} {rng.randrange(100)}"


def _medium(rng: random.Random) -> str:
    a, b, c = (rng.randrange(2, 100) for _ in range(3))
    return f"{a} {rng.choice('+-*')} {b} {rng.choice('+-*')} {c}"


def _hard(rng: random.Random) -> str:
    parts = [str(rng.randrange(2, 1000)) for _ in range(5)]
    while len(parts) > 1:
        place = rng.randrange(len(parts) - 1)
        joined = f"{parts[place]} {rng.choice('+-*')} {parts[place + 1]}"
        parts[place : place + 2] = [joined if len(parts) == 2 else f"({joined})"]
    return parts[0]


def _different(make: Callable[[], str]) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < COUNT:
        made[make()] = None
    return list(made)


# ---------------------------------------------------------------------------------------------
# Countdown
# ---------------------------------------------------------------------------------------------


def countdown() -> Task:
    """Reach a target from four numbers, each used once: every question has a solution."""
    rng = random.Random("countdown")
    return Task("countdown", tuple(_countdown(rng)), reaches_target, expression)


def _countdown(rng: random.Random) -> Iterator[Question]:
    for place in range(COUNT):
        target = Fraction(0)
        numbers: list[int] = []
        while not 10 <= target <= 999:
            numbers = [rng.randrange(1, 51) for _ in range(4)]
            target = Fraction(numbers[0])
            for each in numbers[1:]:
                target = Fraction(_OPERATORS[rng.choice("+-*")](int(target), each))
        shown = rng.sample(numbers, len(numbers))
        yield Question(str(place), countdown_prompt(shown, int(target)),
                       {"numbers": shown, "target": int(target)})  # fmt: skip


def countdown_prompt(numbers: list[int], target: int) -> str:
    """The user's message."""
    listed = ", ".join(map(str, numbers))
    return (
        f"Use each of the numbers {listed} exactly once, with +, -, * and / and parentheses, to "
        f"make {target}. Please reason step by step, and put the expression, without an equals "
        "sign, within \\boxed{}."
    )


def expression(text: str) -> str | None:
    """The final answer as an expression in Python's spelling, without its result.

    >>> expression("\\\\boxed{(3 + 4) \\\\times 5 = 35}")
    '(3+4)*5'
    """
    found = final_value(text)
    if found is None:
        return None
    found = clean(found)
    for spelling, sign in (
        ("\\times", "*"),
        ("\\cdot", "*"),
        ("\\div", "/"),
        ("{", "("),
        ("}", ")"),
    ):
        found = found.replace(spelling, sign)
    return "".join(found.partition("=")[0].split()) or None


def reaches_target(vote: str, example: Mapping[str, Any]) -> bool:
    """Whether the expression uses each number once and makes the target."""
    used = sorted(map(int, re.findall(r"\d+", vote)))
    if used != sorted(example["numbers"]):
        return False
    value = _evaluate(vote)
    return value is not None and value == example["target"]


def _evaluate(text: str) -> Fraction | None:
    """The value of a short expression of integers, +, -, * and /; None if it is anything else."""
    if re.fullmatch(r"[\d+\-*/() ]{1,200}", text) is None or re.search(r"\d{10}", text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    """Walks the tree by itself: nothing of it is ever run."""
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
    raise ValueError("not an expression of this game")


# ---------------------------------------------------------------------------------------------
# Letters
# ---------------------------------------------------------------------------------------------

WORDS = (
    "strawberry", "raspberry", "blueberry", "banana", "mississippi", "bookkeeper", "committee",
    "parallel", "assessment", "occurrence", "millennium", "accommodation", "necessary",
    "possession", "successful", "tomorrow", "cinnamon", "cappuccino", "buffalo", "hippopotamus",
    "rhinoceros", "kangaroo", "butterfly", "caterpillar", "dandelion", "eucalyptus", "fluorescent",
    "gingerbread", "hummingbird", "independence", "jellyfish", "kaleidoscope", "lullaby",
    "marshmallow", "nightingale", "onomatopoeia", "peppermint", "questionnaire", "rendezvous",
    "skeleton", "tattoo", "unnecessary", "volleyball", "whippersnapper", "xylophone", "yesterday",
    "zucchini", "queueing", "sassafras", "tennessee",
)  # fmt: skip


def letters() -> Task:
    """How often a letter occurs in a word: tokens hide their letters. Begins with the famous one.

    Of each word the most frequent letter, and one that it may not have at all.
    """
    rng = random.Random("letters")
    pairs = []
    for each in WORDS:
        common = max(sorted(set(each)), key=each.count)
        pairs += [(each, common), (each, rng.choice("abcdefghilmnoprstuy".replace(common, "")))]
    questions = tuple(
        Question(
            f"{each}-{which}",
            f'How many times does the letter "{which}" occur in the word "{each}"? {BOXED}',
            {"answer": str(each.count(which))},
        )
        for each, which in pairs
    )
    return Task("letters", questions, is_answer, final_number)


def backwards() -> Task:
    """Words spelled backwards."""
    questions = tuple(
        Question(each, f'Spell the word "{each}" backwards. {BOXED}', {"answer": each[::-1]})
        for each in WORDS
    )
    return Task("backwards", questions, is_answer, final_words)
