"""Computing in bfloat16 stays close to float32, with everything delicate in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from reference.weights import place, random_weights

from dsjax.architecture import DeepSeekConfig
from dsjax.model.transformer import Transformer

from .conftest import forward


def test_bfloat16_stays_close_to_float32(
    config: DeepSeekConfig, model: Transformer, tokens: jax.Array
) -> None:
    exact = forward(model, tokens)
    found = forward(place(config, random_weights(config), jnp.bfloat16), tokens)
    assert found.hidden.dtype == jnp.bfloat16
    assert found.logits.dtype == found.load.dtype == jnp.float32
    for one, other in ((found.logits, exact.logits), (found.mtp_logits[0], exact.mtp_logits[0])):
        gap = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(other, axis=-1)
        # A few tokens go to another expert, where two scores nearly tie.
        assert np.median(gap) < 0.02
    assert abs(found.load - exact.load).sum() < 0.05 * exact.load.sum()
