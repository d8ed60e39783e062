"""Experts that tokens travel to equal those of one device: values, gradients, at any imbalance."""

import re
import sys
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from dsjax.kernels.experts import routed_experts
from dsjax.kernels.experts_parallel import KEPT, PARTS, routed_experts_over
from dsjax.kernels.rows_tpu import WHOLE
from dsjax.kernels.swiglu import SwiGLU
from sharding.expert_parallel import count_rounds
from sharding.mesh import make_mesh
from tests.sharding.ragged import emulate

TOKENS, EXPERTS, EMBED, WIDTH = 64, 16, 12, 8
BATCH = PartitionSpec(("data", "expert"))
WIDE, NARROW = PartitionSpec("expert", "tensor"), PartitionSpec("expert", None, "tensor")
WEIGHTS = SwiGLU(WIDE, WIDE, NARROW)


def inputs(choices, dtype=jnp.float32):
    """x, weights, gates and the gradient of y, of all devices together."""
    keys = iter(jax.random.split(jax.random.key(choices), 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    wide, narrow = (EXPERTS, WIDTH, EMBED), (EXPERTS, EMBED, WIDTH)
    weights = SwiGLU(normal(*wide), normal(*wide), normal(*narrow))
    gates = jax.random.uniform(next(keys), (TOKENS, choices))
    return normal(TOKENS, EMBED), weights, gates, normal(TOKENS, EMBED)


def routings(choices, devices):
    """Experts [T, K] by name, and how many rounds they take at least and at most."""
    rng = np.random.default_rng(0)
    local = EXPERTS // devices
    turns = np.arange(TOKENS * choices).reshape(TOKENS, choices) % EXPERTS
    turns = turns * local % EXPERTS + turns * local // EXPERTS  # device after device
    skewed = np.where(rng.random(turns.shape) < 0.8, EXPERTS - 1, turns)
    one_token = turns.copy()
    one_token[3] = local * (devices - 1) + np.arange(choices) % local
    several = 2 if devices > 1 else 1
    return {
        "balanced": (turns, 1, 1),
        "skewed": (skewed, several, devices),
        "all to one expert": (np.full_like(turns, 5), several, devices),
        "all to one device, at its experts in turns": (turns % local, several, devices),
        "empty experts": (turns // 2 * 2, 1, devices),
        "a device that owns no chosen expert": (rng.integers(local, EXPERTS, turns.shape), 1, 2),
        "a token with all its experts on one device": (one_token, 1, 2),
    }


def gradients(function, x, weights, experts, gates, dy):
    y, pull = jax.vjp(lambda x, w, g: function(x, w, experts, g), x, weights, gates)
    return y, *pull(dy)


@cache
def one_device(choices):
    return jax.jit(lambda *arguments: gradients(routed_experts, *arguments))


@cache
def over(devices, choices, dtype=jnp.float32, **others):
    """Compiled for a mesh: y, its gradients and the rounds it took on each device."""
    mesh = make_mesh({"data": "auto", "expert": devices, **others})

    def each(x, weights, experts, gates, dy):
        def function(*arguments):
            return routed_experts_over("expert", devices, *arguments)

        y, dx, d_weights, d_gates = gradients(function, x, weights, experts, gates, dy)
        if "tensor" in others:
            y, dx, d_gates = lax.psum((y, dx, d_gates), "tensor")
        if mesh.shape["data"] > 1:
            d_weights = lax.psum(d_weights, "data")
        rounds = count_rounds([experts // len(weights.gate)], devices)
        return y, dx, d_weights, d_gates, rounds

    takes = BATCH, WEIGHTS, BATCH, BATCH, BATCH
    gives = BATCH, BATCH, WEIGHTS, BATCH, BATCH
    x, weights, gates, dy = inputs(choices, dtype)
    experts = jnp.zeros(gates.shape, jnp.int32)
    step = jax.shard_map(each, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)
    return jax.jit(step).lower(x, weights, experts, gates, dy).compile()


def both(compiled, experts, dtype=jnp.float32):
    """(found, expected, rounds) of a routing."""
    choices = experts.shape[1]
    x, weights, gates, dy = inputs(choices, dtype)
    experts = jnp.asarray(experts, jnp.int32)
    *found, rounds = compiled(x, weights, experts, gates, dy)
    assert len(set(rounds.tolist())) == 1
    expected = one_device(choices)(x, weights, experts, gates, dy)
    return jax.tree.leaves(found), jax.tree.leaves(expected), int(rounds[0])


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


MESHES = [
    (8, 3, {}),  # fewer choices than devices
    (4, 6, {}),  # more; data 2: each half of the mesh exchanges by itself
    (2, 3, {"tensor": 2}),  # data 2, and a width split in halves
]


@pytest.mark.parametrize(("devices", "choices", "others"), MESHES)
def test_experts_over_devices_equal_those_of_one(devices, choices, others):
    compiled = over(devices, choices, **others)
    for name, (experts, at_least, at_most) in routings(choices, devices).items():
        found, expected, rounds = both(compiled, experts)
        assert_close(found, expected, 1e-5)
        assert at_least <= rounds <= at_most, name


def test_one_crowded_group_makes_the_others_wait_and_changes_nothing():
    """Groups of a mesh exchange apart, but take the same number of rounds."""
    balanced, _, _ = routings(6, 4)["balanced"]
    experts = np.where(np.arange(TOKENS)[:, None] < TOKENS // 2, 5, balanced)
    found, expected, rounds = both(over(4, 6), experts)
    assert_close(found, expected, 1e-5)
    assert rounds > 1


def test_a_token_that_is_not_finite_reaches_no_other():
    x, weights, gates, dy = inputs(6)
    experts = jnp.asarray(routings(6, 4)["balanced"][0], jnp.int32)
    clean = over(4, 6)(x, weights, experts, gates, dy)[0]
    y = over(4, 6)(x.at[7].set(jnp.nan), weights, experts, gates, dy)[0]
    assert jnp.isnan(y[7]).all()
    assert (jnp.delete(y, 7, axis=0) == jnp.delete(clean, 7, axis=0)).all()


def test_bfloat16_stays_close_and_keeps_its_dtype():
    experts, *_ = routings(6, 4)["skewed"]
    found, _, rounds = both(over(4, 6, jnp.bfloat16), experts, jnp.bfloat16)
    assert rounds > 1
    assert [a.dtype.name for a in found] == ["bfloat16"] * 5 + ["float32"]
    x, weights, gates, dy = jax.tree.map(lambda a: a.astype(jnp.float32), inputs(6, jnp.bfloat16))
    experts = jnp.asarray(experts, jnp.int32)
    assert_close(found, jax.tree.leaves(one_device(6)(x, weights, experts, gates, dy)), 0.03)


@pytest.mark.parametrize("chip", [pytest.param("tpu", marks=pytest.mark.slow), "default"])
def test_the_path_of_accelerators_is_exact_too(chip, monkeypatch):
    """Ragged exchanges, by an emulation of what they document; a TPU's kernels, or `ragged_dot`.

    The kernels are interpreted, and leave rows of no pair NaN. Rows are as long as theirs must be.
    """
    if chip == "tpu":
        monkeypatch.setattr(sys.modules[__name__], "EMBED", WHOLE)

    def choose(*arguments, default, **others):
        return others.get(chip, default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(lax, "ragged_all_to_all", emulate)
    compiled = over.__wrapped__(4, 6)
    monkeypatch.undo()
    if chip == "tpu":
        monkeypatch.setattr(sys.modules[__name__], "EMBED", WHOLE)
    for experts, *_ in routings(6, 4).values():
        found, expected, _ = both(compiled, experts)
        assert_close(found, expected, 1e-5)


def test_only_all_to_alls_and_a_few_numbers_travel():
    """A message, x and y; backward a message, x and dy, the gradients of x and of the gates.

    The numbers are rounds: of all tokens and of two parts of them, and of this test's own.
    """
    text = over(8, 3).as_text()
    kinds = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
    found = re.findall(rf"= (\S+|\(.*\)) ({kinds})\(", text)
    assert sum(kind == "all-to-all" for _, kind in found) == 3 + 5
    others = [each for each in found if each[1] != "all-to-all"]
    assert {kind for _, kind in others} == {"all-reduce"}
    assert set(re.findall(r"\w+\[.*?\]", str(others))) == {"s32[3]", "s32[1]"}


def lowered(function, platform):
    """A gradient as jax hands it to XLA for a platform, without compiling it."""
    mesh = make_mesh({"data": 2, "expert": 4})
    x, weights, gates, dy = inputs(6)
    experts = jnp.zeros(gates.shape, jnp.int32)
    takes = BATCH, WEIGHTS, BATCH, BATCH, BATCH

    def each(*arguments):
        return gradients(function, *arguments)

    gives = BATCH, BATCH, WEIGHTS, BATCH
    step = jax.shard_map(each, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)
    traced = jax.jit(step).trace(x, weights, experts, gates, dy)
    return traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


def collectives(text):
    counted = r"ragged_all_to_all\(|stablehlo.all_to_all|stablehlo.all_reduce|usual_turns_0/while\""
    return Counter(re.findall(counted, text))


def over_four(*arguments):
    return routed_experts_over("expert", 2, *arguments)


@pytest.mark.parametrize(("platform", "parts"), [("tpu", PARTS), ("cuda", 1)])
def test_accelerators_send_only_rows_that_exist(platform, parts):
    """All but messages and the gates' gradients are ragged; the first round is out of the loop."""
    found = collectives(lowered(over_four, platform))
    assert found["ragged_all_to_all("] == 2 * (2 * parts + 3)
    assert found['usual_turns_0/while"'] > 0, "further rounds are no rule"
    assert found["stablehlo.all_to_all"] == 2 * (parts + 2)


def test_plans_hear_how_many_rows_a_balanced_router_makes():
    """8 tokens a device have 48 pairs, and go to two of four devices each; forward in halves."""
    found = set(re.findall(r"usual_rows_(\d+)", lowered(over_four, "tpu")))
    assert found == {"8", "24", "16", "48"}


def test_recomputing_a_layer_sends_nothing_again():
    """The gradient needs only what came in: under `jax.checkpoint` the forward pass is not run."""
    again = jax.checkpoint(over_four, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    assert collectives(lowered(again, "cpu")) == collectives(lowered(over_four, "cpu"))
