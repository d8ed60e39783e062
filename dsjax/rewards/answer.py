"""An answer as a reward sees it, and where in it the thought ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.data.thinking import split_thought


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of a model to one prompt, and the task that it answers."""

    prompt: str
    """As the model read it, template applied; it may end in an opened <think>."""
    text: str
    """What the model wrote; thought's tags are text in it."""
    tokens: int
    """The length of `text` in tokens."""
    truncated: bool
    """It ran into its limit of tokens: it has no end."""
    example: Mapping[str, Any]
    """The prompt file's line: "answer", "tests", "choices", "language", whatever the task has."""


def final_answer(answer: Answer) -> str | None:
    """The content, stripped, as `ReasoningParser` finds it; None where there is no answer.

    Of the content, what stands inside the last <answer> and </answer>, if they do. A thought that
    does not end has no answer, and neither has a text that ran into its limit.
    """
    _, content = split_thought(answer.prompt, answer.text)
    if answer.truncated or content is None:
        return None
    marked = content.rpartition("</answer>")[0].rpartition("<answer>")
    return (marked[2] if marked[1] else content).strip()
