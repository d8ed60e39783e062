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

from dsjax.config_files import load_run_config
from dsjax.model.layers import tree_shardings, variable_axes, variables
from dsjax.training.step import Batch, Knobs, init_state, make_train_step
from sharding.mesh import make_mesh
from sharding.rules import Layout, use_layout

# Sizes that differ from one another, so that a shape tells what it is of.
LENGTH, ROWS = 48, 8
CONFIG = load_run_config(
    "cpu-tiny",
    [
        f"data.sequence_length={LENGTH}",
        "model.num_hidden_layers=2",
        "model.vocab_size=192",
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


def weight_shapes(layout: Layout) -> tuple[Counter[tuple[int, ...]], ...]:
    """Shapes of one layer's weights: as used where gathered, as kept, and as used where not."""
    used: Counter[tuple[int, ...]] = Counter()
    kept: Counter[tuple[int, ...]] = Counter()
    whole: Counter[tuple[int, ...]] = Counter()
    model = jax.eval_shape(partial(init_state, CONFIG)).model
    for name, variable in variables(model):
        if name.endswith("router.bias"):
            continue
        axes = [axis for axis in variable_axes(variable) if axis != "layers"]
        shape = variable.shape[-len(axes) :]
        part = tuple(layout.sharding(tuple(axes), shape).shard_shape(shape))
        stays = [
            math.prod(layout.mesh.shape[a] for a in Layout(layout.mesh).split_axes(axis))
            for axis in axes
        ]
        computed = tuple(n // ways for n, ways in zip(shape, stays, strict=True))
        (used if computed != part else whole)[computed] += 1
        kept[part] += 1
    return used, kept, whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda sizes: "_".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_a_step_sends_what_it_is_meant_to_and_nothing_else(sizes: dict[str, int]) -> None:
    layout, sent = compiled_step(sizes)
    used, kept, whole = weight_shapes(layout)
    c = CONFIG.model
    places = ROWS // layout.ways("batch"), LENGTH // layout.ways("sequence")
    found = Counter(sent)
    listing = "\n".join(
        f"{n:4} {s.kind} {s.dtype}{list(s.shape)}" for s, n in sorted(found.items())
    )

    def of(kind: str) -> set[tuple[int, ...]]:
        return {s.shape for s in found if s.kind == kind and math.prod(s.shape) > 64}

    # Weights are gathered forward and once more backward, never more often, and nothing else is.
    assert of("all-gather") <= set(used), listing
    for shape, count in used.items():
        assert (
            sum(n for s, n in found.items() if s[0] == "all-gather" and s.shape == shape)
            <= 2 * count
        )
    # Their gradients are scattered: each part once.
    assert of("reduce-scatter") <= set(kept), listing
    assert sum(n for s, n in found.items() if s.kind == "reduce-scatter") >= used.total(), listing
    # Summed on all: weights that every device holds, replicas' parts over `data`, and over `tensor`
    # the activations of row-parallel products.
    summed = {shape[:0] + (1,) * n + shape for shape in whole for n in (0, 1)}
    if "data" in sizes:
        summed |= {(1,) * n + shape for shape in kept for n in (0, 1)}
    if "tensor" in sizes:
        summed |= {(*places, c.hidden_size), (places[0], 24)}
        summed |= {(1,) * n + shape for shape in kept for n in (0, 1)}
    assert of("all-reduce") <= summed, listing
    # Along the ring: latents, their gradients, and segments.
    travels = {(*places, width) for width in (c.kv_lora_rank, c.qk_rope_head_dim)} | {places}
    assert of("collective-permute") <= (travels if "context" in sizes else set()), listing
    assert bool(of("all-to-all")) == ("expert" in sizes), listing
    assert {s.kind for s in found} <= set(KINDS), listing
