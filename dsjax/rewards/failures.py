"""Answers that a verifier gave no value: counted by the reason, and refused if they are all.

Such an answer has the value 0, so that one of them spoils no step; a run in which nothing is ever
scored would go on with rewards of 0, and learn nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dsjax.errors import UserError
from dsjax.rewards import jail
from dsjax.rewards.score import Score

_OF_CODE = (jail.TIME, jail.MEMORY, jail.OUTPUT, jail.CRASH)
"""How a program that a model wrote may well end: the reward `code` of a model that writes no good
ones has these reasons for every answer."""


def count_failures(scores: Sequence[Score]) -> Counter[str]:
    """How many answers a reward has no value of, by "reward: reason".

    What a reason has in parentheses, an exception's message, is left out: it may differ with every
    answer.
    """
    return Counter(
        f"{name}: {reason.partition(' (')[0]}"
        for score in scores
        for name, reason in score.reasons.items()
    )


def describe_failures(scores: Sequence[Score]) -> str:
    """One line of it, such as "3 of 16 answers without a score: 2 math: time, 1 math: crash"."""
    counts = count_failures(scores)
    if not counts:
        return ""
    failed = sum(bool(score.reasons) for score in scores)
    alone = len(counts) == 1
    parts = ", ".join(reason if alone else f"{n} {reason}" for reason, n in counts.most_common())
    return f"{failed} of {len(scores)} answers without a score: {parts}"


def refuse_total_failure(scores: Sequence[Score], what: str) -> None:
    """See that the first answers of a run are not all without a score for the same reason.

    Args:
        scores: of all of them.
        what: what they are, such as "the first rollout".

    Raises:
        UserError: they are; a program of a model's that fails is not meant, its value is 0.
    """
    for reason, count in count_failures(scores).items():
        name, _, kind = reason.partition(": ")
        if scores and count == len(scores) and not (name == "code" and kind in _OF_CODE):
            said = scores[0].reasons[name]
            raise UserError(
                f"the reward {name!r} has no value for any of the {count} answers of {what}: "
                f"{said}; mend it, or leave it out"
            )
