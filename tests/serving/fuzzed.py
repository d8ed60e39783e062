"""Random texts that break tokenizers, templates and servers, the same ones for one seed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

LARGEST = 2**20
"""Characters of the longest text."""

COMBINING = [chr(c) for c in range(0x300, 0x370)] + ["\u0e33", "\u0f71", "\u20dd", "\ufe0f"]
CONTROL = [chr(c) for c in range(32)] + ["\x7f", "\x85", "\u2028", "\u2029", "\ufeff", "\u200b"]
BLANKS = [c for c in map(chr, range(0x3001)) if unicodedata.category(c) == "Zs"] + ["\t", "\u3164"]
LINE_ENDS = ["\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\t\n", "\u2028"]
SPELLINGS = [
    "<", "<｜", "<|", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "</thi", "{{", "{%",
    "<｜end▁of▁sentence｜>", "\\", '"', "\\u0000", "data: ", "```", "\\boxed{", "'s", "'S", "\x00",
]  # fmt: skip
WORDS = [
    "a",
    "word",
    "naïve",
    "Straße",
    "привет",
    "你好",
    "한국어",
    "العربية",
    "🚀",
    "👨‍👩‍👧",
    "0",
    "12345",
]


def random_text(rng: random.Random, *, surrogates: bool = False) -> str:
    """One text: most are short, one in a hundred has up to `LARGEST` characters.

    Args:
        rng: where all choices come from.
        surrogates: whether some texts have halves of surrogate pairs, which UTF-8 cannot spell.
    """
    largest = LARGEST if rng.random() < 0.01 else 4096
    length = int(largest ** rng.random())
    parts: list[str] = []
    while length > 0:
        kind = rng.choices(KINDS, WEIGHTS)[0]
        part = kind(rng, min(length, int(length ** rng.uniform(0.5, 1.05)) + 1))
        parts.append(part[:length])
        length -= len(parts[-1])
    if surrogates and rng.random() < 0.1:
        half = chr(rng.randrange(0xD800, 0xE000))
        parts.insert(rng.randrange(len(parts) + 1), half * rng.randrange(1, 5))
    return "".join(parts)


def _run(rng: random.Random, length: int) -> str:
    """One short thing again and again."""
    pool = rng.choice([LINE_ENDS, BLANKS, CONTROL, COMBINING, SPELLINGS, WORDS, [_any(rng)]])
    unit = rng.choice(pool)
    return unit * (length // len(unit) + 1)


def _mixed(rng: random.Random, length: int) -> str:
    """Of one pool, at random."""
    pool = rng.choice([LINE_ENDS, BLANKS, CONTROL, COMBINING, SPELLINGS, WORDS])
    return "".join(rng.choices(pool, k=length))


def _long_word(rng: random.Random, length: int) -> str:
    """Letters of one script without a break."""
    first = rng.choice([0x61, 0x430, 0x4E00, 0xAC00, 0x10480])
    return "".join(chr(first + rng.randrange(24)) for _ in range(length))


def _marked(rng: random.Random, length: int) -> str:
    """A letter under a tower of marks."""
    return "e" + "".join(rng.choices(COMBINING, k=length))


def _prose(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS, k=length // 3 + 1))


def _any_characters(rng: random.Random, length: int) -> str:
    return "".join(_any(rng) for _ in range(length))


def _any(rng: random.Random) -> str:
    """A character of any plane, assigned or not."""
    number = rng.randrange(0x110000 - 0x800)
    return chr(number if number < 0xD800 else number + 0x800)


KINDS: list[Callable[[random.Random, int], str]] = [
    _run, _mixed, _long_word, _marked, _prose, _any_characters,
]  # fmt: skip
WEIGHTS = [6, 3, 2, 2, 3, 1]
