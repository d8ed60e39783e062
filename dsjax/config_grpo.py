"""Configuration of reinforcement learning with verifiable rewards (`task: grpo`)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dsjax.architecture import Section
from dsjax.config import RunConfig, StepConfig
from dsjax.config_rewards import RewardConfig


class PromptsConfig(Section):
    """Questions. A line of a file has `prompt`, a text or messages, and what rewards need."""

    path: str
    """A glob of JSONL, JSON, CSV or parquet files, or `comparison`, a million that need no file."""
    held_out_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Of the questions, by a digest of each; those are never trained on."""
    template: str | None = Field(default=None, pattern=r"\{prompt\}")
    """What a prompt that is a text is put into, at `{prompt}`."""


class SamplingConfig(Section):
    """How answers are drawn. Their log-probabilities are those of this very distribution."""

    max_tokens: int = Field(gt=0)
    temperature: float = Field(default=1.0, gt=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    rows: int = Field(default=64, gt=0)
    """Answers that are written at the same time."""


class GrpoConfig(Section):
    """Group relative policy optimization (DeepSeekMath, arXiv:2402.03300, section 4.1)."""

    objective: Literal["r1", "grpo", "dr_grpo", "dapo"] = "grpo"
    """What is normalized how: dsjax/posttraining/objective.py."""
    group_size: int = Field(default=16, gt=0)
    """Answers to a question, G."""
    prompts_per_step: int = Field(default=32, gt=0)
    """Questions of one optimizer step."""
    steps_per_rollout: int = Field(default=1, gt=0)
    """Optimizer steps whose answers are drawn at once, from the same weights."""
    inner_epochs: int = Field(default=1, gt=0)
    """How often these answers are gone through."""
    clip_epsilon: float = Field(default=0.2, gt=0)
    clip_epsilon_high: float | None = Field(default=None, gt=0)
    """Of ratios above 1; None: the same."""
    kl_weight: float = Field(default=0.001, ge=0)
    """beta; with 0 there is no reference."""
    kl_estimator: Literal["forward_k3", "reverse_k2", "reverse_k3"] = "forward_k3"
    """By what its gradient is, in expectation; the papers print forward_k3."""
    reference: str | None = None
    """The checkpoint that is the first reference; None: the weights that the run starts from."""
    reference_every: int | None = Field(default=None, gt=0)
    """Steps after which the reference becomes the policy of then; None: never."""
    refills: int = Field(default=0, ge=0)
    """How often other questions are asked in the place of those whose answers are all worth the
    same, which have no advantage."""
    truncated: Literal["as_scored", "not_trained"] = "as_scored"
    """What becomes of answers that ran into their limit: their reward counts in either case."""
    router_replay: bool = True
    """Whether tokens go to the experts that they went to when they were drawn."""
    bias_update_rate: float = Field(default=0.0, ge=0)
    """Of the router's bias, a step; 0 freezes it."""
    shuffled_rewards: bool = False
    """A control, which must not learn what is asked: a rollout's values of the first reward, that
    of being right, are dealt anew among its answers. The others, such as form, stay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size == 1:
            raise ValueError("group_size=1: no answer is better than its group; choose 2 or more")
        return self


class RewardedStepConfig(StepConfig):
    """How long, and how one step computes."""

    max_steps: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    """Tokens of a row; questions with their answers are packed into rows."""


class RewardEvaluationConfig(Section):
    """Held-out questions while training."""

    every_steps: int = Field(gt=0)
    prompts: int = Field(gt=0)
    samples: int = Field(default=1, gt=0)
    """Answers to each, drawn as in training; pass@1 is their mean."""


class GrpoRunConfig(RunConfig):
    """A run that learns from rewards."""

    task: Literal["grpo"] = "grpo"
    init: str | None = None
    """The checkpoint to start from, of the architecture `model`; None: random weights."""
    tokenizer: str | None = None
    """A folder that holds one, or `bytes`, which needs no file; None: the checkpoint's own."""
    prompts: PromptsConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    sampling: SamplingConfig
    grpo: GrpoConfig
    training: RewardedStepConfig
    evaluation: RewardEvaluationConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = self.grpo.steps_per_rollout * self.grpo.inner_epochs
        if self.training.max_steps % taken:
            raise ValueError(
                f"training.max_steps={self.training.max_steps} is no multiple of the {taken} steps "
                "of a rollout (grpo.steps_per_rollout times inner_epochs); choose one that is"
            )
        return self
