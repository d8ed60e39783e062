"""Every pair travels once, no token twice to one device, within the room that is stated."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from sharding.expert_parallel import SLACK, Room, exchange, plan_journey, traffic
from sharding.mesh import make_mesh
from tests.sharding.ragged import emulate

DEVICES = 4


@partial(jax.jit, static_argnums=1)
def travel(destinations, devices):
    """Every round's window, the rounds that are needed, and what comes back for each token.

    Owners return a row that is the number of its pairs and its token's name, once for each.
    """
    journey = plan_journey(destinations, devices)

    def one_round(index):
        window = journey.pack(index)
        pairs = window.pairs_of_row
        back = jnp.stack([pairs, window.token_of_row * pairs], axis=-1).astype(jnp.float32)
        names = jnp.where(window.real, window.pair, -1).astype(jnp.float32)
        at, rows = journey.rows_of(index), back.reshape(-1, 2)
        assert at.shape == (len(destinations), min(destinations.shape[1], devices))
        home = rows.at[at].get(mode="fill", fill_value=0).sum(1)
        return window, home, journey.pick_pairs(index, names)

    windows, sums, picked = jax.vmap(one_round)(jnp.arange(journey.room.windows))
    return windows, journey.window.max() + 1, sums.sum(0), picked.sum(0)


def routings(tokens, choices, devices):
    """Destinations [T, K] by name."""
    rng = np.random.default_rng(0)
    turns = np.arange(tokens * choices).reshape(tokens, choices) % devices
    return {
        "in turns": turns,
        "at random": rng.integers(0, devices, (tokens, choices)),
        "mostly to one": np.where(rng.random((tokens, choices)) < 0.8, 1, turns),
        "all to one": np.full((tokens, choices), devices - 1),
        "never to one": rng.integers(1, devices, (tokens, choices)),
    }


SHAPES = [(24, 3, 4), (10, 6, 2), (1, 2, 4), (16, 2, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_pair_travels_once_and_no_token_twice_to_a_device(shape):
    tokens, choices, devices = shape
    room = Room.of(*shape)
    assert devices * room.rows <= SLACK * tokens * choices + devices
    assert devices * room.pairs <= SLACK * tokens * choices + devices * (choices + 7)
    for destinations in routings(*shape).values():
        windows, rounds, sums, picked = jax.device_get(travel(destinations, devices))
        crossings, seen = set(), []
        for index in range(room.windows):
            for device in range(devices):
                rows = windows.rows[index, device]
                names = windows.token_of_row[index, device, :rows].tolist()
                pairs = windows.pairs_of_row[index, device]
                real = windows.real[index, device]
                pair = windows.pair[index, device][real]
                assert (destinations.ravel()[pair] == device).all()
                assert crossings.isdisjoint((name, device) for name in names)
                crossings |= {(name, device) for name in names}
                # Pairs lie row by row, as many as each row says, rows with many first.
                assert (pairs[rows:] == 0).all() and (np.diff(pairs[:rows]) <= 0).all()
                assert pair.size == pairs.sum() and real[: pair.size].all()
                at = windows.row_of_pair[index, device][real]
                assert at.tolist() == np.repeat(np.arange(rows), pairs[:rows]).tolist()
                assert (windows.token_of_row[index, device][at] == pair // choices).all()
                seen += pair.tolist()
                assert pair.size == 0 or index < rounds
        assert sorted(seen) == list(range(tokens * choices))
        # What comes back: each token's K pairs, under its name, and each pair's own value.
        assert (sums == np.stack([np.full(tokens, choices), choices * np.arange(tokens)], 1)).all()
        assert (picked.ravel() == np.arange(tokens * choices)).all()


def test_even_loads_take_one_round_and_one_device_for_all_takes_few():
    tokens, choices, devices = 24, 3, 4
    took = {
        name: int(travel(destinations, devices)[1])
        for name, destinations in routings(tokens, choices, devices).items()
    }
    assert took["in turns"] == took["at random"] == 1
    assert took["all to one"] == math.ceil(devices / SLACK)


def exchanged(rows, sent, received):
    """`exchange` over the expert axis of data 2 x expert 4, every device with arrays of its own."""
    mesh = make_mesh({"data": 2, "expert": DEVICES})
    spec = PartitionSpec(("data", "expert"))

    def each(rows, sent, received):
        return exchange("expert", rows[0], sent[0], received[0], jnp.zeros_like)[None]

    return jax.jit(jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
        rows, sent, received
    )


def windows_to_exchange():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, DEVICES, 5, 3)).astype(np.float32)
    sent = rng.integers(0, 6, (2, DEVICES, DEVICES))  # group, source, destination
    sent[0, 1], sent[1, :, 2] = 0, 5
    both = sent, sent.swapaxes(1, 2)
    expected = rows.reshape(2, DEVICES, DEVICES, 5, 3).swapaxes(1, 2).reshape(rows.shape)
    sent, received = (a.reshape(8, DEVICES).astype(np.int32) for a in both)
    exists = np.arange(5)[None, None] < received[:, :, None]
    return rows, sent, received, expected, exists


def test_windows_arrive_and_ragged_ones_are_the_same_where_there_are_rows(monkeypatch):
    rows, sent, received, expected, exists = windows_to_exchange()
    assert (np.asarray(exchanged(rows, sent, received))[exists] == expected[exists]).all()
    monkeypatch.setattr(lax, "platform_dependent", lambda *xs, cpu, default: default(*xs))
    monkeypatch.setattr(lax, "ragged_all_to_all", emulate)
    ragged = np.asarray(exchanged(rows, sent, received))
    assert (ragged[exists] == expected[exists]).all()
    assert (ragged[~exists] == 0).all() and not exists.all()  # Nothing else travelled.


@pytest.mark.parametrize("devices", [4, 64])
def test_traffic_counts_the_rows_of_other_devices_that_tokens_visit(devices):
    tokens, choices, embed = 512, 8, 4
    row = embed * 2
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, devices, (tokens, choices))
    visits = sum(len(set(line) - {0}) for line in drawn.tolist())
    balanced = traffic(tokens, choices, devices, embed)
    assert balanced.forward == pytest.approx(2 * visits * row, rel=0.03)
    assert balanced.backward == pytest.approx(1.5 * balanced.forward)
    worst = traffic(tokens, choices, devices, embed, balanced=False)
    assert worst.forward == 2 * tokens * min(choices, devices - 1) * row


def test_routing_by_groups_bounds_the_devices_that_a_token_visits():
    """V3's 8 groups of which a token reaches 4, a group to a device and a group to 8 devices."""
    near = traffic(1, 8, 8, 1, reach=4, balanced=False, itemsize=1)
    assert near.forward == 2 * 4
    far = traffic(1, 8, 64, 1, reach=32, balanced=False, itemsize=1)
    assert far.forward == 2 * 8
    assert traffic(1, 8, 8, 1, reach=4).forward < traffic(1, 8, 8, 1).forward
