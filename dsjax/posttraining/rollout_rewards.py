"""From drawn answers to what they are worth: text, scores, advantages, and what is said of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from dsjax.config_grpo import GrpoRunConfig
from dsjax.data.language import Language
from dsjax.posttraining.advantages import group_advantages, is_equal
from dsjax.posttraining.rows import Written
from dsjax.rewards.answer import Answer
from dsjax.rewards.failures import count_failures
from dsjax.rewards.score import Score, Scorer
from sharding.distributed import WORK_SECONDS, gather


@dataclasses.dataclass(frozen=True)
class Rollout:
    """P groups of G answers, scored."""

    written: list[list[Written]]
    scores: list[list[Score]]
    advantages: Float[np.ndarray, "P G"]
    equal: Bool[np.ndarray, "P"]
    """Groups whose answers are all worth the same."""

    def part(self, begin: int, end: int) -> Rollout:
        """Some of its groups."""
        cut = slice(begin, end)
        return Rollout(self.written[cut], self.scores[cut], self.advantages[cut], self.equal[cut])

    def refilled(self, found: Rollout) -> Rollout:
        """The groups that say nothing replaced, one by one, by those that were found instead."""
        at = iter(range(len(found.equal)))
        chosen = [(found, next(at)) if equal else (self, n) for n, equal in enumerate(self.equal)]
        return Rollout(
            [one.written[n] for one, n in chosen],
            [one.scores[n] for one, n in chosen],
            np.stack([one.advantages[n] for one, n in chosen]),
            np.array([one.equal[n] for one, n in chosen]),
        )


def score_groups(
    written: list[list[Written]],
    records: Sequence[Mapping[str, Any]],
    language: Language,
    scorer: Scorer,
) -> list[list[Score]]:
    """The scores of all answers, group by group; every process verifies its share of them."""
    drawn = [(one, record) for group, record in zip(written, records, strict=True) for one in group]
    count = jax.process_count()
    answers = [
        Answer(
            language.tokenizer.decode(one.prompt),
            language.decode(one.tokens),
            len(one.tokens),
            one.truncated,
            record,
        )
        for one, record in drawn[jax.process_index() :: count]
    ]
    mine = [dataclasses.asdict(score) for score in scorer.score(answers)]
    parts = gather("scores", mine, WORK_SECONDS)
    flat = (Score(**parts[number % count][number // count]) for number in range(len(drawn)))
    return [[next(flat) for _ in group] for group in written]


def weigh(
    written: list[list[Written]],
    scores: list[list[Score]],
    config: GrpoRunConfig,
    seed: Sequence[int],
) -> Rollout:
    """Advantages within each group. In a control, who is right is dealt anew among all answers."""
    rewards = np.array([[score.total for score in group] for group in scores], np.float64)
    if config.grpo.shuffled_rewards:
        name, weight = config.rewards[0].name, config.rewards[0].weight
        right = weight * np.array([[score.values[name] for score in group] for group in scores])
        dealt = np.random.default_rng(seed).permutation(right.ravel()).reshape(right.shape)
        rewards += dealt - right
    return Rollout(written, scores, group_advantages(rewards, config.grpo), is_equal(rewards))


def describe(rollout: Rollout) -> dict[str, Any]:
    """Figures of these answers for the record; `solved` is by the first reward."""
    scores = [score for group in rollout.scores for score in group]
    written = [one for group in rollout.written for one in group]
    return {
        "reward": float(np.mean([score.total for score in scores])),
        **{
            f"reward_{name}": float(np.mean([score.values[name] for score in scores]))
            for name in scores[0].values
        },
        "solved": float(np.mean(is_solved(rollout.scores))),
        "unscored": float(np.mean([bool(score.reasons) for score in scores])),
        "equal_groups": float(rollout.equal.mean()),
        "truncated": float(np.mean([one.truncated for one in written])),
        "answer_tokens": float(np.mean([len(one.tokens) for one in written])),
        **{f"failed {reason}": count for reason, count in sorted(count_failures(scores).items())},
    }


def is_solved(scores: Sequence[Sequence[Score]]) -> Bool[np.ndarray, "P G"]:
    """Which answers the first reward finds right."""
    return np.array([[next(iter(s.values.values())) >= 1 for s in group] for group in scores])


def best_constant(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The score of always giving the commonest answer; None where questions have none."""
    answers = [str(record["answer"]) for record in records if "answer" in record]
    return max(Counter(answers).values()) / len(records) if answers else None
