"""Rewards that look at text alone: exact match, a chosen letter, the format, the length."""

from __future__ import annotations

import re
import string

from dsjax.config_rewards import ChoiceReward, ExactReward, FormatReward, LengthReward
from dsjax.data.thinking import CLOSED, OPENED, begins_in_thought, split_thought
from dsjax.rewards.answer import Answer, final_answer
from dsjax.rewards.letters import final_letter


def exact(_: ExactReward, answer: Answer) -> float:
    """1 where the final answer, blanks at both ends aside, is the line's `answer`."""
    return float(final_answer(answer) == str(answer.example["answer"]).strip())


def choice(_: ChoiceReward, answer: Answer) -> float:
    """1 where the letter that the answer chooses is the line's `answer`.

    `choices` are the options, or their letters.
    """
    text = final_answer(answer)
    letters = string.ascii_uppercase[: len(answer.example["choices"])]
    if text is None:
        return 0.0
    return float(final_letter(text, letters) == str(answer.example["answer"]).strip().upper())


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
