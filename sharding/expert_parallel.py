"""Tokens travel to the devices that own their experts, and what is made of them travels back.

Called inside a `jax.shard_map` whose mesh has an axis of n devices that share T x n tokens. Each of
a token's K choices names the device it goes to (a pair of token and device); a token crosses to a
device once, as one row, however many of its pairs lead there.

No pair is dropped and memory is bounded, in rounds. For every (source, destination) the pairs, in
the order of their tokens, are cut into windows of p = ceil(SLACK T K / n) pairs, a token never cut
through; a round moves one window of every (source, destination). Where tokens spread evenly there
is one round, and where all go to one device about n / SLACK. A window has at most

    c = min(p, T) rows   and   q = p + K - 1 pairs (rounded up to eights),

so a device holds n c rows and n q pairs at a time whatever the routing: at most SLACK T K + n rows.

DeepSeek-V3 (arXiv:2412.19437) section 3.2.2 sends a token to a node once and spreads it inside;
here the mesh axis is flat, and a device is what is visited once. `traffic` counts the bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from sharding.platform import by_platform

SLACK = 1.5
"""A window's room over the pairs that it would hold if tokens spread evenly."""


LANES = 128
"""Numbers of a line in a tile of a TPU's memory, which has 8 of them."""


class Room(NamedTuple):
    """What a window holds at most, the same for every pair of devices."""

    step: int
    """p: a token belongs to window i // p when i of the pairs to its destination come before it."""
    rows: int
    """c"""
    pairs: int
    """q"""
    windows: int
    """Windows of a destination that takes every pair."""

    @classmethod
    def of(cls, tokens: int, choices: int, devices: int) -> Room:
        """The room for T tokens of K choices each, on each of n devices."""
        pairs = tokens * choices
        step = min(math.ceil(SLACK * pairs / devices), pairs)
        most = min(step + choices - 1, pairs)
        return cls(step, min(step, tokens), most, -(-pairs // step))


class Window(NamedTuple):
    """What one device sends to each of n in one round; where `real` is false there is nothing."""

    rows: Int[Array, "n"]
    token_of_row: Int[Array, "n c"]
    pairs_of_row: Int[Array, "n c"]
    """How many of the window's pairs a row brings; rows with many come first."""
    pair: Int[Array, "n q"]
    """Which of the T x K pairs, row by row."""
    row_of_pair: Int[Array, "n q"]
    """The row in its window."""
    real: Bool[Array, "n q"]


@dataclasses.dataclass(frozen=True)
class Journey:
    """All windows of one device's N = T x K pairs, as `plan_journey` cut them.

    Pairs stand in the order in which they travel: by segment, which is a destination and a window
    of it, and inside by rows; L = n x `room.windows` + 1, one more than there are segments.
    """

    room: Room
    devices: int
    window: Int[Array, "T K"]
    """The round in which a pair travels."""
    pairs_of_row: Int[Array, "T K"]
    """How many of the token's pairs go to the device that this pair goes to."""
    pair_of_place: Int[Array, "N"]
    row_of_place: Int[Array, "N"]
    """The row of its window."""
    place_of_row: Int[Array, "N"]
    """Where the pairs of each row begin, rows counted through all windows."""
    pairs_before: Int[Array, "L"]
    rows_before: Int[Array, "L"]
    spot: Int[Array, "T K"]
    """Where a pair lies among the n x q of its round."""
    rows: Int[Array, "T M"]
    """The rows that a token is in all rounds, of the n x c of each; n x c where they are no M."""
    window_of_row: Int[Array, "T M"]

    def pack(self, index: Int[Array, ""] | int) -> Window:
        """The windows of one round."""
        segment = jnp.arange(self.devices) * self.room.windows + index

        def stretch(before: Array, count: int) -> tuple[Array, Array]:
            at = before[segment][:, None] + jnp.arange(count)[None]
            return jnp.minimum(at, self.pair_of_place.size - 1), at < before[segment + 1][:, None]

        row, exists = stretch(self.rows_before, self.room.rows)
        first = self.pair_of_place[self.place_of_row[row]]
        place, real = stretch(self.pairs_before, self.room.pairs)
        return Window(
            rows=exists.sum(1),
            token_of_row=first // self.window.shape[1],
            pairs_of_row=jnp.where(exists, self.pairs_of_row.ravel()[first], 0),
            pair=self.pair_of_place[place],
            row_of_pair=self.row_of_place[place],
            real=real,
        )

    def rows_of(self, index: Int[Array, ""] | int) -> Int[Array, "T M"]:
        """The rows that a token is in a round, of its n x c; n x c behind the last one."""
        beyond = self.devices * self.room.rows
        return jnp.sort(jnp.where(self.window_of_row == index, self.rows, beyond), axis=1)

    def pick_pairs(self, index: Int[Array, ""] | int, back: Float[Array, "n q"]) -> Array:
        """What came back for each pair [T, K] in this round; 0 for those of other rounds."""
        return jnp.where(self.window == index, back.ravel()[self.spot], 0)


def plan_journey(destinations: Int[Array, "T K"], devices: int) -> Journey:
    """Cut the pairs of T tokens into windows; `destinations` is the device of each, below n.

    Inside a window rows with many pairs come first (a stable sort), so that who receives them adds
    up their pairs row by row without looking at those that do not exist.
    """
    tokens, choices = destinations.shape
    room = Room.of(tokens, choices, devices)
    load, before = _loads(destinations, devices)
    window = _of_pair(before, destinations) // room.step
    segment = destinations * room.windows + window
    together = _of_pair(load, destinations)
    pair_of_place = jnp.argsort((segment * choices + choices - together).ravel(), stable=True)
    place_of_pair = _inverse(pair_of_place).reshape(destinations.shape)

    token, segment_of_place = pair_of_place // choices, segment.ravel()[pair_of_place]
    same = (token[1:] == token[:-1]) & (segment_of_place[1:] == segment_of_place[:-1])
    opens = jnp.pad(~same, (1, 0), constant_values=True)
    rows_through = jnp.cumsum(opens)
    pairs_before = jnp.searchsorted(segment_of_place, jnp.arange(devices * room.windows + 1))
    rows_before = jnp.pad(rows_through, (1, 0))[pairs_before]
    row_of_place = rows_through - 1 - rows_before[segment_of_place]

    opening = opens[place_of_pair]
    column = jnp.argsort(~opening, axis=1, stable=True)[:, : min(choices, devices)]
    row = jnp.where(
        opening, destinations * room.rows + row_of_place[place_of_pair], devices * room.rows
    )
    return Journey(
        room=room,
        devices=devices,
        window=window,
        pairs_of_row=together,
        pair_of_place=pair_of_place,
        row_of_place=row_of_place,
        place_of_row=jnp.nonzero(opens, size=opens.size, fill_value=0)[0],
        pairs_before=pairs_before,
        rows_before=rows_before,
        spot=destinations * room.pairs + place_of_pair - pairs_before[segment],
        rows=_of_pair(row, column),
        window_of_row=_of_pair(window, column),
    )


def count_rounds(journeys: list[Int[Array, "_ K"]], devices: int) -> Int[Array, "J"]:
    """How many rounds move each of several journeys, of whose pairs these are the destinations.

    The same on every device of the mesh. Devices that exchange must agree on it; those that do not
    could differ, but programs whose loops run apart are asking every backend for trouble, and a few
    integers are little to share.
    """

    def mine(destinations: Array) -> Array:
        tokens, choices = destinations.shape
        load, before = _loads(destinations, devices)
        step = Room.of(tokens, choices, devices).step
        return jnp.where(load > 0, before, 0).max() // step + 1

    needed = jnp.stack([mine(destinations) for destinations in journeys])
    return lax.pmax(needed, jax.sharding.get_abstract_mesh().manual_axes)


def _loads(destinations: Array, devices: int) -> tuple[Array, Array]:
    """Pairs of each token to each device [T, n], and those of the tokens before it."""
    load = (destinations[:, :, None] == jnp.arange(devices)[None, None]).sum(1)
    return load, jnp.cumsum(load, 0) - load


def _of_pair(table: Array, column: Array) -> Array:
    """table[t, column[t, k]]"""
    return jnp.take_along_axis(table, column, axis=1)


def _inverse(permutation: Array) -> Array:
    places = jnp.arange(permutation.size, dtype=permutation.dtype)
    return jnp.zeros_like(places).at[permutation].set(places, unique_indices=True)


# ---------------------------------------------------------------------------------------------
# The exchange
# ---------------------------------------------------------------------------------------------


def exchange(
    axis: str,
    rows: Shaped[Array, "n c D"],
    sent: Int[Array, "n"],
    received: Int[Array, "n"],
    unwritten: Callable[[Array], Array],
) -> Shaped[Array, "n c D"]:
    """The d-th of n windows to device d of the axis, and one window back from each.

    Only the first `sent[d]` rows of a window exist, and `received[s]` of what device s sent here;
    the rest of the result is undefined. Where XLA has a ragged all-to-all (TPU, GPU) only rows that
    exist travel; on a CPU, which has none, whole windows do.

    Args:
        unwritten: gives memory for what comes, of the shape and dtype of what it is given.
    """
    ragged = partial(_ragged, axis, unwritten)
    whole = partial(_exchange_windows, axis)
    return by_platform(rows, sent, received, cpu=whole, default=ragged)


def exchange_whole(axis: str, windows: Shaped[Array, "n Q"]) -> Shaped[Array, "n Q"]:
    """The d-th of n rows to device d of the axis, and one back from each: for a few numbers."""
    return lax.all_to_all(windows, axis, 0, 0, tiled=True)


def _exchange_windows(axis: str, rows: Array, sent: Array, received: Array) -> Array:
    return lax.all_to_all(rows, axis, 0, 0, tiled=True)


def _ragged(
    axis: str,
    unwritten: Callable[[Array], Array],
    rows: Array,
    sent: Array,
    received: Array,
) -> Array:
    devices, room = rows.shape[:2]
    here = lax.axis_index(axis)
    begins = jnp.arange(devices, dtype=jnp.int32) * room
    width = math.prod(rows.shape[2:])
    # Rows of whole tiles are contiguous on a TPU in this form, and need no other copy to travel.
    form = (width // LANES, LANES) if width % (8 * LANES) == 0 else (width,)
    flat = rows.reshape(devices * room, *form)
    arrived = lax.ragged_all_to_all(
        flat,
        unwritten(flat),
        begins,
        sent.astype(jnp.int32),
        jnp.full(devices, here * room, jnp.int32),
        received.astype(jnp.int32),
        axis_name=axis,
    )
    return arrived.reshape(rows.shape)


# ---------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------


def usual_visits(choices: int, devices: int, reach: int) -> float:
    """On how many of n devices a token of K choices has experts, if they are balanced.

    n (1 - (1 - 1/n)^K), if choices are even over all of them. Where routing is limited to groups
    (DeepSeek-V3 section 2.1.2: a token reaches topk_group of n_group groups, on
    n topk_group / n_group devices) min(K, r): a group is chosen for its best experts, and so has
    some of the K; of V3's 4 groups a token with random scores meets 3.97.

    Args:
        reach: r, devices that a token can visit.
    """
    if reach < devices:
        return float(min(choices, reach))
    return devices * (1 - (1 - 1 / devices) ** choices)


class Traffic(NamedTuple):
    """Bytes that one device sends to others for one layer; as many arrive."""

    forward: float
    backward: float


def traffic(
    tokens: int,
    choices: int,
    devices: int,
    embed: int,
    *,
    reach: int | None = None,
    balanced: bool = True,
    itemsize: int = 2,
) -> Traffic:
    """Bytes of rows that leave a device with T tokens of K choices each, embed numbers a row.

    Forward, a token's row goes to each other device that it visits, and one comes back; backward
    two go (x and the gradient of y) and one comes back. So a device sends 2 v and 3 v rows, where

        v = T usual_visits (n - 1) / n     if experts are balanced
        v = T min(K, r, n - 1)             at worst: no choice at home, no two at one place

    The worst holds for a device's tokens; what it sends back for others is as much if they are as
    many.

    The pairs themselves, 12 bytes each, are left out: T K SLACK of them, some 1% at embed 7168.

    Args:
        reach: r, devices that a token can visit; all of them by default.
        balanced: the usual case, or the worst.
        itemsize: bytes of a number, 2 in bfloat16.
    """
    reach = devices if reach is None else min(reach, devices)
    if balanced:
        visits = (devices - 1) / devices * usual_visits(choices, devices, reach)
    else:
        visits = min(choices, reach, devices - 1)
    row = tokens * visits * embed * itemsize
    return Traffic(2 * row, 3 * row)
