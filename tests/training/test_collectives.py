"""What a step sends over the network: only what is meant to travel.

Read from the compiled step of a small model on eight devices. Every collective is listed with the
shape of what it makes; one that is none of those told here fails the test.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from dsjax.config_files import load_pretrain_config
from dsjax.model.layers import tree_shardings, variable_axes, variables
from dsjax.training.step import Batch, Knobs, init_state, make_train_step
from sharding.expert_parallel import Room
from sharding.mesh import make_mesh
from sharding.rules import Layout, use_layout

# Sizes that differ from one another, so that a shape tells what it is of.
LENGTH, ROWS = 48, 8
CONFIG = load_pretrain_config(
    "cpu-tiny",
    [
        f"data.sequence_length={LENGTH}",
        "model.num_hidden_layers=2",
        "model.vocab_size=160",
        "training.loss_chunk=24",
        "training.remat=keep_layer_inputs",
    ],
)

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)}|collective-broadcast|ragged-all-to-all)(-start)?\(")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Sent(NamedTuple):
    """One array that a collective makes on each device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


def compiled_step(sizes: dict[str, int]) -> tuple[Layout, list[Sent]]:
    layout = Layout(make_mesh(sizes))
    abstract = jax.eval_shape(partial(init_state, CONFIG))
    shape = (1, ROWS, LENGTH)
    with use_layout(layout):
        shardings = tree_shardings(abstract, layout)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        rows = jax.ShapeDtypeStruct(
            shape, jnp.int32, sharding=layout.sharding((None, "batch", None), shape)
        )
        step = jax.jit(make_train_step(CONFIG), out_shardings=(shardings, None))
        number = jax.ShapeDtypeStruct((), jnp.float32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        lowered = step.lower(state, Batch(rows, rows), count, Knobs(number, number, number))
        text = lowered.compile().as_text()
    return layout, [sent for line in text.splitlines() for sent in collectives_of(line)]


def collectives_of(line: str) -> list[Sent]:
    match = LINE.search(line)
    if match is None:
        return []
    arrays = ARRAY.findall(re.sub(r"\{[^}]*\}|/\*.*?\*/", "", match[1]))
    return [
        Sent(match[2], dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in arrays
    ]


class Meant(NamedTuple):
    """What may be made of weights: shapes, and how often at most."""

    gathered: Counter[tuple[int, ...]]
    scattered: Counter[tuple[int, ...]]
    summed: set[tuple[int, ...]]


def meant_of_weights(layout: Layout) -> Meant:
    """One layer's weights are gathered where they are used, and once more for the gradient."""
    meant = Meant(Counter(), Counter(), set())
    model = jax.eval_shape(partial(init_state, CONFIG)).model
    several = {axis for axis, size in layout.mesh.shape.items() if size > 1}
    for name, variable in variables(model):
        if name.endswith("router.bias"):
            continue
        axes = tuple(axis for axis in variable_axes(variable) if axis != "layers")
        shape = variable.shape[-len(axes) :]
        part = layout.sharding(axes, shape).shard_shape(shape)
        stays = (math.prod(layout.mesh.shape[a] for a in layout.split_axes(x)) for x in axes)
        whole = tuple(n // ways for n, ways in zip(shape, stays, strict=True))
        uses = 1 + CONFIG.model.num_nextn_predict_layers if name == "embed.weight" else 1
        if whole != part:
            meant.gathered[whole] += 2 * uses
            meant.scattered[part] += uses
        split = {axis for x in axes for axis in layout.rules[x]}
        if several - split:  # some devices hold the same part
            meant.summed.add((*variable.shape[: -len(axes)], *part))
    return meant


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda sizes: "_".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_a_step_sends_what_it_is_meant_to_and_nothing_else(sizes: dict[str, int]) -> None:
    layout, sent = compiled_step(sizes)
    found, meant, c = Counter(sent), meant_of_weights(layout), CONFIG.model
    listing = "\n".join(
        f"{n:4} {s.kind} {s.dtype}{list(s.shape)}" for s, n in sorted(found.items())
    )
    rows, places = ROWS // layout.ways("batch"), LENGTH // layout.ways("sequence")

    def of(kind: str) -> Counter[tuple[int, ...]]:
        """Shapes that a kind of collective makes; those of a few numbers are not of interest."""
        large = {s: n for s, n in found.items() if s.kind == kind and math.prod(s.shape) >= 64}
        return Counter({s.shape: n for s, n in large.items()})

    assert {s.kind for s in found} <= set(KINDS), listing
    assert of("all-gather") <= meant.gathered, listing
    assert of("reduce-scatter") == meant.scattered, listing
    # Where a contracted dimension is split, the devices along `tensor` add up activations.
    hidden = {(rows, places, c.hidden_size), (rows * places, c.hidden_size)}
    scores = {(rows, CONFIG.training.loss_chunk)}
    assert set(of("all-reduce")) <= meant.summed | (
        hidden | scores if "tensor" in sizes else set()
    ), listing
    # Round the ring go latents and their gradients. (Segments are a few numbers here.)
    latents = {(rows, places, width) for width in (c.kv_lora_rank, c.qk_rope_head_dim)}
    assert set(of("collective-permute")) == (latents if "context" in sizes else set()), listing
    # To the experts and back go windows of tokens, one for each device, and who they are for.
    exchanged = max((math.prod(shape) for shape in of("all-to-all")), default=0)
    devices = layout.mesh.shape["expert"]
    window = Room.of(rows * places, c.num_experts_per_tok, devices).rows * c.hidden_size
    assert exchanged == (window if devices > 1 else 0), listing
