"""Language consistency: the share of an answer's words that are in the target language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dsjax.config_rewards import LANGUAGES, LanguageReward
from dsjax.rewards.answer import Answer

_SCRIPTS = {script for scripts in LANGUAGES.values() for script in scripts}
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI"}

_OPENINGS = re.compile(r"```|`|\$\$|\$|\\\(|\\\[|https?://\S+|</?\w+>|\\[A-Za-z]+")
_CLOSINGS = {"```": "```", "`": "`", "$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}


def language(config: LanguageReward, answer: Answer) -> float:
    """Words in the target language, divided by all words; 0 where there are none.

    DeepSeek-R1 (arXiv:2501.12948) section 2.3.2 rewards "the proportion of target language words
    in the CoT". Here a word's language is told by its script, so that languages of one script
    are one. Code, formulas, addresses and tags are left out, and so are letters that stand alone,
    which are symbols. Where a script has no spaces between words, each character counts as one.

    Differs from the paper: thought and answer are looked at alike; how words were told apart there
    is not published.
    """
    scripts = LANGUAGES[answer.example.get("language") or config.language or ""]
    words = count_words(answer.text)
    return sum(words[script] for script in scripts) / words.total() if words else 0.0


def check_language(config: LanguageReward, example: Any) -> str | None:
    """What is wrong with a line's target language, if anything is."""
    named = example.get("language") or config.language
    if named is None:
        return "the key 'language' is missing, and the reward names none"
    if not isinstance(named, str) or named not in LANGUAGES:
        return f"unknown language {named!r}; expected one of {', '.join(LANGUAGES)}"
    return None


def count_words(text: str) -> Counter[str]:
    """How many words of each script a text has, without code, formulas, addresses and tags."""
    return Counter(_words(prose(text)))


def prose(text: str) -> str:
    """The text without code, formulas, addresses, tags and LaTeX's words.

    What is opened and not closed goes on to the end, but a single backtick or dollar: these are
    characters then, and a price is no formula.
    """
    kept: list[str] = []
    place = 0
    while opened := _OPENINGS.search(text, place):
        kept.append(text[place : opened.start()])
        place = opened.end()
        closing = _CLOSINGS.get(opened[0])
        if closing is None:
            continue
        end = text.find(closing, place)
        if opened[0] in ("`", "$"):  # these stay within a line
            line = text.find("\n", place)
            end = -1 if end > line >= 0 else end
            place = place if end < 0 else end + 1
        else:
            place = len(text) if end < 0 else end + len(closing)
    return " ".join([*kept, text[place:]])


def _words(text: str) -> Iterator[str]:
    """The script of every word."""
    word, letters = "", 0
    for character in f"{text} ":
        script = _script(character)
        if script == "MARK" and word:
            continue  # an accent, a vowel sign: of the letter before it
        if script in _WITHOUT_SPACES:
            yield script
            script = ""
        if script == word and word:
            letters += 1
            continue
        if word and letters > 1:
            yield word
        word, letters = script, 1


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """LATIN, CJK and so on; MARK for what belongs to a letter, OTHER for scripts of no language
    here, and nothing for what is no letter."""
    if unicodedata.category(character)[0] == "M":
        return "MARK"
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").replace("-", " ").split()
    return next((part for part in name if part in _SCRIPTS), "OTHER")
