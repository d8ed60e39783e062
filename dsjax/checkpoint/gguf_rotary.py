"""Rotary settings of a GGUF file, as llama.cpp reads them. Imports no jax.

    rope.scaling.type      none, linear, yarn; left out: linear
    rope.scaling.factor    by how much; older files say it as rope.scale_linear. Left out: 1
    rope_freqs.weight      Llama 3.1's extension: a divisor for each pair, and no setting

With yarn: `original_context_length` (left out: the context's length), `yarn_beta_fast` and
`yarn_beta_slow`, and `attn_factor`, which multiplies the amplitude 0.1 ln(factor) + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.architecture import DenseConfig
from dsjax.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The one extension that is known as a tensor: that of Llama 3.1 and its distills."""

_NEUTRAL = {
    "yarn_log_multiplier": (0,),
    "yarn_ext_factor": (1, -1),
    "yarn_attn_factor": (1,),
    "alpha": (0, 1),
}
"""Settings of other families' files, with the values that change nothing."""


def read_scaling(
    fields: Mapping[str, Any], family: str, *, factors: bool, file: Path
) -> dict[str, Any] | None:
    """`rope_scaling` as `ModelConfig` has it.

    Args:
        fields: the file's, by name.
        family: its architecture, which the names begin with.
        factors: whether there is a tensor `rope_freqs.weight`.
        file: for messages.

    Raises:
        UserError: naming a setting that is malformed or not computed here.
    """
    settings = _Settings(fields, family, file)
    for name, neutral in _NEUTRAL.items():
        if (value := settings.number(f"rope.scaling.{name}", neutral[0])) not in neutral:
            raise settings.refusal(f"rope.scaling.{name}", value)
    kind = fields.get(f"{family}.rope.scaling.type", "linear")
    factor = settings.number("rope.scaling.factor", 0) or settings.number("rope.scale_linear", 0)
    amplitude = settings.number("rope.scaling.attn_factor", 1)
    if kind not in ("none", "linear", "yarn"):
        raise settings.refusal("rope.scaling.type", kind)
    if kind != "yarn" and amplitude != 1:
        raise settings.refusal("rope.scaling.attn_factor", amplitude)
    plain = kind == "none" or (kind == "linear" and factor in (0, 1))
    if factors:
        if not plain:
            raise UserError(
                f"{file}: has both {ROPE_FACTORS} and rope.scaling.type {kind!r}; only one of them "
                "is computed"
            )
        return LLAMA3
    if plain:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return _yarn(settings, factor or 1.0, amplitude)


def _yarn(settings: _Settings, factor: float, amplitude: float) -> dict[str, Any]:
    length = settings.number("context_length")
    scaling = {
        "factor": factor,
        "original_max_position_embeddings": settings.number(
            "rope.scaling.original_context_length", length
        ),
        "beta_fast": settings.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if amplitude != 1:
        scaling["attention_factor"] = amplitude * (0.1 * math.log(max(factor, 1.0)) + 1)
    return scaling


class _Settings:
    """Numbers among a file's fields."""

    def __init__(self, fields: Mapping[str, Any], family: str, file: Path):
        self._fields, self._family, self._file = fields, family, file

    def number(self, name: str, default: float | None = None) -> Any:
        """One of them as it was written: floats are stored with 32 bits."""
        value = self._fields.get(f"{self._family}.{name}", default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(name, value)
        return as_written(value) if isinstance(value, float) else value

    def refusal(self, name: str, value: Any) -> UserError:
        """What to say of a setting that is not computed."""
        return UserError(
            f"{self._file}: rotary setting {self._family}.{name}={value!r} is not read from GGUF "
            "files; convert the model's Hugging Face folder"
        )


def as_written(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5, where the file has 9.99999975e-6."""
    return float(str(np.float32(value)))


def check_rope_factors(factors: np.ndarray, config: DenseConfig, file: Path) -> None:
    """By how much each pair is slowed down must be what Llama 3.1 does."""
    pairs = np.arange(config.head_dim // 2)
    turns = config.rope_theta ** (-2.0 * pairs / config.head_dim) / (2 * np.pi)
    turns *= LLAMA3["original_max_position_embeddings"]
    width = LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]
    kept = np.clip((turns - LLAMA3["low_freq_factor"]) / width, 0, 1)
    expected = 1 / (kept + (1 - kept) / LLAMA3["factor"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(f"{file}: {ROPE_FACTORS} is another rotary extension than Llama 3.1's")
