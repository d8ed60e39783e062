"""From what a model wrote to grades.

Verifiers that evaluate or run it take seconds, so what they said is kept in a journal: a grading
that was killed goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsjax.config_rewards import CodeReward, MathReward
from dsjax.evaluation.protocol import Key, Sample
from dsjax.evaluation.statistics import Grade
from dsjax.evaluation.task import Task
from dsjax.inference.reader import Reader
from dsjax.journal import Journal
from dsjax.rewards.answer import Answer, final_answer
from dsjax.rewards.score import Scorer

REWARDS = {"math": MathReward, "code": CodeReward}

AT_ONCE = 256
"""Answers that are verified before what they are worth is written down."""


def check_verifiers(tasks: Sequence[Task]) -> None:
    """See that what the tasks are judged by works here, before hours are spent on answers.

    Raises:
        UserError: a package is missing, nothing isolates, or a question lacks what is needed.
    """
    for task in tasks:
        if not callable(task.check):
            with Scorer([REWARDS[task.check]()], workers=1) as scorer:
                for question in task.questions:
                    scorer.check(question.example, f"{task.name}: question {question.id!r}")


def grade(
    task: Task,
    reader: Reader,
    samples: Sequence[Sample],
    answers: Journal[Key],
    verdicts: Path,
) -> tuple[list[list[Grade]], Counter[str]]:
    """Grades of each question's samples, and how often a verifier came to no end, by its reason.

    Args:
        samples: those of the task, question by question.
        answers: what was drawn for them.
        verdicts: the file that keeps what verifiers said, if the task has such.

    Raises:
        UserError: a verifier cannot work here: a package is missing, or nothing isolates.
    """
    examples = {question.id: question.example for question in task.questions}
    read = {s.key: _read(reader, s, answers, examples[s.key.question]) for s in samples}
    votes = {key: _vote(task, answer) for key, answer in read.items()}
    failures: Counter[str] = Counter()
    if callable(check := task.check):
        right = {
            key: vote is not None and check(vote, read[key].example) for key, vote in votes.items()
        }
    else:
        reward = REWARDS[check]()
        said = _verify(reward, read, answers, verdicts)
        right = {key: record["correct"] for key, record in said.items()}
        failures.update(record["reason"] for record in said.values() if record["reason"])
    grades: dict[str, list[Grade]] = {}
    for key, answer in read.items():
        one = Grade(right[key], votes[key], answer.tokens, answer.truncated)
        grades.setdefault(key.question, []).append(one)
    return list(grades.values()), failures


def _read(reader: Reader, sample: Sample, answers: Journal[Key], example: Any) -> Answer:
    record = answers.records[sample.key]
    prompt = reader.decode(sample.prompt)
    return Answer(prompt, record["text"], record["tokens"], record["truncated"], example)


def _vote(task: Task, answer: Answer) -> str | None:
    text = final_answer(answer)
    return None if text is None else task.vote(text)


def _verify(
    reward: MathReward | CodeReward, read: dict[Key, Answer], answers: Journal[Key], file: Path
) -> dict[Key, dict[str, Any]]:
    """What the reward says of each answer; only of those without a record it is asked."""
    settings = {**answers.settings, "reward": reward.model_dump()}
    with Journal(file, settings, Key) as journal:
        missing = [key for key in read if key not in journal.records]
        if missing:
            with Scorer([reward]) as scorer:
                for keys in _chunks(missing):
                    for key, score in zip(
                        keys, scorer.score([read[key] for key in keys]), strict=True
                    ):
                        reason = score.reasons.get(reward.name)
                        journal.write(key, {"correct": score.total == 1, "reason": reason})
        return {key: journal.records[key] for key in read}


def _chunks(keys: list[Key]) -> Iterator[list[Key]]:
    for begin in range(0, len(keys), AT_ONCE):
        yield keys[begin : begin + AT_ONCE]
