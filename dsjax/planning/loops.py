"""How often a loop runs, where the program itself says so."""

from __future__ import annotations

import re

from dsjax.kernels.usual import USUAL_TURNS
from dsjax.planning.hlo import Instruction, Program

_USUAL = re.compile(USUAL_TURNS + r'(\d+)\)*/while"')


def trips(program: Program, loop: Instruction, scope: dict[str, Instruction]) -> int | None:
    """Runs of a `while` that stands in the computation `scope`; None where only the run decides.

    XLA's `known_trip_count` is believed. After layouts are assigned it is gone; then the condition
    tells, `counter < limit` with both known before the loop. XLA's counters grow by one. Where only
    the run decides, a loop of ours may say how often it turns as a rule (`dsjax.kernels.usual`).
    """
    if known := re.search(r'"?known_trip_count"?:?=?\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    if usual := _USUAL.search(loop.attributes):
        return int(usual[1])
    condition = program.computations[loop.value("condition")]
    *_, root = condition.values()
    if root.opcode != "compare" or root.value("direction") != "LT":
        return None
    carried = scope[loop.operands[0]]
    begin, end = (_before(condition[name], carried, scope) for name in root.operands)
    return None if begin is None or end is None else max(end - begin, 0)


def _before(number: Instruction, carried: Instruction, scope: dict[str, Instruction]) -> int | None:
    """An integer of a loop's condition, as it is before the loop; `carried` is the loop's tuple."""
    if number.opcode == "get-tuple-element" and carried.opcode == "tuple":
        number = scope[carried.operands[int(number.value("index"))]]
        while number.opcode in ("copy", "bitcast"):
            number = scope[number.operands[0]]
    return int(number.arguments) if number.opcode == "constant" else None
