"""What an answer is worth beside the others of its group, and what each of its tokens counts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from dsjax.config_grpo import GrpoConfig

LEAST_STD = 1e-4
"""Standard deviations are at least this: rewards that differ by rounding alone say nothing."""


def group_advantages(
    rewards: Float[np.ndarray, "P G"], config: GrpoConfig
) -> Float[np.ndarray, "P G"]:
    """A_i = (R_i - mean R) / std R within a group (DeepSeek-R1, arXiv:2501.12948, equation 3).

    Dr. GRPO (arXiv:2503.20783, section 3.1) does not divide: easy and hard questions, whose rewards
    hardly differ, would count more than others.

    Differs from the papers: std has a floor.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    if config.objective == "dr_grpo":
        return centred
    return centred / np.maximum(rewards.std(1, keepdims=True), LEAST_STD)


def is_equal(rewards: Float[np.ndarray, "P G"]) -> np.ndarray:
    """Which groups say nothing, because all their answers are worth the same."""
    return rewards.max(1) - rewards.min(1) < LEAST_STD


def token_weights(
    lengths: Int[np.ndarray, "N"], trained: np.ndarray, config: GrpoConfig, max_tokens: int
) -> Float[np.ndarray, "N"]:
    """What every token of each answer counts, w of `objective.py`, normalized over all of a step.

    Args:
        lengths: tokens of each answer, at least one.
        trained: which answers have a gradient; the others count in N all the same.
    """
    answers = len(lengths)
    match config.objective:
        case "dr_grpo":
            weights = np.full(answers, 1 / (answers * max_tokens))
        case "dapo":
            weights = np.full(answers, 1 / max(int(lengths[trained].sum()), 1))
        case _:
            weights = 1 / (answers * lengths)
    return np.where(trained, weights, 0).astype(np.float32)
