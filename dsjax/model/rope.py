"""Rotary position embedding with its extensions: linear, YaRN, and Llama 3.1's.

RoPE: arXiv:2104.09864. Linear: arXiv:2306.15595. YaRN: arXiv:2309.00071. DeepSeek-V3
(arXiv:2412.19437) section 4.3 extends the context with YaRN: only the rotary halves of queries and
keys are concerned. Llama 3.1's extension is defined by the code that came with it: arXiv:2407.21783
names only its base.

Families differ in what YaRN's mscales do. In all of them their ratio multiplies cos and sin; in
DeepSeek's attention mscale_all_dim also sharpens the softmax. `tests/parity/test_rotary.py`
compares every setting with transformers, and lists where DeepSeek's own code is followed instead.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.architecture import (
    DeepSeekConfig,
    LinearConfig,
    Llama3Config,
    ModelConfig,
    YarnConfig,
)

RotaryTable = tuple[Float[Array, "B S P"], Float[Array, "B S P"]]
"""cos and sin of every position's angles, one for each of the P pairs that turn."""


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotary pair, float32 [rotary_dim / 2].

        f_i = theta^(-2i/d);   extended   f_i' = f_i / factor * ramp_i + f_i * (1 - ramp_i)

    Differs from DeepSeek's code: YaRN applies whenever it is configured, not only to sequences
    beyond the original length (so does transformers).
    """
    dim, scaling = config.rotary_dim, config.rope_scaling
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (np.float32(1.0) / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearConfig):
        return frequencies / np.float32(scaling.factor)
    if isinstance(scaling, YarnConfig):
        ramp = _yarn_ramp(dim, config.rope_theta, scaling)
    else:
        ramp = _llama3_ramp(frequencies, scaling)
    return frequencies / np.float32(scaling.factor) * ramp + frequencies * (1 - ramp)


def _yarn_ramp(dim: int, theta: float, yarn: YarnConfig) -> np.ndarray:
    """0 for pairs that turn fast enough to stay as they are, 1 for those to be interpolated."""

    def pair_with(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    pairs = np.arange(dim // 2, dtype=np.float32)
    return np.clip((pairs - low) / width, 0, 1).astype(np.float32)


def _llama3_ramp(frequencies: np.ndarray, scaling: Llama3Config) -> np.ndarray:
    """The same, linear in how often a pair turns over the original length."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    return np.clip((scaling.high_freq_factor - turns) / width, 0, 1).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1: how much attention sharpens with the extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_amplitude(config: ModelConfig) -> float:
    """Factor on cos and sin under YaRN: 1 where both mscales agree, as in every released DeepSeek.

    Differs from transformers in one case: DeepSeek's mscale without mscale_all_dim counts, as in
    DeepSeek's code; transformers takes 1 for it, as the other families do.
    """
    yarn = config.rope_scaling
    if not isinstance(yarn, YarnConfig):
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """(width of a head)^-0.5; DeepSeek's times m squared under YaRN (m from mscale_all_dim)."""
    scale, yarn = config.qk_head_dim**-0.5, config.rope_scaling
    if isinstance(config, DeepSeekConfig) and isinstance(yarn, YarnConfig):
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rotary_table(config: ModelConfig, positions: Int[Array, "B S"]) -> RotaryTable:
    """cos and sin at these positions, float32."""
    frequencies = jnp.asarray(rotary_frequencies(config))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    amplitude = rotary_amplitude(config)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate_pairs(x: Array, table: RotaryTable) -> Array:
    """Turn the neighbours (x_2i, x_2i+1) of the last dimension; x is [B, S, R] or [B, S, H, R].

    The result has all first members, then all second ones. Queries and keys are reordered alike,
    so their products are those of the released DeepSeek models.
    """
    return _turn(x[..., 0::2], x[..., 1::2], table)


def rotate_halves(x: Array, table: RotaryTable) -> Array:
    """Turn (x_i, x_i+R/2): Llama's and Qwen's released weights pair the halves of a head."""
    first, second = jnp.split(x, 2, axis=-1)
    return _turn(first, second, table)


def _turn(first: Array, second: Array, table: RotaryTable) -> Array:
    cos, sin = (t if first.ndim == 3 else t[:, :, None] for t in table)
    x, y = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [x * cos - y * sin, y * cos + x * sin]
    return jnp.concatenate(turned, axis=-1).astype(first.dtype)
