"""Count answers that a verifier failed on, by reason, and refuse a first rollout of failures only.

A failed answer has the reward 0, so that one failure does not end a step. A run in which every
answer fails would train on rewards of 0.
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
    """Count answers without a value, by "reward: reason".

    The parenthesis of a reason, an exception's message, is left out: it may differ per answer.
    """
    return Counter(
        f"{name}: {reason.partition(' (')[0]}"
        for score in scores
        for name, reason in score.reasons.items()
    )


def describe_failures(scores: Sequence[Score]) -> str:
    """Summarize failures: "3 of 16 answers without a score: 2 math: time, 1 math: crash"."""
    counts = count_failures(scores)
    if not counts:
        return ""
    failed = sum(bool(score.reasons) for score in scores)
    alone = len(counts) == 1
    parts = ", ".join(reason if alone else f"{n} {reason}" for reason, n in counts.most_common())
    return f"{failed} of {len(scores)} answers without a score: {parts}"


def refuse_total_failure(scores: Sequence[Score], what: str) -> None:
    """Refuse a run in which all first answers fail for the same reason.

    Args:
        scores: of all first answers.
        what: their name in the message, such as "the first rollout".

    Raises:
        UserError: all failed alike. A generated program that crashes or runs out of time is no
            failure of the reward `code`.
    """
    for reason, count in count_failures(scores).items():
        name, _, kind = reason.partition(": ")
        if scores and count == len(scores) and not (name == "code" and kind in _OF_CODE):
            said = scores[0].reasons[name]
            raise UserError(
                f"the reward {name!r} has no value for any of the {count} answers of {what}: "
                f"{said}; mend it, or leave it out"
            )
