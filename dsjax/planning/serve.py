"""The engine's steps, ready to be compiled: a prompt that is read, rows that are continued."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import tensors
from dsjax.checkpoint.store import abstract_on
from dsjax.config_serving import ServingConfig
from dsjax.errors import UserError
from dsjax.inference.runner import by_batch
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


def serving_job(config: ModelConfig, serving: ServingConfig, devices: Sequence[Any]) -> Job:
    """A step of the engine over a mesh, as `dsjax.inference.runner` runs it.

    Raises:
        UserError: the mesh or the model does not divide over the devices; the engine has no such
            room; there is no MTP to draft.
    """
    EngineSettings(rows=serving.rows, context=serving.context, drafts=serving.drafts)
    if serving.drafts and not getattr(config, "num_nextn_predict_layers", 0):
        raise UserError(f"--drafts {serving.drafts}: the model has no MTP layer; expected 0")
    layout = Layout(make_mesh(serving.mesh or {"expert": len(devices)}, devices), DECODE_RULES)
    model = _abstract_model(config, serving.dtype)
    decoder = jax.eval_shape(take_apart, model)
    if not serving.drafts:
        decoder = replace(decoder, mtp=None)
    decoder = abstract_on(decoder, tree_shardings(decoder, layout))
    with use_layout(layout):
        pages, sampler = _room(config, serving, layout)
        lowered = _lower(serving, layout, decoder, pages, sampler)
    lasting = {"weights": held_bytes(decoder), "cache": held_bytes(pages),
               "sampler": held_bytes(sampler)}  # fmt: skip
    reads = serving.step == "prefill"
    rows = layout.ways("batch") * math.ceil(serving.rows / layout.ways("batch"))
    return Job(
        lowered=lowered,
        layout=layout,
        lasting=lasting,
        passing={},
        whole=replicated(decoder),
        read=lasting["weights"] - held_bytes(decoder.embed) + lasting["cache"],
        tokens=layout.ways("batch") * READ_AT_ONCE if reads else rows,
        useful=flops_per_token(model, config, serving.context * (1 if reads else 2)) / 3,
        remedy=partial(_remedy, lasting),
        details={"step": serving.step, "rows": rows, "context": serving.context,
                 "drafts": serving.drafts, "dtype": serving.dtype},
    )  # fmt: skip


def _room(config: ModelConfig, serving: ServingConfig, layout: Layout) -> tuple[Any, Any]:
    """The cache and the sampler's state, for so many rows in every part of the batch."""
    groups, width = layout.ways("batch"), math.ceil(serving.context / PAGE_SIZE)
    rows = math.ceil(serving.rows / groups)
    dtype, drafts = jnp.bfloat16, serving.drafts > 0
    pages = partial(
        make_pages, config, groups, rows * width, PAGE_SIZE, dtype, mtp=drafts, backend="tpu"
    )
    sampler = partial(SamplerState.empty, groups * rows, config.vocab_size)
    shapes = jax.eval_shape(pages), jax.eval_shape(sampler)
    return abstract_on(shapes, by_batch(layout, shapes))


def _lower(
    serving: ServingConfig, layout: Layout, decoder: Any, pages: Any, sampler: Any
) -> jax.stages.Lowered:
    """The engine's step: a prompt's part in every group, or all rows by a token and its drafts."""
    reads, groups = serving.step == "prefill", layout.ways("batch")
    queries = READ_AT_ONCE if reads else 1 + serving.drafts
    batch = groups if reads else groups * math.ceil(serving.rows / groups)
    inputs = _inputs(layout, batch, queries, math.ceil(serving.context / PAGE_SIZE))
    run = partial(step, samples=1 if reads else queries, drafts=serving.drafts)
    return jax.jit(run, donate_argnums=(1, 2)).lower(decoder, pages, sampler, *inputs)


def _abstract_model(config: ModelConfig, dtype: str) -> Transformer:
    """A model as it is loaded."""
    model = jax.eval_shape(
        lambda key: Transformer(config, key, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16),
        jax.random.key(0),
    )
    if dtype == "fp8":
        hold_in_fp8(model, sorted({t.path for t in tensors(config) if t.path and t.scale}))
    return model


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
