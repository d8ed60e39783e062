"""The program in an answer: which of its fenced blocks, and what the block holds.

Fences are read as CommonMark has them (backticks or tildes, indented, in a list or a quote, with an
info string), and, beyond it, a block that is not closed ends where the next one begins.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

_PYTHON = frozenset(
    ("python", "python3", "python2", "py", "py3", "pycon", "ipython", "python-repl")
)
_FENCE = re.compile(r"(?P<indent>[ \t>]*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+(?=`{3}|~{3})")
_CALLED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s{0,3}\(")
_DEFINED = re.compile(
    r"^(?:(?:async\s+)?def|class)\s+(\w+)|^(\w+)\s*(?::[^=\n]{1,200})?=(?!=)", re.MULTILINE
)

_LONGEST_TESTS = 20_000
"""Characters of tests that are searched for names."""


class Block(NamedTuple):
    """A fenced block."""

    language: str
    """The first word after the fence, in lower case."""
    code: str


def blocks(text: str) -> Iterator[Block]:
    """Yield a text's fenced blocks, without the indentation and quote marks of their fence.

    >>> [*blocks("1. So:\\n\\n   ~~~python title='a'\\n   x = 1\\n   ~~~")]
    [Block(language='python', code='x = 1\\n')]
    """
    opened: re.Match[str] | None = None
    margin = 0
    lines: list[str] = []
    for line in text.splitlines():
        item = _ITEM.match(line) if opened is None else None
        if item:
            line = " " * item.end() + line[item.end() :]
        match = _FENCE.match(line)
        if opened is None:
            if match and not ("`" in match["info"] and match["fence"][0] == "`"):
                opened, margin, lines = match, len(match["indent"]), []
        elif match and _ends(opened, match):
            yield _block(opened, lines)
            again = bool(match["info"].strip())
            opened, margin, lines = (match if again else None), len(match["indent"]), []
        else:
            lines.append(_remove_margin(line, margin))
    if opened is not None:
        yield _block(opened, lines)


def _ends(opened: re.Match[str], match: re.Match[str]) -> bool:
    fence, other = opened["fence"], match["fence"]
    inside = len(match["indent"]) > len(opened["indent"]) + 3 or "`" in match["info"]
    return other[0] == fence[0] and len(other) >= len(fence) and not inside


def _remove_margin(line: str, margin: int) -> str:
    head = line[:margin]
    kept = head.lstrip(" \t>")
    return kept + line[margin:]


def _block(opened: re.Match[str], lines: list[str]) -> Block:
    words = opened["info"].strip().lstrip("{.").split(maxsplit=1)
    language = re.split(r"[\s{},:=]", words[0].lower())[0] if words else ""
    return Block(language, "".join(f"{line}\n" for line in lines))


def tested_names(tests: str, entry_point: str | None = None) -> frozenset[str]:
    """Return the names that a program may define to be what the tests call.

    >>> sorted(tested_names("assert set(add(1, 2)) == {3}"))
    ['add']
    """
    if entry_point:
        return frozenset([entry_point])
    return frozenset(_CALLED.findall(tests[:_LONGEST_TESTS])) - frozenset(dir(builtins))


def final_program(text: str, names: Collection[str] = ()) -> str | None:
    """Return the program that an answer gives, or None.

    Of the blocks that are called Python, or else of those that are called nothing, it is the last
    that defines one of the `names`; where none does, or no names are known, the last. A text
    without a block is a program where it defines one of them.
    """
    found = [*blocks(text)]
    if not found:
        return text if names and _defines(text, names) else None
    python = [block.code for block in found if block.language in _PYTHON]
    plain = [block.code for block in found if not block.language]
    for kind in (python, plain):
        for code in reversed(kind):
            if _defines(code, names):
                return code
    return (python or plain or [None])[-1]


def _defines(code: str, names: Collection[str]) -> bool:
    return any((match[1] or match[2]) in names for match in _DEFINED.finditer(code))
