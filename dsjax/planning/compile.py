"""A train step compiled for chips that are not there, by the compiler that would be used there.

The compiler of `jax[tpu]` needs no TPU. Which version of it reads a program matters: it is part of
what a plan says, and of the name under which its result is kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dsjax.checkpoint.store import abstract_on
from dsjax.config import PretrainConfig
from dsjax.errors import UserError, one_line
from dsjax.model.layers import tree_shardings
from dsjax.small_files import write_whole
from dsjax.training.step import Batch, Knobs, TrainState, init_state, make_train_step
from sharding.rules import Layout, use_layout

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that change what the compiler does."""

_NEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)")
"""How the compiler says what a program needs that does not fit, its arguments included."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
        text: the optimized program of one device; "" when it does not fit.
        hbm: bytes that a device needs, of what the program is given and of what it makes.
        refusal: what the compiler says when that is more than there is; else "".
        seconds: what compiling took.
    """

    text: str
    hbm: float
    refusal: str
    seconds: float


def versions() -> dict[str, str]:
    """Of the packages that decide what a program becomes.

    Raises:
        UserError: the compiler is not installed.
    """
    try:
        return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    except PackageNotFoundError as error:
        raise UserError(
            f"the package {error.name} is not installed, and with it the compiler for TPUs: "
            "pip install 'dsjax[plan]'"
        ) from None


def described_devices(topology: str) -> list[Any]:
    """The devices of a slice that is not there, such as v5p:8x8x8.

    Raises:
        UserError: the compiler knows no such slice.
    """
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        return list(described.devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {topology}: the compiler refuses it: {error}") from None


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


def compile_once(lowered: jax.stages.Lowered, folder: Path) -> Compiled:
    """Compile, or read what the same compiler made of the same program before.

    Kept in `folder` as DIGEST.json and, beside it, DIGEST.hlo.gz.
    """
    asked = [lowered.as_text(), versions(), {flag: os.environ.get(flag, "") for flag in FLAGS}]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    record, program = folder / f"{digest}.json", folder / f"{digest}.hlo.gz"
    if record.exists():
        text = gzip.decompress(program.read_bytes()).decode()
        return Compiled(text, **json.loads(record.read_text()))
    compiled = compile_now(lowered)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(program, gzip.compress(compiled.text.encode(), mtime=0))
    plain = {key: value for key, value in vars(compiled).items() if key != "text"}
    write_whole(record, json.dumps(plain).encode())
    return compiled


def compile_now(lowered: jax.stages.Lowered) -> Compiled:
    """Compile, whatever was compiled before."""
    begin = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        size = float(needed[1]) * 1024 ** " KMGT".index(needed[2] or " ")
        return Compiled("", size, one_line(error), time.monotonic() - begin)
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(compiled.as_text() or "", held, "", time.monotonic() - begin)
