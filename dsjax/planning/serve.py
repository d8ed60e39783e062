"""The engine's steps, ready to be compiled: a prompt that is read, rows that are continued."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import tensors
from dsjax.checkpoint.store import abstract_on
from dsjax.errors import UserError
from dsjax.inference.sampler_state import SamplerState
from dsjax.inference.settings import PAGE_SIZE, READ_AT_ONCE, EngineSettings
from dsjax.inference.step import StepInputs, step
from dsjax.model.decoder import make_pages, take_apart
from dsjax.model.fp8 import hold_in_fp8
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from dsjax.planning.job import Job
from dsjax.planning.memory import held_bytes, replicated
from dsjax.planning.useful import flops_per_token
from sharding.mesh import make_mesh
from sharding.rules import DECODE_RULES, Layout, use_layout


@dataclass(frozen=True)
class Serving:
    """Which step of the engine, and with how much room.

    Attributes:
        step: prefill, a part of a prompt in every group is read, or decode, every row is continued.
        rows: sequences that run at the same time.
        context: tokens of each, all of them in the cache.
        drafts: tokens that MTP drafts a step.
        dtype: of the weights, bfloat16 or fp8; fp8 is as released, computed with in bfloat16.
        mesh: sizes of mesh axes; None: all devices on `expert`.
    """

    step: str
    rows: int
    context: int
    drafts: int
    dtype: str
    mesh: dict[str, int] | None


def serving_job(config: ModelConfig, serving: Serving, devices: Sequence[Any]) -> Job:
    """A step of the engine over a mesh, as `dsjax.inference.runner` runs it.

    Raises:
        UserError: the mesh or the model does not divide over the devices; the engine has no such
            room; there is no MTP to draft.
    """
    EngineSettings(rows=serving.rows, context=serving.context, drafts=serving.drafts)
    if serving.drafts and not getattr(config, "num_nextn_predict_layers", 0):
        raise UserError(f"--drafts {serving.drafts}: the model has no MTP layer; expected 0")
    layout = Layout(make_mesh(serving.mesh or {"expert": len(devices)}, devices), DECODE_RULES)
    groups = layout.ways("batch")
    rows, width = math.ceil(serving.rows / groups), math.ceil(serving.context / PAGE_SIZE)
    model = _abstract_model(config, serving.dtype, layout)
    with use_layout(layout):
        decoder = _taken_apart(model)
        pages = _spread(layout, partial(
            make_pages, config, groups, rows * width, PAGE_SIZE, model.dtype,
            mtp=serving.drafts > 0,
        ))  # fmt: skip
        sampler = _spread(layout, partial(SamplerState.empty, groups * rows, config.vocab_size))
        reads = serving.step == "prefill"
        queries, batch = (READ_AT_ONCE, groups) if reads else (1 + serving.drafts, groups * rows)
        run = partial(step, samples=1 if reads else queries, drafts=serving.drafts)
        lowered = jax.jit(run, donate_argnums=(1, 2)).lower(
            decoder, pages, sampler, *_inputs(layout, batch, queries, width)
        )
    lasting = {"weights": held_bytes(decoder), "cache": held_bytes(pages),
               "sampler": held_bytes(sampler)}  # fmt: skip
    tokens = batch * (queries if reads else 1)
    length = serving.context if reads else 2 * serving.context
    return Job(
        lowered=lowered,
        layout=layout,
        lasting=lasting,
        passing={},
        whole=replicated(model),
        tokens=tokens,
        useful=flops_per_token(model, config, length) / 3,
        remedy=partial(_remedy, lasting),
        details={"step": serving.step, "rows": groups * rows, "context": serving.context,
                 "drafts": serving.drafts, "dtype": serving.dtype},
    )  # fmt: skip


def _abstract_model(config: ModelConfig, dtype: str, layout: Layout) -> Transformer:
    """A model as it is loaded, its weights placed."""
    model = jax.eval_shape(
        lambda key: Transformer(config, key, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16),
        jax.random.key(0),
    )
    if dtype == "fp8":
        hold_in_fp8(model, sorted({t.path for t in tensors(config) if t.path and t.scale}))
    return abstract_on(model, tree_shardings(model, layout))


def _taken_apart(model: Transformer) -> Any:
    """The decoder of a model, its weights where the compiler leaves them when it is made."""
    places = take_apart.lower(model).compile().output_shardings
    return abstract_on(jax.eval_shape(take_apart, model), places)


def _spread(layout: Layout, make: Any) -> Any:
    """What `make` would make, over the mesh by its first dimension."""

    def place(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = ("batch",) + (None,) * (len(array.shape) - 1)
        return jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=layout.sharding(axes, array.shape)
        )

    return jax.tree.map(place, jax.eval_shape(make))


def _inputs(layout: Layout, batch: int, queries: int, width: int) -> tuple[StepInputs, Any]:
    """What the host says of a step, and the size of the vocabulary."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=layout.sharding((None,) * len(shape), shape)
        )

    row, tokens = array(jnp.int32, batch), array(jnp.int32, batch, queries)
    flag = array(jnp.bool_)
    table, samples = array(jnp.int32, batch, width), array(jnp.bool_, batch)
    inputs = StepInputs(row, tokens, tokens, row, row, table, samples, row, flag, flag)
    return inputs, array(jnp.int32)


def _remedy(lasting: dict[str, float], capacity: float) -> str:
    if lasting["weights"] > 0.8 * capacity:
        return (
            f"the weights alone take {lasting['weights'] / 1e9:.1f} of {capacity / 1e9:.1f} GB: "
            "a larger slice would help, or --dtype fp8"
        )
    return "fewer --rows would help, or a shorter --context"
