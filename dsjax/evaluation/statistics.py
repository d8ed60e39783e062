"""Scores of a task from the grades of its samples, with intervals over questions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 10_000_000
"""Numbers drawn at a time, so that MMLU's 14,042 questions need no gigabyte."""


@dataclasses.dataclass(frozen=True)
class Grade:
    """What one sample is worth."""

    correct: bool
    vote: str | None
    """The final answer that was read; None: there is none."""
    tokens: int
    truncated: bool


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A share from 0 to 1, and the 95% interval that it lies in."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The scores of one task; k samples of each question."""

    questions: int
    k: int
    pass_at_1: Estimate
    """Mean over questions of the share of right samples."""
    cons_at_k: Estimate | None
    """Share of questions whose most frequent answer is right; None where answers have no votes."""
    pass_at_k: Estimate
    """Share of questions with at least one right sample."""
    answered: float
    """Share of samples in which a final answer was found."""
    truncated: float
    """Share of samples that ran into their limit."""
    mean_tokens: float
    failures: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Answers that a verifier came to no end with, counted by its reason; they count as wrong."""


def score_task(
    grades: Sequence[Sequence[Grade]], *, votes: bool, failures: Mapping[str, int]
) -> TaskScore:
    """Scores of a task.

    pass@1 is the mean over all samples and cons@k the majority's, as in DeepSeek-R1
    (arXiv:2501.12948), section 3. Samples without an answer have no vote; of equally frequent
    answers the one that came first counts.

    Args:
        grades: of each question, those of its k samples in order.
        votes: whether equal votes are equal answers.
        failures: what to report as such.
    """
    every = [grade for samples in grades for grade in samples]
    shares = np.array([np.mean([g.correct for g in samples]) for samples in grades])
    majorities = np.array([majority(samples) for samples in grades], float)
    return TaskScore(
        questions=len(grades),
        k=len(grades[0]),
        pass_at_1=bootstrap(shares),
        cons_at_k=bootstrap(majorities) if votes else None,
        pass_at_k=bootstrap((shares > 0).astype(float)),
        answered=float(np.mean([g.vote is not None for g in every])),
        truncated=float(np.mean([g.truncated for g in every])),
        mean_tokens=float(np.mean([g.tokens for g in every])),
        failures=dict(failures),
    )


def majority(samples: Sequence[Grade]) -> bool:
    """Whether the most frequent answer is right.

    >>> right, wrong = Grade(True, "4", 1, False), Grade(False, "5", 1, False)
    >>> majority([wrong, right, right]), majority([wrong, right])
    (True, False)
    """
    counts = Counter(grade.vote for grade in samples if grade.vote is not None)
    if not counts:
        return False
    [(chosen, _)] = counts.most_common(1)  # of equals, the first that was met
    return next(grade.correct for grade in samples if grade.vote == chosen)


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of `values`, and its percentile interval over resampled questions.

    Questions are drawn with replacement `RESAMPLES` times; 2.5% of the means lie below `low`, and
    as many above `high`. Says nothing about samples of a question: those are in its own value. If
    all values are equal so are both limits, which is no certainty with few questions.

    Args:
        values: one for each question.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    rows = max(1, _AT_ONCE // count)
    means = [
        values[rng.integers(count, size=(min(rows, RESAMPLES - begin), count))].mean(axis=1)
        for begin in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))
