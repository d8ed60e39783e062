"""Rotary position embedding with YaRN, as DeepSeek applies it to the decoupled part of MLA.

RoPE: arXiv:2104.09864. YaRN: arXiv:2309.00071. DeepSeek-V3 (arXiv:2412.19437) section 4.3 extends
the context with it: only the rotary halves of queries and keys are concerned.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig, YarnConfig


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotary pair, float32 [qk_rope_head_dim / 2].

        f_i = theta^(-2i/d);   with YaRN   f_i' = f_i / factor * ramp_i + f_i * (1 - ramp_i)

    Differs from DeepSeek's code: YaRN applies whenever it is configured, not only to sequences
    beyond the original length (so does transformers).
    """
    dim = config.qk_rope_head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (np.float32(1.0) / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies
    ramp = _yarn_ramp(dim, config.rope_theta, yarn)
    return frequencies / np.float32(yarn.factor) * ramp + frequencies * (1 - ramp)


def _yarn_ramp(dim: int, theta: float, yarn: YarnConfig) -> np.ndarray:
    """0 for pairs that turn fast enough to stay as they are, 1 for those to be interpolated."""

    def pair_with(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    pairs = np.arange(dim // 2, dtype=np.float32)
    return np.clip((pairs - low) / width, 0, 1).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1: how much attention sharpens with the extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_amplitude(yarn: YarnConfig | None) -> float:
    """Factor on cos and sin: 1 where both mscales agree, as in every released model."""
    if yarn is None:
        return 1.0
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """(nope + rope)^-0.5, times m squared under YaRN (m from mscale_all_dim)."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rotary_table(
    config: ModelConfig, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """cos and sin of every position's angles, float32, R = qk_rope_head_dim / 2."""
    frequencies = jnp.asarray(rotary_frequencies(config))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    amplitude = rotary_amplitude(config.rope_scaling)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
    """Turn the pairs (x_2i, x_2i+1) of the last dimension; x is [B, S, R] or [B, S, H, R].

    The result has all first members, then all second ones. Queries and keys are reordered alike,
    so their products are those of the released models.
    """
    cos, sin = (t if x.ndim == 3 else t[:, :, None] for t in table)
    first, second = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
