"""Which answers are kept, and why the others are not.

DeepSeek-R1 (arXiv:2501.12948) section 2.3.3 keeps the correct ones of several answers, and filters
out "chain-of-thought with mixed languages, long paragraphs, and code blocks".

Differs from the paper: its limits are not published, so they are ours. Text that repeats itself,
that has broken characters or stray tags, or that was there already, is left out as well.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsjax.config_rewards import LANGUAGES, LanguageReward
from dsjax.config_sample import (
    CorrectFilter,
    FilterConfig,
    FinishedFilter,
    LanguageFilter,
    ReadableFilter,
    SampleConfig,
)
from dsjax.data.thinking import CLOSED, OPENED, split_thought, think_tags
from dsjax.errors import UserError
from dsjax.inference.drawing import seed_of
from dsjax.posttraining.sample_rows import Drawn
from dsjax.rewards.answer import Answer, final_answer
from dsjax.rewards.language import check_language, count_words

KEPT = "kept"

PIECE = 80
"""Characters of a piece; a text in which one stands `TIMES` times repeats itself."""
TIMES = 4

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
"""Control characters but tab and the ends of lines; what stands for bytes that are no text."""


def check_line(filters: Iterable[FilterConfig], example: Mapping[str, Any], where: str) -> None:
    """Look at a line of the prompt file before a model spends time on it.

    Raises:
        UserError: its language is not known; the message begins with `where`.
    """
    if example.get("language") is None:
        return
    problem = check_language(LanguageReward(), example)
    if problem and any(isinstance(each, LanguageFilter) for each in filters):
        raise UserError(f"{where}: the filter 'language': {problem}")


class Judge:
    """Verdicts on the answers to one prompt after the other: `KEPT`, or the reason why not."""

    def __init__(self, config: SampleConfig):
        self._config = config
        self._seen: set[bytes] = set()
        """Digests of what was kept, if that has to be distinct."""

    def judge(self, group: Sequence[Drawn]) -> list[str]:
        """Verdicts on the answers to one prompt, in their order."""
        verdicts = [self._verdict(drawn) for drawn in group]
        kept = [place for place, verdict in enumerate(verdicts) if verdict == KEPT]
        if (most := self._config.keep_per_prompt) is not None:
            kept.sort(key=lambda place: seed_of(group[place].seed, ("keep",)))
            for place in kept[most:]:
                verdicts[place] = "over keep_per_prompt"
        return verdicts

    def _verdict(self, drawn: Drawn) -> str:
        answer = drawn.answer
        mark = None
        for each in self._config.filters:
            match each:
                case FinishedFilter():
                    reason = _unfinished(answer)
                case CorrectFilter():
                    reason = None if drawn.is_right else "wrong"
                case LanguageFilter():
                    reason = "mixed language" if _is_mixed(each, answer) else None
                case ReadableFilter():
                    problem = _unreadable(each, answer)
                    reason = problem and f"unreadable: {problem}"
                case _:
                    mark = _mark(answer)
                    reason = "duplicate" if mark in self._seen else None
            if reason is not None:
                return reason
        if mark is not None:
            self._seen.add(mark)
        return KEPT


def _unfinished(answer: Answer) -> str | None:
    if answer.truncated:
        return "truncated"
    return "unfinished thought" if final_answer(answer) is None else None


def _is_mixed(config: LanguageFilter, answer: Answer) -> bool:
    """Whether too few words are in the target language, or, if there is none, in any single one."""
    words = count_words(answer.text)
    named = answer.example.get("language") or config.language
    targets = [LANGUAGES[named]] if named else LANGUAGES.values()
    most = max(sum(words[script] for script in scripts) for scripts in targets)
    return most < config.share * words.total()


def _unreadable(config: ReadableFilter, answer: Answer) -> str | None:
    """What keeps a reader from following, if anything does.

    Broken characters and repetition are looked for in all of the text, tags where none belong in
    what is left without the thought's own two, a code block in the thought alone; long paragraphs
    in the thought, or in the whole of an answer without one, code aside.
    """
    thought, content = split_thought(answer.prompt, answer.text)
    if _BROKEN.search(answer.text):
        return "broken characters"
    tags = think_tags(answer.prompt, answer.text)
    if tags != [OPENED, CLOSED][: len(tags)] or (tags and thought is None):
        return "stray tag"
    if "```" in (thought or ""):
        return "code block in thought"
    prose = (content or "") if thought is None else thought
    paragraphs = _BLANK_LINE.split(_FENCED.sub("\n\n", prose))
    if max(map(len, paragraphs)) > config.longest_paragraph:
        return "long paragraph"
    return "repetition" if repeats_itself(answer.text) else None


def repeats_itself(text: str) -> bool:
    """Whether some piece of `PIECE` characters stands `TIMES` times in it, overlaps included.

    >>> repeats_itself("Wait, that is not right. " * 12), repeats_itself("Wait. " * 12)
    (True, False)
    """
    pieces = Counter(text[at : at + PIECE] for at in range(len(text) - PIECE + 1))
    return bool(pieces) and max(pieces.values()) >= TIMES


def _mark(answer: Answer) -> bytes:
    """The same for answers to the same prompt whose thought and content differ in case and blanks
    at most."""
    parts = [answer.prompt, *split_thought(answer.prompt, answer.text)]
    plain = [" ".join(unicodedata.normalize("NFKC", part or "").casefold().split())
             for part in parts]  # fmt: skip
    return hashlib.blake2b(repr(plain).encode("utf-8", "backslashreplace"), digest_size=16).digest()
