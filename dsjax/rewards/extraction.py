"""The final answer of a text without its thought, for rewards and for evaluation: one extractor.

A text claims an answer (`dsjax.rewards.claims`), or its last line holds one value. Where it claims
several that differ it has none.
"""

from __future__ import annotations

import re

from dsjax.rewards.claims import claims, settle, standing_claims
from dsjax.rewards.notation import key, numeric, spell, words
from dsjax.rewards.outline import BOX, FORMULA, LONGEST, Outline, outline


def final_value(text: str) -> str | None:
    """Return the final answer as it is written, or None where there is none, or are several.

    >>> final_value(r"First $\\boxed{4}$? Wait, no: it is $\\boxed{\\frac{9}{2}}$.")
    '\\\\frac{9}{2}'
    >>> final_value("**Answer:** 5 (not 6)"), final_value(r"\\boxed{5}. Alternatively \\boxed{6}.")
    ('5', None)
    """
    drawn = outline(text)
    if not drawn.complete:
        return None
    found = claims(drawn)
    if not found:
        return _last_line(drawn)
    found = standing_claims(drawn.text, found)
    if any(drawn.text[claim.begin] == BOX and not claim.rejected for claim in found):
        # Then "to answer this: we need the sum" is no claim.
        found = [claim for claim in found if re.search(r"[\d\\]", claim.value) or
                 drawn.text[claim.begin] == BOX]  # fmt: skip
    keys = [key(claim.value) if claim.value else None for claim in found]
    chosen = settle(drawn.text, found, keys)
    return None if chosen is None else found[chosen].value


def final_number(text: str) -> str | None:
    """Return the final answer as a number in one spelling, or None.

    >>> final_number("\\\\boxed{1{,}024}"), final_number("Answer: 7."), final_number("it is −3.50")
    ('1024', '7', '-3.5')
    """
    value = final_value(text)
    found = None if value is None else numeric(value)
    return None if found is None else spell(found)


def final_words(text: str) -> str | None:
    """Return the final answer as words in lower case, or None.

    >>> final_words("So it is \\\\boxed{\\\\text{The surgeon}}.")
    'surgeon'
    """
    value = final_value(text)
    return None if value is None else words(value)


def final_formula(text: str) -> str | None:
    """Return the final answer as LaTeX in one spelling, or None: good enough to count votes by.

    >>> final_formula("\\\\boxed{ \\\\dfrac{1}{2} }") == final_formula("\\\\boxed{\\\\frac12}")
    True
    """
    value = final_value(text)
    return None if value is None else key(value) or None


_PLAIN_NUMBER = re.compile(
    r"(?<![\w.])[+\-−]?(?:\d{1,3}(?:[,\u2009\u202f\u00a0]\d{3})+|\d+)(?:\.\d+)?%?(?![\w/^])"
)


_FEW_WORDS = 6
"""Of a line that is an answer as a whole."""


def _last_line(drawn: Outline) -> str | None:
    """Read the last line of a text that claims nothing, if it holds one value."""
    text = drawn.text.rstrip()
    begin = text.rfind("\n") + 1
    line = text[begin:]
    if len(line) > LONGEST or re.search(r"(?i)\bnot\b|n['’]t\b|\bor\b|\bmaybe\b|\bwrong\b", line):
        return None
    formulas = [begin + i for i, mark in enumerate(line) if mark == FORMULA]
    if formulas:
        return drawn.contents[formulas[0]] if len(formulas) == 1 else None
    line = line.rpartition("=")[2].strip(" .*_")
    numbers = set(_PLAIN_NUMBER.findall(line))
    if len(numbers) == 1 and len(line.split()) > 1:
        return numbers.pop()
    return line if 0 < len(line.split()) <= _FEW_WORDS and len(numbers) < 2 else None
