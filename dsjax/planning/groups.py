"""Which devices exchange something, from the ways in which XLA writes groups."""

from __future__ import annotations

import re

import numpy as np

_GROUPS = re.compile(r"replica_groups=(mesh\[[^\]]*\] \{[^}]*\}|\{\{[\d,]*\}|\[[^=]*\]<=[^, ]*\S*)")
_ORDER = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIR = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


def first_group(attributes: str, devices: int) -> list[int]:
    """The first group of a collective, as places in the program's order of `devices`.

    XLA writes the groups themselves (`{{0,1},{2,3}}`), an order of the devices that is cut into
    them (`[2,4]<=[4,2]T(1,0)`: two groups of four), or a mesh and the axes that a group spans
    (`mesh['a'=2,'b'=4] {'b'}`). Without groups all devices are one; a permutation sends by pairs,
    and its first pair stands for all.
    """
    if pair := _PAIR.search(attributes):
        return [int(pair[1]), int(pair[2])]
    found = _GROUPS.search(attributes)
    if not found:
        return list(range(devices))
    text = found[1]
    if text.startswith("mesh"):
        mesh, spanned = text.split("] ")
        axes = re.findall(r"'([^']+)'=(\d+)", mesh)
        order = np.arange(devices).reshape([int(size) for _, size in axes])
        group = order[tuple(slice(None) if f"'{name}'" in spanned else 0 for name, _ in axes)]
        return group.ravel().tolist()
    if order := _ORDER.match(text):
        sizes, turned = (_numbers(order[part]) for part in (3, 4))
        places = np.arange(devices).reshape(sizes).transpose(turned or range(len(sizes)))
        return places.reshape(int(order[1]), int(order[2]))[0].tolist()
    return _numbers(text.strip("{}"))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []
