"""Tiny runs of reinforcement learning: numbers to compare, and a smallest model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.runs import as_overrides

MODEL = {
    "vocab_size": 261,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
    "moe_intermediate_size": 16,
    "intermediate_size": 64,
}
PLAIN_TEXT = Path(__file__).parent / "plain_text.py"


def overrides(run_dir: Path, **changes: Any) -> list[str]:
    """What turns `r1/cpu-comparison` into a run of seconds; `changes` use __ for the dot."""
    settings: dict[str, Any] = {
        "run_dir": str(run_dir),
        "init": None,
        "tokenizer": "bytes",
        # Random weights are never right: without a second reward nothing would be learned.
        "rewards": [{"name": "exact"}, {"name": "python", "path": str(PLAIN_TEXT), "weight": 0.3}],
        **{f"model.{name}": value for name, value in MODEL.items()},
        "sampling.rows": 16,
        "grpo.prompts_per_step": 4,
        "grpo.group_size": 4,
        "grpo.inner_epochs": 1,
        "grpo.kl_weight": 0.01,
        "grpo.reference_every": 2,
        "training.max_steps": 6,
        "training.microbatch_size": 8,
        "training.sequence_length": 64,
        "checkpoint.every_steps": 1,
        "evaluation.every_steps": 3,
        "evaluation.prompts": 8,
    }
    return as_overrides(settings, changes)
