"""The letter that an answer to a multiple-choice question chooses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from dsjax.rewards.claims import Claim, claims, context, is_rejected, settle, standing_claims
from dsjax.rewards.notation import clean, unwrap_text
from dsjax.rewards.outline import outline

_DECORATION = r"[\s(\[{*_$\"'“]{0,6}"
_OPTION = r"(?i:option|choice|letter|opción|opcion|antwort|réponse|选项)"
_LEADING = re.compile(
    rf"^{_DECORATION}(?:(?:(?:the|The|la|el|die|l['’])\s?)?"
    rf"(?:(?:correct|right|best)\s)?{_OPTION}(?:\s(?:is|must be))?\s?{_DECORATION})?"
    rf"([A-Za-z])(?P<end>[)\]}}*_$\"'”]{{0,5}})"
    r"(?=(?P<rest>.*))",
    re.DOTALL,
)
_CHOSEN = re.compile(
    rf"(?i:\b(?:correct|right|best|true|final)\s+(?:option|choice|statement|letter)\s*(?:is|:)"
    rf"|\b(?:choos(?:e|ing)|chose|pick(?:ing)?|select(?:ed)?|take|go(?:ing)? (?:with|for))\b"
    rf"(?:\s+(?:option|choice|answer|letter))?"
    rf"|\b(?:left|leaves?(?:\s+us)?|remains?)\s+with\b)\s*{_DECORATION}(?:{_OPTION}\s*)?"
    r"[(\[*_$]{0,4}(?P<after>[A-Z])(?![A-Za-z0-9'’])"
    rf"|(?<![A-Za-z0-9'’])(?:{_OPTION}\s)?[(\[*_]{{0,4}}(?P<before>[A-Z])[)\]*_]{{0,4}}\s+"
    r"is\s+(?:therefore\s+|thus\s+|clearly\s+)?(?:the\s+)?(?:only\s+)?"
    r"(?:correct|right|best|true|answer)\b"
    r"|(?i:\b(?:so|thus|hence|therefore))\s*[,:]?\s*(?:the answer\s+)?"
    rf"(?:{_OPTION}\s+)?[(\[*_$]{{0,4}}(?P<concluded>[A-Z])[)\]*_$]{{0,4}}(?=[.!]?\s*$)"
)
_LINE = re.compile(
    r"^[ \t]{0,8}(?:[-+>][ \t]{1,3})?[(\[*_]{0,4}([A-Z])(?:[)\].:*_]{1,5}(?=\s|$)|[ \t]{0,9}$)"
    r"(?P<rest>[^\n]{0,300})",
    re.MULTILINE,
)
"""A line that begins with a letter alone: "C", "(C)", "C. because"."""

_OTHERS = re.compile(
    r"(?i)\b(?:many|some|most|others|people|students|candidates|you|they|one|who|to|often)\b"
)
"""Subjects of "pick C" that are not the model."""

_NAMED = re.compile(r"(?<![\w'’])[A-Z](?![\w'’])")

_FALSE = re.compile(
    r"(?i)\b(?:false|wrong|incorrect|no|not|n't|too|fails?|cannot|impossible)\b|✗|❌|×|✘"
)


def letter_of(value: str, letters: Collection[str]) -> str | None:
    """Return the letter that a final answer names, with or without the option's text.

    >>> [letter_of(v, "ABCD") for v in (r"\\text{(B)}", "C) 12 m/s", "A or B", "A solution", "d")]
    ['B', 'C', None, None, 'D']
    """
    plain = unwrap_text(clean(value)).strip("$ ")
    match = _LEADING.match(plain)
    if match is None:
        return None
    letter, end, rest = match[1], match["end"], match["rest"]
    if letter.islower() and (rest or letter.upper() not in letters):
        return None
    letter = letter.upper()
    if letter not in letters or _names_another(letter, rest, letters):
        return None
    if re.match(r"[A-Za-z0-9'’_^=+*/\\<>%-](?!/)", rest) and not end:
        return None
    if re.match(r"\s*\?", rest) or re.match(r"\s*(?:=|\\approx|>|<(?!/)|\+|/)", rest):
        return None
    if not end and re.match(r"\s+[^\W\d_]", rest):  # a word: is the letter one, too?
        following = re.match(
            r"\s+(?:is|was|because|since|as|for|due|by|with|based|and not|but)\b", rest
        )
        words_follow = letter not in "AI" and re.match(r"\s+[A-Z][a-z]", rest)
        if not (following or words_follow):
            return None
    return letter


def _names_another(letter: str, rest: str, letters: Collection[str]) -> bool:
    """Whether "A" goes on as "A or B", "A, B", "A/B", "A and B"."""
    found = re.match(
        r"(?:\s{0,3}(?:,|/|&|;|\+|-)?\s{0,3}"
        r"(?:\b(?:or|and|and/or|or possibly|or maybe|oder|und|ou|et|y|o)\b)?"
        rf"\s{{0,3}}(?:{_OPTION}\s)?[(\[*_]{{0,4}})([A-Z])(?![A-Za-z0-9'’])(?!\s+[a-z]{{2,}}\s+(?!or|and))",
        rest,
    )
    return bool(
        found and rest[: found.start(1)].strip() and found[1] in letters and found[1] != letter
    )


def final_letter(text: str, letters: Collection[str]) -> str | None:
    """Return the letter that a text chooses; None where it chooses none, or several.

    >>> final_letter("The answer is B. Option A is wrong.", "ABCD")
    'B'
    >>> final_letter("Answer: A or B", "ABCD"), final_letter("I do not know.", "ABCDEFGHI")
    (None, None)
    """
    drawn = outline(text)
    if not drawn.complete:
        return None
    found = sorted([*claims(drawn), *_choices(drawn.text)])
    if not found:
        return _letter_of_lines(drawn.restore(0, len(drawn.text)), letters)
    found = standing_claims(drawn.text, found)
    named = [letter_of(claim.value, letters) for claim in found]
    # A claim that names several letters is one that differs; one that names none is no claim.
    keys = [
        name or (claim.value if _NAMED.search(claim.value) else None)
        for name, claim in zip(named, found, strict=True)
    ]
    chosen = settle(drawn.text, found, keys)
    return None if chosen is None else named[chosen]


def _choices(text: str) -> Iterator[Claim]:
    """Yield claims such as "I choose option D", "D is correct"."""
    for match in list(_CHOSEN.finditer(text))[-200:]:
        letter = match["after"] or match["before"] or match["concluded"]
        around = context(text, match.start(), match.end())
        inside = re.search(r"(?i)\bnot\b|n['’]t\b", match[0])
        rejected = bool(is_rejected(around) or inside or _OTHERS.search(around.clause))
        value = letter
        following = re.match(
            r"[)\]*_]{0,4}\s{0,3}(?:or|and|,|/)\s{0,3}[(\[*_]{0,4}([A-Z])(?![\w'’])",
            text[match.end() :][:20],
        )
        if match["after"] and following:
            value = f"{letter} or {following[1]}"
        if match["before"] and re.search(
            r"(?:\bor|\band|\b[A-Z]\)?,|/)\s{1,3}$", text[: match.start()][-8:]
        ):
            rejected = True
        yield Claim(match.start(), match.end(), value, 3, rejected, False)


def _letter_of_lines(text: str, letters: Collection[str]) -> str | None:
    """Read a text that claims nothing: one line begins with a letter, or all others are denied."""
    found = [
        match[1]
        for match in list(_LINE.finditer(text))[-200:]
        if match[1] in letters and not _FALSE.search(match["rest"])
    ]
    return found[0] if len(set(found)) == 1 else None
