"""Rewards whose verifiers evaluate or run what the model wrote: each time in a jail of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.config_rewards import CodeReward, MathReward
from dsjax.rewards import jail
from dsjax.rewards.answer import Answer, final_answer
from dsjax.rewards.code_blocks import final_program, tested_names
from dsjax.rewards.equality import decide
from dsjax.rewards.extraction import final_value
from dsjax.rewards.inside import UNREADABLE
from dsjax.rewards.jail import Outcome
from dsjax.rewards.namespaces import Limits
from dsjax.rewards.sandbox import CODE, MATH, Keeper, Sandbox, run_tests
from dsjax.rewards.value import Value

WRONG, RIGHT = Value(0.0), Value(1.0)


def mathematics(config: MathReward, sandbox: Sandbox, answers: Sequence[Answer]) -> list[Value]:
    """1 where the final answer means what the line's `answer` says."""
    limits = Limits(config.seconds, config.memory_bytes)

    def one(keepers: dict[str, Keeper], answer: Answer) -> Value:
        text = final_answer(answer)
        value = final_value(text) if text else None
        if not value:
            return WRONG
        expected = str(answer.example["answer"])
        decided = decide(expected, value)
        if decided is not None:
            return RIGHT if decided else WRONG
        outcome = keepers[MATH].do({"expected": expected, "found": value}, limits)
        if outcome.ended != jail.OK:
            return Value(0.0, outcome.ended)
        if outcome.output == UNREADABLE:
            return Value(0.0, "refused: math-verify cannot read the line's answer")
        return RIGHT if outcome.output == b"1" else WRONG

    return sandbox.map(one, answers)


# ---------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------


def code(config: CodeReward, sandbox: Sandbox, answers: Sequence[Answer]) -> list[Value]:
    """1 where the final answer's program passes all of the line's `tests`."""
    limits = Limits(config.seconds, config.memory_bytes)

    def one(keepers: dict[str, Keeper], answer: Answer) -> Value:
        tests = answer.example["tests"]
        asserting = as_assertions(tests)
        entry_point = answer.example.get("entry_point")
        names = tested_names(asserting, entry_point) if asserting else frozenset()
        source = final_program(final_answer(answer) or "", names)
        if source is None:
            return WRONG
        if asserting:
            return _judge(run_tests(keepers, source, asserting, entry_point, limits))
        return _run_pairs(keepers[CODE], source, tests, limits)

    return sandbox.map(one, answers)


def as_assertions(tests: Any) -> str | None:
    """Tests as Python source: one text, or a list of them; None for pairs of input and output."""
    if isinstance(tests, str):
        return tests
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return "\n".join(tests)
    return None


def check_tests(tests: Any) -> str | None:
    """What is wrong with a line's `tests`, if anything is."""
    if as_assertions(tests):
        return None
    if isinstance(tests, list) and tests and all(map(_is_pair, tests)):
        return None
    return (
        "'tests' is neither Python source with assertions, nor a list of such, nor a list of "
        'pairs {"input": ..., "output": ...}'
    )


def _is_pair(test: Any) -> bool:
    return isinstance(test, Mapping) and all(
        isinstance(test.get(key), str) for key in ("input", "output")
    )


def _run_pairs(keeper: Keeper, source: str, tests: Sequence[Any], limits: Limits) -> Value:
    """A run for each pair, until one fails. Outputs are compared here."""
    for test in tests:
        outcome = keeper.do({"code": source, "stdin": test["input"]}, limits)
        if outcome.ended != jail.OK:
            return Value(0.0, outcome.ended)
        if _lines(outcome.output.decode(errors="replace")) != _lines(test["output"]):
            return WRONG
    return RIGHT


def _lines(text: str) -> list[str]:
    """Lines without the blanks that end them, and without empty ones at the end of it all."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _judge(outcome: Outcome) -> Value:
    if outcome.ended != jail.OK:
        return Value(0.0, outcome.ended)
    verdict = json.loads(outcome.output)
    if "broken" in verdict:
        return Value(0.0, f"refused: the tests are of no use: {verdict['broken']}")
    return RIGHT if verdict["passed"] else WRONG
