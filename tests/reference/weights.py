"""Random weights that exercise a model, and the model that holds them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.checkpoint.families import (
    BIAS,
    EMBEDDING,
    NORM,
    ROUTER,
    ROUTER_BIAS,
    Tensor,
    tensors,
)
from dsjax.model.layers import variables
from dsjax.model.transformer import Transformer


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 under released names; nothing is left at a value that would hide an error.

    Norms 1 +- 0.2, router logits of spread 1, biases large enough that s + b < 0 happens, and
    matrices that keep the spread of what they multiply.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for tensor in tensors(config):
        if tensor.repeats:
            weights[tensor.name] = weights[tensor.repeats]
        else:
            value = rng.normal(size=tensor.shape)
            weights[tensor.name] = _spread(tensor, value).astype(np.float32)
    return weights


def drafting_weights(
    config: DeepSeekConfig, sharpness: float, seed: int = 0
) -> dict[str, np.ndarray]:
    """The same, of a model whose drafts are often right: MTP is the main model without its layers.

    Those say little beside the embedding; `sharpness` multiplies the logits.
    """
    weights = random_weights(config, seed)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.3
    mtp, size = f"model.layers.{config.num_hidden_layers}.", config.hidden_size
    weights[mtp + "eh_proj.weight"] = np.eye(size, 2 * size, dtype=np.float32)
    weights[mtp + "shared_head.norm.weight"] = weights["model.norm.weight"]
    weights["lm_head.weight"] *= sharpness
    return weights


def _spread(tensor: Tensor, value: np.ndarray) -> np.ndarray:
    if tensor.kind == NORM:
        return 1 + 0.2 * value
    if tensor.kind == ROUTER_BIAS:
        return 0.8 * value
    if tensor.kind == BIAS:
        return 0.3 * value
    if tensor.kind == EMBEDDING:
        return value
    # A normed input has spread 1: so do router logits, and everything else a little less.
    return value * tensor.shape[1] ** -0.5 * (1.0 if tensor.kind == ROUTER else 0.9)


def place(config: ModelConfig, weights: dict[str, np.ndarray], dtype: Any = None) -> Transformer:
    """A float32 model that holds these weights, computing in `dtype`."""
    abstract = jax.eval_shape(lambda key: Transformer(config, key, dtype=dtype), jax.random.key(0))
    held = {path: np.zeros(leaf.shape, np.float32) for path, leaf in variables(abstract)}
    for tensor in tensors(config):
        if not tensor.repeats:
            held[tensor.path][tensor.index] = weights[tensor.name].reshape(tensor.inner)
    leaves = [jnp.asarray(held[path]) for path, _ in variables(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
