"""What a task is: questions, and how an answer to one of them is judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""The directive of DeepSeek-R1's README for questions with an answer that can be checked."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a task."""

    id: str
    """Unique within the task, and the same whenever the task is opened."""
    prompt: str
    """The user's message. R1 is asked without a system prompt, everything in the message."""
    example: Mapping[str, Any]
    """What a verifier looks at: "answer", "tests", and whatever else the task has. JSON."""

    @property
    def digest(self) -> str:
        """Of all that the question is: answers to another one under the same id are told by it."""
        written = json.dumps([self.prompt, self.example], sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(written.encode(), digest_size=8).hexdigest()


Check = Callable[[str, Mapping[str, Any]], bool]
"""Whether a vote is right; it only compares, and evaluates nothing of what a model wrote."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind, and how an answer, without its thought, is judged.

    `vote` reads the final answer, None where there is none; equal votes are equal answers, which is
    what a majority is counted by. `check` says whether a vote is right, or names the reward of
    `dsjax.rewards` that does: its verifiers meet what a model wrote in jails.
    """

    name: str
    questions: tuple[Question, ...]
    check: Check | Literal["math", "code"]
    vote: Callable[[str], str | None]
    votes: bool = True
    """Whether equal votes are all that right answers have in common; of code that is not so."""
