"""Where the time of a step goes: a device's compiled schedule, walked through once.

The one rule of overlap: a device has a core, which takes the instructions in the order in which
they are scheduled, and beside it links along each axis of the torus, sparse cores, copies within
its memory and PCIe, each shared evenly by all that it does at a time. What is started runs beside
the core at once, as fast as the most crowded of the parts that it needs lets it; where its result
is waited for, the core stands still until it is done. An exchange that is not started apart is
waited for where it stands.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from dsjax.planning.chips import Slice
from dsjax.planning.costs import CORE, SPARSE, Cost, Costs
from dsjax.planning.hlo import Instruction, Program
from dsjax.planning.loops import trips

FREE = frozenset((
    "after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple",
))  # fmt: skip
"""Opcodes that a device does not run."""

MEMORY = "memory"
"""Copies that run beside the core, such as those from HBM to the core's own memory."""


Amounts = defaultdict[str, float]
"""Seconds or bytes by name; 0 for what is not there."""


def _nothing() -> Amounts:
    return defaultdict(float)


@dataclass
class Account:
    """One run of a computation: seconds of the core in all, and by kind of work.

    Attributes:
        seconds: from begin to end; the sum of `core` and `waited`.
        core: the core's own work.
        waited: the core stands still for work that runs beside it.
        hidden: work that runs beside the core while it works.
        sent: bytes that pass a device's links.
        each: seconds of the core by kind and instruction, waiting included.
        unknown: loops whose trips only the run decides, counted as one, and matrix work whose
            operations nothing tells, counted by its bytes; how often each of them is run.
    """

    seconds: float = 0.0
    core: Amounts = field(default_factory=_nothing)
    waited: Amounts = field(default_factory=_nothing)
    hidden: Amounts = field(default_factory=_nothing)
    sent: Amounts = field(default_factory=_nothing)
    each: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    unknown: Counter[str] = field(default_factory=Counter)

    def add(self, other: Account, times: int = 1) -> None:
        """Let the other run so many times after this one."""
        self.seconds += times * other.seconds
        for name in ("core", "waited", "hidden", "sent", "each", "unknown"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


class Beside:
    """What runs beside the core in one computation, and how much of each is left to do."""

    def __init__(self, total: Account) -> None:
        self.total = total
        self.running: dict[str, Cost] = {}
        self.left: dict[str, float] = {}
        """Seconds, if each had its part of the device for itself."""

    def work(self, name: str, cost: Cost) -> None:
        """Let the core do something, or begin something else and wait for it at once."""
        total = self.total
        if cost.parts != (CORE,):
            self.start(name, cost)
            self.wait(name, name)
            return
        remaining = cost.seconds
        while remaining > 0:
            remaining -= self._pass(remaining)
        total.core[cost.kind] += cost.seconds
        total.each[cost.kind, name] += cost.seconds
        if not cost.counted:
            total.unknown[f"work {name}"] += 1

    def start(self, key: str, cost: Cost) -> None:
        """Begin now."""
        self.running[key], self.left[key] = cost, cost.seconds

    def wait(self, key: str, name: str) -> None:
        """Let the core stand still until it is done."""
        waited = 0.0
        while self.left[key] > 0:
            waited += self._pass()
        cost = self.running.pop(key)
        del self.left[key]
        self.total.waited[cost.kind] += waited
        self.total.hidden[cost.kind] += cost.seconds - min(waited, cost.seconds)
        self.total.sent[cost.kind] += cost.sent
        self.total.each[cost.kind, name] += waited

    def _pass(self, most: float = math.inf) -> float:
        """Let time pass until something that runs is done, or so many seconds; return how many."""
        busy = {key: self.running[key].parts for key, left in self.left.items() if left > 0}
        crowd = Counter(part for parts in busy.values() for part in parts)
        slowness = {key: max(crowd[part] for part in parts) for key, parts in busy.items()}
        ends = {key: self.left[key] * slower for key, slower in slowness.items()}
        seconds = min([most, *ends.values()])
        for key, end in ends.items():
            self.left[key] = (end - seconds) / slowness[key]
        self.total.seconds += seconds
        return seconds


def account(program: Program, chips: Slice) -> Account:
    """One run of a compiled program on a device of a slice."""
    return _Walk(program, chips).run(program.entry)


class _Walk:
    def __init__(self, program: Program, chips: Slice) -> None:
        self.program, self.costs = program, Costs(program, chips)

    def run(self, name: str) -> Account:
        """One run of a computation."""
        total = Account()
        beside = Beside(total)
        scope = self.program.computations[name]
        for instruction in scope.values():
            if instruction.opcode not in FREE:
                self._step(instruction, scope, beside)
        for key in list(beside.running):
            beside.wait(key, key)
        return total

    def _step(
        self, instruction: Instruction, scope: dict[str, Instruction], beside: Beside
    ) -> None:
        total, opcode, name = beside.total, instruction.opcode, instruction.name
        if opcode == "while":
            count = trips(self.program, instruction, scope)
            if count is None:
                total.unknown[f"loop {name}"] += 1
            total.add(self.run(instruction.value("body")), 1 if count is None else count)
        elif opcode == "conditional":
            arms = map(self.run, instruction.called)
            total.add(max(arms, key=lambda arm: arm.seconds))
        elif opcode == "call":
            total.add(self.run(instruction.called[0]))
        elif opcode == "custom-call-start" or self._makes_room(instruction):
            pass  # of the first an update begins what it is for
        elif opcode.endswith("-start") or self._marks(instruction, "AsyncCollectiveStart"):
            beside.start(self._key(instruction), self._started(instruction, scope))
        elif opcode == "custom-call-update":
            start = scope[instruction.operands[0]]
            beside.start(name, self._started(start, scope))
        elif opcode.endswith("-done"):
            beside.wait(instruction.operands[0], name)
        elif self._marks(instruction, "AsyncCollectiveDone"):
            beside.wait(self._key(instruction), name)
        else:
            beside.work(name, self.costs.of(instruction, scope))

    def _started(self, start: Instruction, scope: dict[str, Instruction]) -> Cost:
        """What runs beside the core from `start` on: the costliest thing that it calls."""
        if start.opcode == "fusion" or not start.called:
            cost = self.costs.of(start, scope)
            return replace(cost, parts=(MEMORY,)) if cost.parts == (CORE,) else cost
        inside = self.program.computations[start.called[0]]
        costs = [
            self._started(found, inside) if found.opcode.endswith("-start")
            else self.costs.of(found, inside)
            for found in inside.values()
            if found.opcode not in FREE and not found.opcode.endswith("-done")
        ]  # fmt: skip
        cost = max(costs, key=lambda cost: cost.seconds)
        return replace(cost, parts=(SPARSE,)) if cost.parts == (CORE,) else cost

    def _makes_room(self, instruction: Instruction) -> bool:
        return (
            instruction.opcode == "custom-call"
            and instruction.value("custom_call_target") == "AllocateBuffer"
        )

    def _marks(self, instruction: Instruction, target: str) -> bool:
        return instruction.opcode == "fusion" and any(
            found.value("custom_call_target") == target
            for found in self.program.inside(instruction)
        )

    def _key(self, instruction: Instruction) -> str:
        """What start and end of the same work share: the channel of an exchange, or a name."""
        if instruction.opcode != "fusion":
            return instruction.name
        collective = self.costs.collective(instruction)
        return collective.value("channel_id") if collective else instruction.name
