"""The outline of a text: its boxes and formulas found, one character for each, no emphasis.

Texts are hostile and up to a megabyte long: each pattern is linear in time, or bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

LONGEST = 2000
"""Characters of a final answer; a longer one is none."""

BOX, FORMULA = "\ue000", "\ue001"
"""Each stands for a box or a formula in an outline."""


class Outline(NamedTuple):
    """A text in which one character stands for each box and each formula without a box."""

    text: str
    contents: dict[int, str]
    """What a box or formula holds, by its position in the text."""
    complete: bool
    """Whether all boxes are closed."""

    def restore(self, begin: int, end: int) -> str:
        """Return a part of the text with its boxes' and formulas' contents."""
        part = range(begin, end)
        return "".join(self.contents.get(i, self.text[i]) for i in part)


_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\[\\{}]|[{}]")


def find_boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    """Find outermost boxes as (begin, end, content), and whether every box is closed.

    >>> find_boxes(r"\\boxed{1} or \\boxed{\\frac{1}{2}}")[0]
    [(0, 9, '1'), (13, 32, '\\\\frac{1}{2}')]
    """
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []  # of a box where it begins and its content does
    depth = 0  # boxes among those
    for match in _BRACE.finditer(text):
        mark = match[0]
        if len(mark) > 2:
            opened.append(match.span())
            depth += 1
        elif mark == "{":
            opened.append(None)
        elif mark == "}" and opened:
            box = opened.pop()
            if box is not None:
                depth -= 1
                if depth == 0:
                    found.append((box[0], match.end(), text[box[1] : match.start()].strip()))
    return found, depth == 0


_EMPHASIS = re.compile(r"(?<!\S)[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}(?!\w)")
_OPENING = re.compile(r"\$\$|\$|\\\(|\\\[")
_CLOSING = {"$$": "$$", r"\(": r"\)", r"\[": r"\]"}


def outline(text: str) -> Outline:
    """Replace boxes and formulas by one character each, and remove emphasis."""
    text = text.replace(BOX, "").replace(FORMULA, "").replace("\\$", "＄")
    boxes, complete = find_boxes(text)
    pieces: list[str] = []
    position = 0
    for begin, end, _ in boxes:
        pieces += [text[position:begin], BOX]
        position = end
    text = "".join([*pieces, text[position:]])
    return _replace_formulas(text, [content for *_, content in boxes], complete)


def _replace_formulas(text: str, boxes: list[str], complete: bool) -> Outline:
    parts: list[tuple[str, bool]] = []  # text, and whether it is a formula
    position = 0
    for begin, end, formula in _formulas(text):
        parts += [(_EMPHASIS.sub("", text[position:begin]), False)]
        parts += [(formula, BOX not in formula)]
        position = end
    parts += [(_EMPHASIS.sub("", text[position:]), False)]
    contents: dict[int, str] = {}
    written: list[str] = []
    length = 0
    following = iter(boxes)
    for part, is_formula in parts:
        if is_formula:
            contents[length] = part.strip()
        else:
            for match in re.finditer(BOX, part):
                contents[length + match.start()] = next(following)
        written.append(FORMULA if is_formula else part)
        length += len(written[-1])
    return Outline("".join(written), contents, complete)


def _formulas(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield begin, end and content of each formula; a dollar may also be money."""
    position = 0
    absent: set[str] = set()
    while match := _OPENING.search(text, position):
        position = match.end()
        if match[0] == "$":
            end = _closing_dollar(text, position)
        else:
            mark = _CLOSING[match[0]]
            end = -1 if mark in absent else text.find(mark, position)
            if end < 0:
                absent.add(mark)
        if end >= 0:
            after = end + (1 if match[0] == "$" else 2)
            yield match.start(), after, text[position:end]
            position = after


def _closing_dollar(text: str, begin: int) -> int:
    """Find the dollar that closes a formula, or -1: "$5 and $6" is money, as in Pandoc."""
    limit = min(len(text), begin + LONGEST)
    blank = text.find("\n\n", begin, limit)
    limit = limit if blank < 0 else blank
    spaced = text[begin : begin + 1].isspace()
    end = begin
    for _ in range(4):
        end = text.find("$", end, limit)
        if end <= begin:
            return -1
        if text[end - 1].isspace() == spaced and not text[end + 1 : end + 2].isdigit():
            return end
        end += 1
    return -1
