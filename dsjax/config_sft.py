"""Configuration of the tasks that learn from conversations: `sft` and `distill`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsjax.architecture import Section
from dsjax.config import (
    HeldOutConfig,
    LoopConfig,
    OptimizerConfig,
    RowsConfig,
    Schedule,
    Stage,
    TrainRunConfig,
)


class ChatDataConfig(RowsConfig):
    """Where conversations come from, and what of them is trained."""

    paths: list[str] = Field(min_length=1)
    """Globs of JSONL, JSON, CSV or parquet files; `dsjax.data.conversations` says what a row is."""
    chat_template: str | None = None
    """A jinja file, or the name of one under `configs/`; None takes the checkpoint's own."""
    train_on: Literal["all", "last"] = "all"
    """Every answer of the assistant, or the last one of a conversation only."""


class TuningOptimizerConfig(OptimizerConfig):
    """AdamW. A learning rate that is a number falls to a share of itself, by a cosine."""

    warmup_steps: int = Field(0, ge=0)
    final_share: float = Field(0.1, ge=0, le=1)
    """What is left of the learning rate when the run ends; 1 keeps it. A list of stages, over the
    tokens of rows, is followed as it is."""


class TuningLoopConfig(LoopConfig):
    """The training loop over conversations, each of which comes once in every epoch."""

    epochs: int = Field(gt=0)
    mtp_weight: Schedule = Field([Stage(value=0.1)])
    bias_update_rate: Schedule = Field([Stage(value=0.0)])
    """0 leaves the router biases as they are."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) on frozen weights."""

    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    """The adapters' product is multiplied by alpha / rank."""
    target_modules: list[str] | None = Field(None, min_length=1)
    """Released names of linear layers, such as q_proj or down_proj. None takes those of attention,
    and of the feed-forward where there are no routed experts, which have none."""


class TuningConfig(TrainRunConfig):
    """A run that begins at a checkpoint, and trains on the assistant's part of conversations."""

    init: str = Field(min_length=1)
    """The checkpoint to begin at: whatever `dsjax.load` reads."""
    data: ChatDataConfig
    optimizer: TuningOptimizerConfig
    training: TuningLoopConfig
    evaluation: HeldOutConfig
    lora: LoraConfig | None = None
    """None trains all weights."""


class SftConfig(TuningConfig):
    """Supervised tuning."""

    task: Literal["sft"] = "sft"


class TeacherConfig(Section):
    """Whose distribution is learned, and how much of the loss that is."""

    checkpoint: str = Field(min_length=1)
    """Whatever `dsjax.load` reads, of any architecture with the student's vocabulary."""
    temperature: float = Field(1.0, gt=0)
    """What both models' logits are divided by."""
    weight: float = Field(1.0, gt=0, le=1)
    """Of the divergence from the teacher; what is left is that of the answers' own tokens."""


class DistillConfig(TuningConfig):
    """Distillation on logits."""

    task: Literal["distill"] = "distill"
    teacher: TeacherConfig
