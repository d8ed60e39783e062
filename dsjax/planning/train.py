"""The train step of a run, ready to be compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.checkpoint.store import abstract_on
from dsjax.config import PretrainConfig
from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings
from dsjax.planning.job import Job
from dsjax.planning.memory import replicated, state_bytes
from dsjax.planning.useful import flops_per_token
from dsjax.training.run import make_layout
from dsjax.training.step import Batch, Knobs, TrainState, init_state, make_train_step
from sharding.rules import Layout, use_layout


def train_job(config: PretrainConfig, devices: Sequence[Any]) -> Job:
    """The step of the largest batch that a run has.

    Raises:
        UserError: the mesh or a microbatch does not divide over the devices.
    """
    layout = make_layout(config, devices)
    state = abstract_state(config, layout)
    held = state_bytes(state)
    gradients = held.pop("gradients")
    slots, rows = microbatches(config)
    length = config.data.sequence_length
    return Job(
        lowered=lower_step(config, layout, state),
        layout=layout,
        lasting=held,
        passing={"gradients": gradients},
        whole=replicated(state.model),
        tokens=slots * rows * length,
        useful=flops_per_token(state.model, config.model, length),
        remedy=partial(remedy, config, layout, sum(held.values()) + gradients),
        details={"step": "train", "run_tokens": config.training.tokens},
    )


def abstract_state(config: PretrainConfig, layout: Layout) -> TrainState:
    """The state of a run as shapes, dtypes and places; nothing is made."""
    abstract = jax.eval_shape(partial(init_state, config))
    return abstract_on(abstract, tree_shardings(abstract, layout))


def lower_step(config: PretrainConfig, layout: Layout, state: TrainState) -> jax.stages.Lowered:
    """The train step of the largest batch that a run has; its microbatches are all full.

    A run passes their number as an argument, so that a batch can grow; here it is a constant, and
    the loop over them says how long it is.

    Raises:
        UserError: a microbatch does not divide over the mesh.
    """
    slots, rows = microbatches(config)
    shape = slots, rows, config.data.sequence_length
    try:
        spread = layout.sharding((None, "batch", None), shape)
    except UserError as error:
        raise UserError(f"training.microbatch_size={rows}: {error}") from None
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.sharding((), ()))
    step = make_train_step(config)

    def full(state: TrainState, batch: Batch, knobs: Knobs) -> Any:
        return step(state, batch, jnp.int32(slots), knobs)

    with use_layout(layout):
        return jax.jit(full, donate_argnums=0).lower(
            state, Batch(tokens, tokens), Knobs(number, number, number)
        )


def microbatches(config: PretrainConfig) -> tuple[int, int]:
    """How many microbatches the largest batch of a run has, and the rows of each."""
    training = config.training
    largest = int(max(stage.value for stage in training.batch_size))
    return largest // training.microbatch_size, training.microbatch_size


def remedy(config: PretrainConfig, layout: Layout, state: float, capacity: float) -> str:
    """The setting that helps most when a step does not fit.

    Args:
        state: bytes of weights, moments and gradients on a device.
        capacity: bytes that a device has.
    """
    if state > 0.8 * capacity:
        return (
            f"weights, moments and gradients alone take {state / 1e9:.1f} of {capacity / 1e9:.1f} "
            "GB: a larger slice, split over mesh.fsdp or mesh.expert"
        )
    training, least = config.training, layout.ways("batch")
    if training.microbatch_size > least:
        return f"a smaller training.microbatch_size would help; the least is {least}"
    if not training.remat.startswith("keep_layer_inputs"):
        return "training.remat=keep_layer_inputs would help: layers are computed again"
    if training.remat != "keep_layer_inputs_on_host":
        return "training.remat=keep_layer_inputs_on_host would help"
    return "a larger slice would help, or mesh.context, or mesh.tensor"
