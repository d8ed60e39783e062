"""The step's gradients on a mesh, sharded by hand: those of one device, whatever the axes.

Everything is on at once: microbatches, packed documents with padding, MTP, groups, a bias that
steers, the balance loss. Along `expert` tokens travel to their experts; without it, weights of
experts are gathered like all others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import PretrainConfig
from dsjax.config_files import load_pretrain_config
from dsjax.model.layers import RouterBias, tree_shardings, variables
from dsjax.model.transformer import Transformer
from dsjax.training.evaluate import score_rows
from dsjax.training.step import Batch, Sums, init_state, make_gradients
from sharding.mesh import make_mesh
from sharding.rules import PREFILL_RULES, TRAIN_RULES, Layout, Rules, use_layout

LENGTH, ROWS, MICROBATCHES = 32, 8, 2
SETTINGS = [
    f"data.sequence_length={LENGTH}",
    "model.num_hidden_layers=2",
    "model.vocab_size=64",
    "training.loss_chunk=8",
    "training.balance_loss_weight=0.1",
]
CONFIG = load_pretrain_config("cpu-tiny", SETTINGS)
DENSE = load_pretrain_config("cpu-tiny", ["model=cpu-tiny-qwen3", *SETTINGS])
EXACT = 1e-5

AXES = ("data", "fsdp", "expert", "context", "tensor")
TRIPLES = [
    ("data", "fsdp", "expert"),
    ("data", "context", "tensor"),
    ("fsdp", "context", "tensor"),
    ("expert", "context", "tensor"),
]
MESHES: list[tuple[dict[str, int], Rules]] = [
    *(({axis: 4 if axis in ("context", "tensor") else 8}, {}) for axis in AXES),
    # Any two of them together, in as few meshes as that takes.
    *((dict.fromkeys(axes, 2), {}) for axes in TRIPLES),
    # Experts' weights travel, split by expert.
    ({"data": 2, "fsdp": 4}, {"expert": ("fsdp",), "expert_embed": (), "expert_mlp_rows": ()}),
]

ALWAYS = (dict.fromkeys(TRIPLES[0], 2), {})
"""The mesh that a short run of the tests has."""


def name_of(case: Any) -> str:
    return "_".join(f"{name}{size}" for name, size in case[0].items()) + "_by_expert" * bool(
        case[1]
    )


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    shape = (MICROBATCHES, ROWS, LENGTH)
    segments = np.sort(rng.integers(1, 4, shape, np.int32), axis=-1)
    segments[1, 3, 20:] = 0
    return Batch(jnp.asarray(rng.integers(0, 64, shape, np.int32)), jnp.asarray(segments))


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights large enough to tell experts apart, and biases that steer."""
    made = jax.jit(partial(init_state, CONFIG))().model
    graph, biases, rest = nnx.split(made, RouterBias, ...)
    louder = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, rest)
    steering = jax.tree.map(lambda b: jax.random.normal(jax.random.key(1), b.shape) * 0.05, biases)
    return nnx.merge(graph, steering, louder)


class Run:
    """Gradients under one layout, compiled once."""

    def __init__(self, layout: Layout | None, config: PretrainConfig = CONFIG) -> None:
        self.layout = layout
        self.gradients = jax.jit(make_gradients(config))

    def __call__(self, model: Transformer) -> tuple[Any, Sums]:
        batch, arguments = make_batch(), (jnp.int32(MICROBATCHES), jnp.float32(0.3))
        if self.layout is None:
            return self.gradients(model, batch, *arguments)
        rows = self.layout.sharding((None, "batch", None), batch.tokens.shape)
        with use_layout(self.layout):
            placed = jax.device_put(model, tree_shardings(model, self.layout))
            return self.gradients(placed, jax.device_put(batch, rows), *arguments)


@pytest.fixture(scope="module")
def alone() -> Run:
    return Run(None)


def layout_of(sizes: dict[str, int], rules: Rules) -> Layout:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Layout(make_mesh(sizes, devices), {**TRAIN_RULES, **rules})


def assert_equal(found: tuple[Any, Sums], expected: tuple[Any, Sums]) -> None:
    np.testing.assert_array_equal(found[1].load, expected[1].load)
    for name, one, other in zip(Sums._fields, found[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=EXACT, err_msg=name)
    for (name, one), (_, other) in zip(variables(found[0]), variables(expected[0]), strict=True):
        want = np.asarray(other[...])
        largest = np.abs(want).max()
        assert largest > 0 or name.startswith("moe_layers.ffn.experts") or "mtp" in name, name
        assert np.abs(np.asarray(one[...]) - want).max() <= EXACT * max(largest, 1e-30), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(mesh, id=name_of(mesh), marks=[] if mesh == ALWAYS else [pytest.mark.slow])
        for mesh in MESHES
    ],
)
def test_a_mesh_computes_what_one_device_does(case: Any, model: Transformer, alone: Run) -> None:
    layout = layout_of(*case)
    found = Run(layout)(model)
    assert_equal(found, alone(model))
    places = variables(tree_shardings(found[0], layout))
    for (name, gradient), (_, place) in zip(variables(found[0]), places, strict=True):
        array = gradient[...]
        assert array.sharding.is_equivalent_to(place.get_value(), array.ndim), name


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"expert": 4}, {"fsdp": 4}], ids=lambda s: next(iter(s)))
def test_no_routing_is_too_uneven(sizes: dict[str, int], model: Transformer, alone: Run) -> None:
    """All tokens to one expert and another; to the experts of one device; to every second one."""
    run = Run(layout_of(sizes, {}))
    for favoured in ([0, 7], [2, 3], [0, 2, 4, 6]):
        bias = np.full(8, -10.0, np.float32)
        bias[favoured] = 10
        graph, biases, rest = nnx.split(model, RouterBias, ...)
        steering = jax.tree.map(lambda b, bias=bias: jnp.broadcast_to(bias, b.shape), biases)
        steered = nnx.merge(graph, steering, rest)
        found, expected = run(steered), alone(steered)
        idle = np.delete(np.asarray(expected[1].load), favoured, axis=1)
        assert not idle.any()
        assert_equal(found, expected)


@pytest.mark.slow
def test_a_dense_family_is_computed_on_a_mesh_as_on_one_device() -> None:
    """Few heads of keys, which every device has, and queries that are split; in a ring."""
    model = jax.jit(partial(init_state, DENSE))().model
    layout = layout_of({"fsdp": 2, "context": 2, "tensor": 2}, {})
    assert_equal(Run(layout, DENSE)(model), Run(None, DENSE)(model))


@pytest.mark.slow
def test_a_mesh_scores_held_out_rows_as_one_device_does(model: Transformer) -> None:
    """A forward pass alone: places of a sequence and the vocabulary on different devices."""
    batch = make_batch()
    tokens, segments = batch.tokens[0], batch.segment_ids[0]
    scored = jnp.asarray(np.random.default_rng(1).random(tokens.shape) < 0.7)
    expected = jax.jit(partial(score_rows, chunk=8))(model, tokens, segments, scored)
    layout = layout_of({"fsdp": 2, "context": 2, "tensor": 2}, PREFILL_RULES)
    with use_layout(layout):
        placed = jax.device_put(model, tree_shardings(model, layout))
        found = jax.jit(partial(score_rows, chunk=8))(placed, tokens, segments, scored)
    assert int(expected.accepted) > 0
    np.testing.assert_allclose(found.nats, expected.nats, rtol=EXACT)
    for name in ("tokens", "accepted", "drafted", "load"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
