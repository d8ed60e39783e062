"""What a device holds of arrays that are only described, by their shapes and places."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from dsjax.model.layers import variables
from dsjax.training.step import TrainState


def state_bytes(state: TrainState) -> dict[str, float]:
    """Bytes on each device of a training state: weights, moments, and gradients to be.

    Gradients are as large as the weights that they are of, in float32; they come and go with every
    step, and are part of what the compiler calls temporary.
    """
    _, trained, _ = nnx.split(state.model, nnx.Param, ...)
    return {
        "weights": held_bytes(state.model),
        "moments": held_bytes(state.moments),
        "gradients": sum(4 * _held(leaf) for leaf in jax.tree.leaves(trained)),
    }


def held_bytes(tree: Any) -> float:
    """Bytes on each device of arrays that know their places."""
    return sum(_held(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def replicated(model: Any) -> list[tuple[str, float]]:
    """Weights that every device holds whole: name and bytes."""
    return [
        (name, leaf.size * leaf.dtype.itemsize)
        for name, variable in variables(model)
        for leaf in jax.tree.leaves(variable)
        if leaf.sharding.is_fully_replicated
    ]


def _held(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
