"""Tasks of reasoning-gym, made by it and judged here.

Its own scorers are not called: some of them, `countdown`'s among them, evaluate what a model wrote.
Those of its tasks are here whose answer is one number or a few words, and can be compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from dsjax.errors import UserError
from dsjax.evaluation.task import BOXED, Check, Question, Task
from dsjax.evaluation.tasks_made import COUNT, expression, is_answer, reaches_target
from dsjax.rewards.extraction import final_number, final_words

SEED = 20250120
"""Of all its data sets here: the day on which R1 came out."""

Vote = Callable[[str], str | None]

GYM: dict[str, tuple[Vote, Check]] = {
    "base_conversion": (final_words, is_answer),
    "calendar_arithmetic": (final_words, is_answer),
    "countdown": (expression, reaches_target),
    "course_schedule": (final_words, is_answer),
    "family_relationships": (final_words, is_answer),
    "leg_counting": (final_number, is_answer),
    "maze": (final_number, is_answer),
    "rotten_oranges": (final_number, is_answer),
    "spiral_matrix": (final_words, is_answer),
    "syllogism": (final_words, is_answer),
}
"""Its name, how the final answer is read, and what is right."""


def gym(name: str) -> Task:
    """A task of reasoning-gym with its standard difficulty.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    try:
        library: Any = importlib.import_module("reasoning_gym")
    except ImportError:
        raise UserError(
            f"--tasks gym-{name}: needs reasoning-gym: pip install 'dsjax[gym]'"
        ) from None
    vote, check = GYM[name]
    made = library.create_dataset(name, size=COUNT, seed=SEED)
    questions = tuple(_question(str(place), made[place], check) for place in range(COUNT))
    return Task(f"gym-{name}", questions, check, vote)


def _question(place: str, entry: dict[str, Any], check: Check) -> Question:
    prompt = f"{entry['question'].strip()}\n\n{BOXED}"
    if check is reaches_target:
        about = entry["metadata"]
        numbers, target = map(int, about["numbers"]), int(about["target"])
        return Question(place, prompt, {"numbers": list(numbers), "target": target})
    return Question(place, prompt, {"answer": " ".join(str(entry["answer"]).lower().split())})
