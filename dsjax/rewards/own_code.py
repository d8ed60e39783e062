"""The user's own reward function where it runs: imported by a keeper, called inside a jail.

Errors name the line of the user's file: a traceback through our code would not help.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsjax.errors import UserError, one_line
from dsjax.rewards.answer import Answer

MESSAGE_CHARACTERS = 200
"""Of an exception's message; it may quote an answer."""

_EXPECTED = "expected a list of one number for each answer, in their order"


def import_function(path: Path, name: str) -> Callable[..., Any]:
    """Import the user's file, with its folder on the path, and find the function in it.

    Raises:
        UserError: the file raises, or has no such function; the message names the line.
    """
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("dsjax_user_reward", path)
    if spec is None or spec.loader is None:
        raise UserError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(describe(error, path)) from None
    function: Any = getattr(module, name, None)
    if not callable(function):
        there = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == spec.name
        ]
        raise UserError(
            f"it has no function {name!r}, but {', '.join(there[:9]) or 'none at all'}; name one "
            "by `function`"
        )
    _check_signature(function, name, path)
    return function


def _check_signature(function: Callable[..., Any], name: str, path: Path) -> None:
    try:
        inspect.signature(function).bind([])
    except TypeError as error:
        raise UserError(
            f"{name} in {_beginning(function, path)}: it is called with one argument, a list of "
            f"answers, and cannot be: {error}"
        ) from None
    except ValueError:  # of what is written in C
        return


def call_function(
    function: Callable[..., Any], answers: Sequence[Answer], path: Path, output: int
) -> None:
    """Write as JSON what the user's function makes of the answers.

    That is a list of [value, reason] for each answer, where a reason says why the value is none of
    the function's; {"raised": ...}; or {"wrong": ...} where what it returned is no list of as many.
    """
    said: Any
    try:
        said = _results(function, answers, path)
    except MemoryError:
        raise
    except UserError as error:
        said = {"wrong": str(error)}
    except BaseException as error:  # sys.exit, and what asyncio has of its own
        said = {"raised": describe(error, path, function)}
    with os.fdopen(output, "w", encoding="utf-8") as file:
        json.dump(said, file)


def _results(
    function: Callable[..., Any], answers: Sequence[Answer], path: Path
) -> list[tuple[float, str]]:
    found = function(answers)
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    at = _beginning(function, path)
    if isinstance(found, str | bytes | dict | set | frozenset) or not hasattr(found, "__iter__"):
        raise UserError(f"{at}: returned {one_line(repr(found))[:80]}; {_EXPECTED}")
    try:
        values = list(found)
    except TypeError:  # an array without dimensions says that it can be iterated over
        raise UserError(f"{at}: returned {one_line(repr(found))[:80]}; {_EXPECTED}") from None
    if len(values) != len(answers):
        raise UserError(
            f"{at}: returned {len(values)} values for {len(answers)} answers; {_EXPECTED}"
        )
    return [_number(value, at) for value in values]


def _number(value: Any, at: str) -> tuple[float, str]:
    """A finite number, also one of numpy's or torch's, or why it is none."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, str | bytes):
            raise TypeError
        number = float(plain)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        kind = "None" if value is None else f"a {type(value).__name__}"
        return 0.0, f"returned {kind} in {at}"
    if not math.isfinite(number):
        return 0.0, f"returned {number} in {at}"
    return number, ""


def describe(error: BaseException, path: Path, function: Callable[..., Any] | None = None) -> str:
    """An exception by its type and the line of the user's own code; its message in parentheses."""
    message = one_line(error)[:MESSAGE_CHARACTERS]
    at = _line(error, path) or ("" if function is None else _beginning(function, path))
    where = f" in {at}" if at else ""
    return f"{type(error).__name__}{where}" + (f" ({message})" if message else "")


def _line(error: BaseException, path: Path) -> str:
    """The innermost line in the user's folder, file:line; "" where there is none."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if Path(frame.filename).parent == path.parent:
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return ""


def _beginning(function: Callable[..., Any], path: Path) -> str:
    """Where a function is defined, file:line."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return path.name if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}"
