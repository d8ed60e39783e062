"""From the text of an answer to its grade."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dsjax.evaluation.answers import without_thought
from dsjax.evaluation.task import Question, Task


def grade(
    task: Task, answers: Iterable[tuple[Question, str, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """A record for each answer: `correct`, and `vote`, the final answer that was read, or None.

    What follows the thought is judged, and nothing if the thought did not end.

    Args:
        answers: question, the prompt's text as the model read it, and the record of the answer.
    """
    grades = []
    for question, prompt, answer in answers:
        text = without_thought(prompt, answer["text"])
        vote = None if text is None else task.vote(text)
        correct = vote is not None and task.check(vote, question.example)
        grades.append({"correct": correct, "vote": vote})
    return grades
