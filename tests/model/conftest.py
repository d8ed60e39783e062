"""One jitted forward pass and one small model for the whole room: compiling is what takes time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.architecture import DeepSeekConfig
from dsjax.model.transformer import Transformer

ROWS, LENGTH = 2, 48


class Forward(NamedTuple):
    """All that a forward pass tells; the MTP parts have an entry for each depth."""

    hidden: Any
    logits: Any
    load: Any
    balance_loss: Any
    mtp_hidden: Any
    mtp_logits: Any
    mtp_load: Any
    mtp_balance_loss: Any


@jax.jit
def forward(
    model: Transformer, tokens: Any, positions: Any = None, segments: Any = None
) -> Forward:
    out = model(tokens, positions, segments)
    ahead = model.look_ahead(out)
    main = out.hidden, out.logits, out.load, out.balance_loss
    return Forward(*main, ahead.hidden, out.mtp_logits, ahead.load, ahead.balance_loss)


def off(found: Any, expected: Any) -> float:
    """Largest difference, in units of the largest expected number."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def random_tokens(config: DeepSeekConfig, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.fixture(scope="session")
def config() -> DeepSeekConfig:
    return CONFIGS["v3"]


@pytest.fixture(scope="session")
def model(config: DeepSeekConfig) -> Transformer:
    return place(config, random_weights(config))


@pytest.fixture(scope="session")
def tokens(config: DeepSeekConfig) -> jax.Array:
    return jnp.asarray(random_tokens(config, (ROWS, LENGTH)))
