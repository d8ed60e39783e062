"""A sequence over four devices: what one device computes, in a quarter of its memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import PretrainConfig
from dsjax.config_files import load_pretrain_config
from dsjax.model.layers import tree_shardings, variables
from dsjax.training.step import Batch, init_state, make_gradients
from sharding.mesh import make_mesh
from sharding.rules import Layout, use_layout

LENGTH = 1024


def run_config(length: int) -> PretrainConfig:
    return load_pretrain_config(
        "cpu-tiny",
        [
            f"data.sequence_length={length}",
            f"model.max_position_embeddings={length}",
            "model.num_hidden_layers=2",
            "model.vocab_size=64",
            "training.loss_chunk=64",
            "training.balance_loss_weight=0.1",
            "training.remat=keep_layer_inputs",
        ],
    )


CONFIG = run_config(LENGTH)


def packed_row() -> Batch:
    """Documents shorter than a chunk of 128 places, one that is longer than two, and padding."""
    rng = np.random.default_rng(0)
    ends = [40, 100, 460, 500, 700, 990]
    segments = np.searchsorted(ends, np.arange(LENGTH), side="right") + 1
    segments[990:] = 0
    tokens = rng.integers(0, 64, (1, 1, LENGTH), np.int32)
    return Batch(jnp.asarray(tokens), jnp.asarray(segments.astype(np.int32)[None, None]))


def compile_gradients(devices: int, length: int = LENGTH) -> tuple[Any, Layout]:
    layout = Layout(make_mesh({"context": devices}, jax.devices()[:devices]))
    config = run_config(length)
    model = jax.eval_shape(partial(init_state, config)).model
    batch = Batch(*2 * [jax.ShapeDtypeStruct((1, 1, length), jnp.int32)])
    scalars = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    with use_layout(layout):
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            model,
            tree_shardings(model, layout),
        )
        return jax.jit(make_gradients(config)).lower(placed, batch, *scalars).compile(), layout


@pytest.mark.slow
def test_four_devices_compute_what_one_does_of_a_long_row() -> None:
    """Packed documents and MTP included: each device's share is an eighth of the row, twice."""
    model = jax.jit(partial(init_state, CONFIG))().model
    results = []
    for devices in (1, 4):
        run, layout = compile_gradients(devices)
        placed = jax.device_put(model, tree_shardings(model, layout))
        everywhere = jax.device_put(packed_row(), layout.sharding((None,) * 3, (1, 1, LENGTH)))
        results.append(run(placed, everywhere, jnp.int32(1), jnp.float32(0.3)))
    (gradients, sums), (expected, expected_sums) = results[1], results[0]
    np.testing.assert_array_equal(sums.load, expected_sums.load)
    np.testing.assert_allclose(sums.loss, expected_sums.loss, rtol=1e-5)
    for (name, one), (_, other) in zip(variables(gradients), variables(expected), strict=True):
        want = np.asarray(other[...])
        assert np.abs(np.asarray(one[...]) - want).max() <= 1e-5 * np.abs(want).max(), name


def growth(devices: int) -> float:
    """Bytes of temporaries on each device for every place that a row becomes longer."""
    sizes = [
        compile_gradients(devices, length)[0].memory_analysis().temp_size_in_bytes
        for length in (2 * LENGTH, 4 * LENGTH)
    ]
    return (sizes[1] - sizes[0]) / (2 * LENGTH)


@pytest.mark.slow
def test_the_memory_of_a_row_falls_as_one_over_devices() -> None:
    """From two to four; against one device the buffers of what travels are added."""
    one, two, four = (growth(devices) for devices in (1, 2, 4))
    print(f"\ntemporaries of a place: {one:,.0f} bytes, {two:,.0f} on two, {four:,.0f} on four")
    assert four < 0.52 * two
    assert four < one / 3
