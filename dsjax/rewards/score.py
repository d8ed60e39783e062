"""`Scorer`: what answers are worth, by the rewards that a configuration lists."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from dsjax.config_rewards import (
    BaseReward,
    ChoiceReward,
    CodeReward,
    ExactReward,
    FormatReward,
    LanguageReward,
    LengthReward,
    MathReward,
    ModelReward,
    PythonReward,
    RewardConfig,
)
from dsjax.data.thinking import CLOSED, begins_in_thought
from dsjax.errors import UserError
from dsjax.rewards import text, verified
from dsjax.rewards.answer import Answer
from dsjax.rewards.language import check_language, language
from dsjax.rewards.sandbox import CODE, MATH, TESTS, Sandbox
from dsjax.rewards.user_function import UserFunction
from dsjax.rewards.value import Reward, Value

_OF_TEXT = {
    ExactReward: text.exact,
    ChoiceReward: text.choice,
    FormatReward: text.format_,
    LengthReward: text.length,
    LanguageReward: language,
}


@dataclasses.dataclass(frozen=True)
class Score:
    """What one answer is worth."""

    total: float
    """The sum of weight times value."""
    values: Mapping[str, float]
    """By the rewards' names."""
    reasons: Mapping[str, str]
    """By the rewards' names, where a verifier failed: "time", "memory", "output", "crash",
    "refused: ...", or an exception and its line in the user's file."""


class Scorer:
    """Scores answers; a context manager, which owns the processes that verify."""

    def __init__(
        self, rewards: Sequence[RewardConfig], *, workers: int = min(os.cpu_count() or 1, 16)
    ):
        """Start what the rewards need. `workers` answers are verified at a time.

        Raises:
            UserError: a reward stands twice, a file of one cannot be used, a package is not
                installed, or this machine cannot isolate what has to be.
        """
        names = Counter(reward.name for reward in rewards)
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"the reward {twice[0]!r} stands twice; give it once, with one weight")
        self._rewards = list(rewards)
        self._stack = ExitStack()
        with self._stack as stack:
            sandbox = self._start_sandbox(workers)
            self._functions = [self._function(reward, sandbox) for reward in rewards]
            self._stack = stack.pop_all()

    def _start_sandbox(self, workers: int) -> Sandbox | None:
        kinds: list[str] = []
        for reward in self._rewards:
            kinds += {MathReward: [MATH], CodeReward: [CODE, TESTS]}.get(type(reward), [])
        return self._stack.enter_context(Sandbox(kinds, workers)) if kinds else None

    def _function(self, config: Any, sandbox: Sandbox | None) -> Reward:
        if isinstance(config, MathReward | CodeReward):
            assert sandbox is not None
            verify = verified.mathematics if isinstance(config, MathReward) else verified.code
            return partial(verify, config, sandbox)
        if isinstance(config, PythonReward):
            function = UserFunction(config)
            self._stack.callback(function.close)
            return function
        if isinstance(config, ModelReward):
            from dsjax.rewards.scalar import ScalarModel

            return ScalarModel(config)
        worth = _OF_TEXT[type(config)]
        return lambda answers: [Value(worth(config, answer)) for answer in answers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a scorer that is closed scores no more."""
        self._stack.close()

    def check(self, example: Mapping[str, Any], where: str) -> None:
        """Look at a line of the prompt file before a model spends time on it.

        Raises:
            UserError: a reward needs what the line lacks; it begins with `where`.
        """
        for reward in self._rewards:
            if problem := _problem(reward, example):
                raise UserError(f"{where}: the reward {reward.name!r}: {problem}")

    def try_functions(self, prompt: str, example: Mapping[str, Any]) -> None:
        """Call the user's functions once, before a model spends time on answers.

        Args:
            prompt: a question as the model reads it.
            example: the line of the prompt file that it comes from; its `answer` is the made-up
                answer's text, if it has one.

        Raises:
            UserError: a function fails, or returns something else than a number for each answer.
        """
        text = str(example.get("answer", "An answer."))
        if begins_in_thought(prompt):
            text = f"A thought.\n{CLOSED}\n\n{text}"
        made_up = [Answer(prompt, f"{text}{end}", 9, False, example) for end in ("", "\n")]
        for function in self._functions:
            if isinstance(function, UserFunction):
                function.check(made_up)

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """Scores in the answers' order, whatever the model wrote.

        Raises:
            UserError: as `check`, for the line that an answer answers; or a user's function returns
                something else than a number for each answer.
        """
        for number, answer in enumerate(answers):
            self.check(answer.example, f"answer {number}")
        by_reward = [function(answers) for function in self._functions]
        return [self._sum(values) for values in zip(*by_reward, strict=True)] or [
            Score(0.0, {}, {}) for _ in answers
        ]

    def _sum(self, values: Sequence[Value]) -> Score:
        named = list(zip(self._rewards, values, strict=True))
        return Score(
            sum(reward.weight * value.value for reward, value in named),
            {reward.name: value.value for reward, value in named},
            {reward.name: value.reason for reward, value in named if value.reason},
        )


def _problem(reward: BaseReward, example: Mapping[str, Any]) -> str | None:
    """What a line lacks for a reward, if anything."""
    for key in reward.needs:
        if example.get(key) is None:
            return f"the key {key!r} is missing; the line has {', '.join(example) or 'none'}"
    if isinstance(reward, LanguageReward):
        return check_language(reward, example)
    if isinstance(reward, CodeReward):
        return verified.check_tests(example["tests"])
    if isinstance(reward, ChoiceReward) and not 0 < len(example["choices"]) <= 26:
        return "'choices' has to be a list of at most 26"
    return None
