"""Whether two answers to a question of mathematics are the same; math-verify decides on formulas.

`decide` compares what can be compared without evaluating anything. `verify` is called inside a jail
only: math-verify evaluates what a model wrote.
"""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from typing import Any

from dsjax.rewards.notation import (
    clean,
    is_words,
    number,
    spell,
    strip_assignment,
    unwrap_text,
    words,
)
from dsjax.rewards.units import Unit, split_unit

TOLERANCE = Fraction(1, 10**6)
"""Relative; of a decimal where the expected value has no finite one."""


class UnreadableError(Exception):
    """math-verify finds no mathematics in the expected answer."""


def decide(expected: str, found: str) -> bool | None:
    """Whether `found` is the answer `expected`; None where only math-verify can say.

    Words are compared as words, numbers exactly, and units where both have one. Nothing of `found`
    is evaluated but a number's digits, so this needs no jail.

    >>> decide(r"\\frac{1}{2}", "0.5"), decide("5", "x + 5"), decide("5 cm", "5 m")
    (True, None, False)
    """
    if is_words(expected):
        return words(expected) == words(found)
    (want, unit), (got, other) = map(_measured, _pair(expected, found))
    if not got or not _same_unit(unit, other) or _has_more(want, got):
        return False
    if _SPACES.sub("", want) == _SPACES.sub("", got):
        return True
    value, answer = number(want), number(got)
    if value is None or answer is None:
        return None
    return _same_number(value, answer, want.endswith("%"), got.endswith("%"))


def verify(expected: str, found: str) -> bool:
    """Whether two formulas are equal, which `decide` could not say. For jails only.

    Raises:
        UnreadableError: `expected` has no meaning here.
    """
    import math_verify

    # math-verify's "2 i" and "2i" are different symbols.
    want, got = (_FACTOR.sub("", _measured(value)[0]) for value in _pair(expected, found))
    # Its own time limits are off: they need a main thread's signals, and the jail has better ones.
    parsed = math_verify.parse(f"${want}$", parsing_timeout=0)
    if not parsed:
        raise UnreadableError(expected)
    answer = math_verify.parse(f"${got}$", parsing_timeout=0)
    if not answer or _are_far(parsed[0], answer[0]):
        return False
    return bool(math_verify.verify(parsed, answer, timeout_seconds=0))


_SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_FACTOR = re.compile(r"(?<=\d)\s+(?=[A-Za-z])")


def _pair(expected: str, found: str) -> tuple[str, str]:
    """Two values without what they are assigned to; but two equations are compared whole."""
    one, other = clean(expected), clean(found)
    if "=" in one and "=" in other:
        return one, other
    if "=" not in one or _ASSIGNMENTS.fullmatch(one):
        one = strip_assignment(one)
    return one, strip_assignment(other)


def _measured(value: str) -> tuple[str, Unit | None]:
    core, unit = split_unit(unwrap_text(value))
    if unit or number(core) is not None:
        return core, unit
    return _as_list(value), None  # \text may belong to a formula


def _as_list(value: str) -> str:
    """Write "1 and 2", "x = 1 or x = 2" as lists, which math-verify reads as sets."""
    for joint in (r"\text{ and }", r"\text{and}", r"\text{ or }", r"\text{or}", " and ", " or "):
        value = value.replace(joint, ", ")
    return value.replace(", ,", ",").replace(",,", ",")


def _same_unit(expected: Unit | None, found: Unit | None) -> bool:
    if found is None:
        return True
    if found.doubtful:
        return False
    if expected is None or expected.name in (None, "?"):
        return True
    return found.name in (expected.name, None)


_ASSIGNMENTS = re.compile(r"(?:\s*\\?\w{1,9}\s*=[^=,]+(?:,|$))+")
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
_TELLING = (":", "?", "...", "…", r"\ldots", r"\dots", r"\cdots", "!", "|")


def _has_more(expected: str, found: str) -> bool:
    """Whether an answer has signs that change its meaning, and that math-verify leaves out."""
    if ("=" in expected) != ("=" in found) and not _ASSIGNMENTS.fullmatch(
        found if "=" in found else expected
    ):
        return True  # an equation is no value: "x + 1 = 0" is not 0
    bases = [match[1] for match in map(_BASE.search, (expected, found)) if match]
    if len(set(bases)) > 1:
        return True
    grouped = found.startswith("(") and "," in expected and expected[0] not in "([{\\"
    return grouped or any(sign in found and sign not in expected for sign in _TELLING)


def _same_number(expected: Fraction, found: Fraction, percent: bool, found_percent: bool) -> bool:
    """Exactly, or to six digits where the expected value is no finite decimal.

    A question may ask for percent: 10 is 10%, but 0.1% is not 0.1.
    """
    candidates = [found]
    if percent and not found_percent:
        candidates.append(found / 100)
    if found_percent and not percent and abs(expected) > 1:
        candidates.append(found * 100)
    if expected in candidates:
        return True
    endless = "/" in spell(expected)
    return (
        endless and "/" not in spell(found) and abs(found - expected) <= TOLERANCE * abs(expected)
    )


def _are_far(expected: Any, found: Any) -> bool:
    """Whether two numbers differ in their first six digits.

    math-verify rounds to six decimals, by which all of physics' small constants are 0; and to
    simplify their difference can take it minutes.
    """
    with contextlib.suppress(Exception):
        if expected.is_number and found.is_number:
            one, other = complex(expected.evalf(20)), complex(found.evalf(20))
            return abs(one - other) > float(TOLERANCE) * max(abs(one), abs(other))
    return False
