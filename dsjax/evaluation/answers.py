"""The final answer in a text without a thought, as one value that can be compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

_NUMBER = re.compile(r"(?:(?<![\d)])[+-])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z])")
_ANSWER = re.compile(r"(?i:\banswer\b)(?:\s+is)?\s*[:=]?\s*(.*)")
_MARKS = str.maketrans("", "", "*$`")


def boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, its braces balanced.

    >>> boxed("so \\\\boxed{1} or \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    _, mark, rest = text.rpartition("\\boxed{")
    if not mark:
        return None
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip()
    return None  # it was cut off


def final(text: str) -> str | None:
    """The final answer as it is written: in the last box, else in the last line that names one.

    >>> final("I am sure.\\n**Answer:** B")
    'B'
    """
    found = boxed(text)
    if found is None:
        lines = _ANSWER.findall(text.translate(_MARKS))
        found = lines[-1].strip() if lines else None
    return found or None


def number(text: str) -> str | None:
    """The final answer as a number; without a box or a line that says so, the last one there is.

    >>> number("\\\\boxed{1,024}"), number("Answer: 7."), number("it is -3.50"), number("none")
    ('1024', '7', '-3.5', None)
    """
    found = final(text)
    numbers = _NUMBER.findall((text if found is None else found).replace("{,}", ","))
    if not numbers:
        return None
    whole, _, fraction = numbers[-1].replace(",", "").lstrip("+").partition(".")
    sign, digits = "-" * whole.startswith("-"), whole.lstrip("-").lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    value = f"{digits}.{fraction}" if fraction else digits
    return value if value == "0" else sign + value


def letter(letters: Collection[str]) -> Callable[[str], str | None]:
    """A reader of the letter that was chosen among `letters`.

    >>> read = letter("ABCD")
    >>> read("Answer: (C)"), read("\\\\boxed{\\\\text{B}}"), read("The answer is D."), read("E")
    ('C', 'B', 'D', None)
    """

    def read(text: str) -> str | None:
        found = final(text)
        found = text if found is None else found.replace("\\text", "").translate(_BRACES)
        chosen = [each for each in _LETTER.findall(found) if each in letters]
        if not chosen:
            return None
        # A line "Answer: C, not B" means the first; without such a line the last is the conclusion.
        return chosen[-1] if final(text) is None else chosen[0]

    return read


_BRACES = str.maketrans("", "", "{}")


def word(text: str) -> str | None:
    """The final answer as words in lower case, without marks around them.

    >>> word("So it is \\\\boxed{\\\\text{The surgeon}}.")
    'the surgeon'
    """
    found = final(text)
    if found is None:
        lines = [line for line in text.splitlines() if line.strip()]
        found = lines[-1] if lines else ""
    plain = re.sub(r"\\text\w*|[{}*$`\"']", "", found)
    return " ".join(plain.lower().split()).strip(" .,;:!?") or None


def formula(text: str) -> str | None:
    """The final answer as LaTeX in which spaces and ways to set the same do not count.

    Good enough to count votes by; whether one is right is for math-verify to say.

    >>> formula("\\\\boxed{ \\\\dfrac{1}{2} }") == formula("\\\\boxed{\\\\frac{1}{2}}")
    True
    """
    found = final(text)
    if found is None:
        return None
    found = re.sub(r"\\(left|right|,|;|!|:|displaystyle|quad)(?![a-z])", "", found)
    found = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", found)
    found = re.sub(r"\\text\{([^{}]*)\}", r"\1", found)
    return re.sub(r"[\s$]+", "", found).rstrip(".") or None
