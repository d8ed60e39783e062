"""Fill-in-the-middle: some documents are reordered so that the middle comes last."""

from __future__ import annotations

import numpy as np

from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError


def split_in_three(text: str, random: np.random.Generator) -> tuple[str, str, str]:
    """Cut at two points drawn uniformly on the characters: prefix, middle, suffix."""
    first, second = sorted(random.integers(0, len(text), size=2, endpoint=True))
    return text[:first], text[first:second], text[second:]


def fill_in_the_middle(text: str, tokenizer: Tokenizer, random: np.random.Generator) -> list[int]:
    """The ids of `text` in the order prefix, suffix, middle.

    DeepSeek-V3 (arXiv:2412.19437) section 4.1, at the level of documents, before packing:

        <fim_begin> prefix <fim_hole> suffix <fim_end> middle

    Differs from the paper: nothing, but it does not say how the cuts are drawn.
    """
    begin, hole, end = fim_ids(tokenizer)
    prefix, middle, suffix = map(tokenizer.encode, split_in_three(text, random))
    return [begin, *prefix, hole, *suffix, end, *middle]


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of begin, hole and end; `UserError` when the tokenizer lacks one."""
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        raise UserError(
            "the tokenizer has no <｜fim▁begin｜>, <｜fim▁hole｜> and <｜fim▁end｜>; "
            "set data.fim_rate=0, or use a tokenizer that has them"
        )
    return begin, hole, end
