"""What a device holds of a run's state, by kind, before anything is compiled."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from dsjax.model.layers import variables
from dsjax.training.step import TrainState


def state_bytes(state: TrainState) -> dict[str, float]:
    """Bytes on each device, of a state whose arrays know their places: weights and moments.

    Gradients are as large as the weights that they are of, in float32; they come and go with every
    step, and are part of what the compiler calls temporary.
    """
    _, trained, _ = nnx.split(state.model, nnx.Param, ...)
    return {
        "weights": _held(state.model),
        "moments": _held(state.moments),
        "gradients": sum(4 * math.prod(shape) for shape, _ in _parts(trained)),
    }


def replicated(state: TrainState, least: float) -> list[tuple[str, float]]:
    """Weights of at least so many bytes that every device holds whole: name and bytes."""
    found = []
    for name, variable in variables(state.model):
        [array] = jax.tree.leaves(variable)
        size = math.prod(array.shape) * array.dtype.itemsize
        if size >= least and array.sharding.is_fully_replicated:
            found.append((name, size))
    return found


def _held(tree: Any) -> float:
    return sum(math.prod(shape) * itemsize for shape, itemsize in _parts(tree))


def _parts(tree: Any) -> list[tuple[tuple[int, ...], int]]:
    """Shape on one device, and bytes of a number, of every array."""
    return [
        (leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    ]
