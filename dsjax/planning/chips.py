"""The chips that a plan can be made for, and how those of a slice are linked.

Figures are those of Cloud TPU (docs.cloud.google.com/tpu has a page for each chip), but two. The
clock is the one at which the matrix units reach the peak, peak / (2 x units x width x width); it
agrees with the known ones (1.5 GHz on v5e, 1.75 on v5p). What passes to the host's memory is what
others have seen of PCIe on v5e and v5p, and on TPU7x taken to be twice that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsjax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """What a chip can do, for all of its devices together; in units without prefix, by second.

    Attributes:
        devices: how many devices jax sees on it.
        matrix_units: how many, on all its cores.
        matrix_width: rows and columns of one; a product narrower than that wastes the rest.
        flops: operations of its matrix units, by the bits of a number: 16 is bfloat16.
        link: what one link carries one way.
        axes: how many axes the torus between chips has.
        ring: an axis of at least so many chips is closed to a ring; a shorter one is a line.
        host: what passes between HBM and its host's memory, one way.
    """

    name: str
    devices: int
    matrix_units: int
    matrix_width: int
    flops: dict[str, float]
    hbm_bytes: float
    hbm: float
    link: float
    axes: int
    ring: int
    host: float

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops["bf16"] / (2 * self.matrix_units * self.matrix_width**2)


V5E = Chip(
    "v5e", 1, 4, 128, {"bf16": 197e12, "int8": 394e12}, 16 * 2**30, 819e9, 50e9, 2, 16, 16e9,
)  # fmt: skip
V5P = Chip(
    "v5p", 1, 8, 128, {"bf16": 459e12, "int8": 918e12}, 95 * 2**30, 2765e9, 100e9, 3, 4, 16e9,
)  # fmt: skip
TPU7X = Chip(
    "tpu7x", 2, 8, 256, {"bf16": 2307e12, "fp8": 4614e12}, 192 * 2**30, 7380e9, 100e9, 3, 4, 32e9,
)  # fmt: skip
CHIPS = {chip.name: chip for chip in (V5E, V5P, TPU7X)}


@dataclass(frozen=True)
class Way:
    """An axis of a torus as a group of devices uses it: by so many chips, in a ring or a line."""

    axis: int
    chips: int
    closed: bool


@dataclass(frozen=True)
class Slice:
    """Chips in a torus, and which of them each device of a program is on.

    Attributes:
        places: the coordinates of a device's chip, for all devices in the program's order.
    """

    chip: Chip
    shape: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    def ways(self, group: Sequence[int]) -> list[Way]:
        """The axes along which the devices of a group are on different chips."""
        places = {self.places[device] for device in group}
        spans = [len(set(along)) for along in zip(*places, strict=True)]
        return [
            Way(axis, span, closed=span == size and size >= self.chip.ring)
            for axis, (span, size) in enumerate(zip(spans, self.shape, strict=True))
            if span > 1
        ]

    def links(self, group: Sequence[int], *, alike: bool) -> float:
        """How many links a device has for what its group exchanges, at the least favoured place.

        Two on an axis that the group fills as a ring, one on an axis where it is a line. Devices of
        one chip share its links, unless what comes to one of them is also for the other.

        Args:
            alike: all devices of the group are to have the same, or a sum of what all have.
        """
        links = sum(2 if way.closed else 1 for way in self.ways(group))
        together = len({self.places[device] for device in group}) < len(group)
        return max(links, 1) / (1 if alike and together else self.chip.devices)

    def hops(self, group: Sequence[int]) -> float:
        """How many links a message between two devices of a group passes, on average."""
        hops = sum(
            way.chips / 4 if way.closed else (way.chips - 1 / way.chips) / 3
            for way in self.ways(group)
        )  # to any device, the sender itself among them
        others = max(len(group) - 1, 1)
        return max(hops * len(group) / others, 1)


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """`v5p:8x8x8` as its chip and the shape of the slice.

    Raises:
        UserError: no such chip, or not a shape of its torus.
    """
    name, _, sizes = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--topology {text}: no chip {name!r} is known; there are {', '.join(CHIPS)}, "
            "as in v5p:8x8x8"
        )
    chip = CHIPS[name]
    shape = [int(size) if size.isdecimal() else 0 for size in sizes.split("x")]
    if len(shape) != chip.axes or math.prod(shape) == 0:
        example = "x".join(["4"] * chip.axes)
        raise UserError(
            f"--topology {text}: expected {chip.axes} sizes for {name}, as in {name}:{example}"
        )
    return chip, tuple(shape)


def whole_slice(chip: Chip, shape: tuple[int, ...]) -> Slice:
    """All devices of a slice in their own order: the first axis runs fastest."""
    places = []
    for number in range(math.prod(shape)):
        place = []
        for size in shape:
            number, at = divmod(number, size)
            place.append(at)
        places += [tuple(place)] * chip.devices
    return Slice(chip, shape, tuple(places))
