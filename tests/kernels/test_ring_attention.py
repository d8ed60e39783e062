"""Attention over a sequence that is split across devices: what one computes, in less memory."""

import re
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax.kernels import ring_attention as module
from dsjax.kernels.attention import causal_attention, causal_attention_reference
from dsjax.kernels.attention_blocks import BLOCK
from dsjax.kernels.ring_attention import ring_attention
from sharding.context_parallel import all_places, local_places

pytestmark = pytest.mark.usefixtures("thorough_compiler")

AXIS = "context"
ROWS, HEADS, NOPE, ROPE, V, LATENT = 2, 2, 6, 4, 8, 5
SCALE = 0.3
EXACT = 1e-5
LONG = 65536
"""Places of a row whose arrays outweigh the blocks of scores. It is compiled for, not computed."""


def expand_latent(latent, weights):
    """MLA's keys and values: a part for each head, and a rotated one that all heads share."""
    c_kv, k_rope = latent
    k_nope, v = (jnp.einsum("bcr,hnr->bchn", c_kv, w) for w in weights)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v


def expand_group(key_value, weights):
    """Grouped-query attention's: one key and value for all heads."""
    return tuple(jnp.repeat(x, HEADS, axis=2) for x in key_value)


def mla(length, rows=ROWS, seed=0):
    """(q, what travels, weights, cotangent) of a whole sequence."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    shapes = (
        (rows, length, HEADS, NOPE + ROPE),
        ((rows, length, LATENT), (rows, length, ROPE)),
        ((HEADS, NOPE, LATENT), (HEADS, V, LATENT)),
        (rows, length, HEADS, V),
    )
    is_shape = lambda x: isinstance(x[0], int)  # noqa: E731
    return jax.tree.map(lambda s: jax.random.normal(next(keys), s), shapes, is_leaf=is_shape)


def documents(length, lengths):
    """Segments of rows, each row's documents of these lengths, the last one up to the end."""
    ids = np.zeros((len(lengths), length), np.int32)
    for row, sizes in enumerate(lengths):
        for start in np.cumsum(sizes):
            ids[row, start:] += 1
    return jnp.asarray(ids)


@partial(jax.jit, static_argnums=0)
def on_one_device(expand, q, travelling, weights, d_out, ids):
    def attend(q, travelling, weights):
        return causal_attention_reference(q, *expand(travelling, weights), ids, SCALE)

    out, back = jax.vjp(attend, q, travelling, weights)
    return out, back(d_out)


@cache
def on_many_devices(data, context, tensor, expand):
    """The same, with rows split over `data`, places over the ring, and heads over `tensor`."""
    names = ("data", AXIS, "tensor")
    mesh = jax.make_mesh((data, context, tensor), names, axis_types=(AxisType.Auto,) * 3)
    heads, latents, weights, rows = P("data", None, "tensor"), P("data"), P("tensor"), P("data")

    def on_a_device(q, travelling, weights, d_out, ids):
        q, travelling, d_out, ids = jax.tree.map(
            lambda x: local_places(x, AXIS), (q, travelling, d_out, ids)
        )

        def attend(q, travelling, weights):
            return ring_attention(AXIS, q, travelling, ids, weights, expand, SCALE)

        out, back = jax.vjp(attend, q, travelling, weights)
        d_q, d_travelling, d_weights = back(d_out)
        whole = partial(all_places, axis=AXIS)
        # Devices with other heads have their own part of the latent's gradient.
        d_travelling = jax.tree.map(whole, lax.psum(d_travelling, "tensor"))
        return whole(out), (whole(d_q), d_travelling, lax.psum(d_weights, ("data", AXIS)))

    return jax.jit(
        jax.shard_map(
            on_a_device,
            mesh=mesh,
            in_specs=(heads, latents, weights, heads, rows),
            out_specs=(heads, (heads, latents, weights)),
            check_vma=False,
        )
    )


def assert_same(got, want):
    """Each array within `EXACT` of its largest entry."""
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(mine - theirs).max() < EXACT * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("data", "context", "tensor", "chunk"),
    [(1, 2, 1, 130), (1, 8, 1, 40), (2, 4, 1, 12), (1, 2, 2, 4)],
)
def test_a_ring_equals_one_device_in_values_and_gradients(data, context, tensor, chunk):
    """Latents, weights and queries; chunks shorter and longer than a block."""
    length = 2 * context * chunk
    inputs = mla(length)
    for lengths in (
        [[], []],  # a document over the whole row
        [[chunk + chunk // 2, 2 * chunk], [1] * (length - 1)],  # longer than a chunk; of one token
        [[chunk // 2] * (length // chunk), [chunk, chunk]],  # shorter; ending where a chunk does
    ):
        ids = documents(length, lengths)
        got = on_many_devices(data, context, tensor, expand_latent)(*inputs, ids)
        assert_same(got, on_one_device(expand_latent, *inputs, ids))


def test_what_arrives_may_be_expanded_in_pieces(monkeypatch):
    """As it is where a chunk is long: here three pieces of a block each."""
    monkeypatch.setattr(module, "AT_ONCE", BLOCK)
    length = 2 * 2 * 3 * BLOCK
    inputs = *mla(length), documents(length, [[300, 500], [800]])
    in_pieces = on_many_devices.__wrapped__(1, 2, 1, expand_latent)
    assert_same(in_pieces(*inputs), on_one_device(expand_latent, *inputs))
    program = str(in_pieces.trace(*inputs).jaxpr)
    expanded = [f"f32[{ROWS},{blocks * BLOCK},{HEADS},{NOPE}]" for blocks in (1, 3)]
    assert [keys in program for keys in expanded] == [True, False]


def test_a_ring_of_keys_and_values_equals_one_device():
    """What grouped-query attention sends; there is nothing to expand with."""
    length = 2 * 4 * 12
    q, _, _, d_out = mla(length)
    keys = jax.random.split(jax.random.key(1), 2)
    widths = NOPE + ROPE, V
    travelling = tuple(
        jax.random.normal(k, (ROWS, length, 1, w)) for k, w in zip(keys, widths, strict=True)
    )
    inputs = q, travelling, (), d_out, documents(length, [[30], [5, 50]])
    got = on_many_devices(1, 4, 1, expand_group)(*inputs)
    assert_same(got, on_one_device(expand_group, *inputs))


def test_bfloat16_stays_near_float32():
    length = 2 * 4 * 12
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mla(length))
    ids = documents(length, [[30], [5, 50]])
    ring = on_many_devices(2, 4, 1, expand_latent)
    got = ring(*half, ids)
    want = ring(*jax.tree.map(lambda x: x.astype(jnp.float32), half), ids)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert np.abs(mine.astype(jnp.float32) - theirs).max() < 0.02 * np.abs(theirs).max()


# ---------------------------------------------------------------------------------------------
# What is compiled
# ---------------------------------------------------------------------------------------------


@cache
def compiled(devices, length):
    """Values and gradients, of arrays that are split already; one device goes in no ring."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    split = P(None, AXIS)

    def on_a_device(q, travelling, weights, d_out, ids):
        def attend(q, travelling, weights):
            if devices == 1:
                return causal_attention(q, *expand_latent(travelling, weights), ids, SCALE)
            return ring_attention(AXIS, q, travelling, ids, weights, expand_latent, SCALE)

        out, back = jax.vjp(attend, q, travelling, weights)
        d_q, d_travelling, d_weights = back(d_out)
        # Stacked, not summed: no collective but the ring's own.
        return out, d_q, d_travelling, jax.tree.map(lambda x: x[None], d_weights)

    step = jax.shard_map(
        on_a_device,
        mesh=mesh,
        in_specs=(split, split, P(), split, split),
        out_specs=(split, split, split, P(AXIS)),
        check_vma=False,
    )
    shapes = jax.eval_shape(lambda: (*mla(length, rows=1), documents(length, [[]])))
    return jax.jit(step).lower(*shapes).compile()


def memory(devices, length):
    """What a device needs beside arguments and results, bytes."""
    return compiled(devices, length).memory_analysis().temp_size_in_bytes


def test_memory_falls_as_one_over_devices():
    alone, two, four = (memory(devices, LONG) for devices in (1, 2, 4))
    assert two < 1.1 * alone / 2
    assert four < 1.1 * alone / 4
    assert four < 0.6 * two


def test_four_devices_hold_four_times_the_length_of_one():
    assert memory(4, LONG) < 1.2 * memory(1, LONG // 4)


def test_a_policy_that_keeps_products_keeps_nothing_that_was_expanded():
    kept = []

    def on_a_device(q, travelling, weights, d_out, ids):
        @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        def attend(q, travelling, weights):
            return ring_attention(AXIS, q, travelling, ids, weights, expand_latent, SCALE)

        out, back = jax.vjp(attend, q, travelling, weights)
        kept.extend(x.shape for x in jax.tree.leaves(back))
        return out

    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,))
    length = 2 * 2 * 12
    inputs = jax.eval_shape(lambda: (*mla(length), documents(length, [[], []])))
    jax.eval_shape(
        jax.shard_map(on_a_device, mesh=mesh, in_specs=P(), out_specs=P(AXIS), check_vma=False),
        *inputs,
    )
    assert (ROWS, length, LATENT) in kept
    assert set(kept) <= {x.shape for x in jax.tree.leaves(inputs)}


def test_only_neighbours_exchange_only_what_travels():
    """Forward c_kv, k_rope and segments; back the same with two gradients, which come home."""
    text = compiled(4, LONG).as_text()
    kinds = (
        "all-gather|all-reduce|all-to-all|reduce-scatter|collective-broadcast|collective-permute"
    )
    found = Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))
    assert found == {"collective-permute": 3 + 5 + 2}
