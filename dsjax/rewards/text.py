"""Rewards that look at text alone: exact match, a chosen letter, the format, the length."""

from __future__ import annotations

import re
import string

from dsjax.config_rewards import ChoiceReward, ExactReward, FormatReward, LengthReward
from dsjax.data.thinking import CLOSED, OPENED, begins_in_thought, split_thought
from dsjax.rewards.answer import Answer, final_answer


def exact(_: ExactReward, answer: Answer) -> float:
    """1 where the final answer, blanks at both ends aside, is the line's `answer`."""
    return float(final_answer(answer) == str(answer.example["answer"]).strip())


# ---------------------------------------------------------------------------------------------
# Multiple choice
# ---------------------------------------------------------------------------------------------

_LETTER = r"[(\[{*_$]{0,4}([A-Z])(?![A-Za-z0-9'’])"
_SAID = re.compile(
    r"\\boxed\s{0,3}\{\s{0,3}(?:\\(?:text|textbf|mathrm|mathbf)\s{0,3}\{)?\s{0,3}"
    + _LETTER
    + r"|(?i:answer|choice|option)(?i:\s{1,3}is)?\s{0,3}[:=]?[\s*_]{0,6}"
    + r"(?:(?i:option|choice)\s{1,3})?"
    + _LETTER
)
"""\\boxed{C}; "the answer is (C)", "Answer: **C**", "option C"."""

_ALONE = re.compile(r"^[\s(\[*_]{0,6}([A-Z])(?:[)\].:*_\s]|$)", re.MULTILINE)
"""A line that begins with a letter alone: "C", "(C)", "C. because"."""


def choice(_: ChoiceReward, answer: Answer) -> float:
    """1 where the letter that the answer chooses is the line's `answer`.

    `choices` are the options, or their letters. The last letter counts that is boxed or called
    the answer; without any, the last that begins a line on its own.
    """
    text = final_answer(answer)
    letters = string.ascii_uppercase[: len(answer.example["choices"])]
    if text is None:
        return 0.0
    for pattern in (_SAID, _ALONE):
        found = ["".join(filter(None, match.groups())) for match in pattern.finditer(text)]
        if known := [letter for letter in found if letter in letters]:
            return float(known[-1] == str(answer.example["answer"]).strip().upper())
    return 0.0


# ---------------------------------------------------------------------------------------------
# Format and length
# ---------------------------------------------------------------------------------------------

_TAG = re.compile(r"</?(?:think|answer)>")


def format_(config: FormatReward, answer: Answer) -> float:
    """1 where the tags stand each once and in order, prompt and text read together.

    A thought that the prompt opened counts as opened. Nothing but blanks stands before the thought,
    and the answer after it is not empty. With `answer_tags`, nothing but blanks stands outside of
    <answer> and </answer> there.
    """
    opened = [OPENED] if begins_in_thought(answer.prompt) else []
    expected = [OPENED, CLOSED] + (["<answer>", "</answer>"] if config.answer_tags else [])
    found = opened + _TAG.findall(answer.text)
    if not config.answer_tags:  # then these are text like any other
        found = [tag for tag in found if tag in (OPENED, CLOSED)]
    thought, content = split_thought(answer.prompt, answer.text)
    if answer.truncated or found != expected or thought is None or content is None:
        return 0.0
    after = content.strip()
    if config.answer_tags:
        inside = after.removeprefix("<answer>").removesuffix("</answer>")
        return float(len(inside) == len(after) - len("<answer></answer>") and bool(inside.strip()))
    return float(bool(after))


def length(config: LengthReward, answer: Answer) -> float:
    """0, from `limit - margin` tokens on falling by a line, -1 from `limit` on.

    DAPO (arXiv:2503.14476) equation 13. Differs from the paper: nothing; `limit` is L_max, `margin`
    L_cache, and an answer that was cut off has at least as many tokens as it was let.
    """
    over = answer.tokens - (config.limit - config.margin)
    return -min(max(over / config.margin, 0.0), 1.0)
