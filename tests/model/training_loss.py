"""The loss that training takes, with its gradient and all that it counts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.model.transformer import Remat, Transformer
from dsjax.training.step import Sums, batch_loss, target_counts


def loss_and_gradient(
    model: Transformer, tokens: jax.Array, segments: jax.Array, remat: Remat
) -> tuple[tuple[jax.Array, Sums], Any]:
    """Next-token, MTP and balance loss with weights that let each be seen."""
    loss = partial(batch_loss, balance_weight=0.1, loss_chunk=16, remat=remat)
    counts = target_counts(segments[None], model.config.num_nextn_predict_layers)
    rows = jnp.float32(tokens.shape[0])

    def of_model(model: Transformer) -> tuple[jax.Array, Sums]:
        return loss(model, tokens, segments, counts, rows, jnp.float32(0.3))

    return jax.value_and_grad(of_model, has_aux=True)(model)


def largest_difference(found: Any, expected: Any) -> float:
    """Over all gradients, in units of the largest number among them."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    largest = max(float(abs(b).max()) for _, b in pairs)
    return max(float(abs(jax.device_get(a) - jax.device_get(b)).max()) for a, b in pairs) / largest
