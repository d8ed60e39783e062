"""What one instruction of a compiled program costs: of which kind, of what, for how long.

The rules, the same for every program:

1. A Pallas kernel takes its operations at `KERNEL_EFFICIENCY` of the matrix units' peak, or its
   bytes at `MEMORY_EFFICIENCY` of HBM's bandwidth, whichever is longer; `kernels.py` counts both.
2. A collective takes the bytes that pass a device, over the links that it has for them
   (`chips.Slice.links`) at `LINK_EFFICIENCY`; of a ragged exchange the rows that there are as a
   rule, where our code says how many.
3. What comes from or goes to the host's memory takes its bytes over PCIe.
4. A dense matmul takes the compiler's `estimated_cycles` at the chip's clock: it knows what the
   matrix units do.
5. Anything else reads its operands and writes its results once, at `MEMORY_EFFICIENCY` of HBM's
   bandwidth; or takes the compiler's estimate, where that is less. Alone the estimates of such work
   are 2 to 6 times as long as that, one 26 times, which no measured step leaves room for. Of an
   array that it only slices or gathers from, it reads that part; what it puts into an array it
   reads and writes, in place.

The efficiency of kernels is the one number that was fitted to measured steps, one for all kernels
and chips. docs/pods.md has the calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsjax.planning import kernels
from dsjax.planning.chips import Slice
from dsjax.planning.groups import first_group
from dsjax.planning.hlo import Array, Instruction, Program, array_bytes, arrays, nbytes
from dsjax.planning.touched import touched_bytes

MATMUL, EXCHANGE, GATHERS, REDUCTIONS = "dense matmul", "exchange", "gathers", "reductions"
COPIES, HOST, REST = "copies", "host transfers", "the rest"
KINDS = (
    MATMUL, kernels.GROUPED, kernels.ATTENTION, kernels.OTHER, EXCHANGE, GATHERS, REDUCTIONS,
    COPIES, HOST, REST,
)  # fmt: skip
"""Kinds of work, in the order in which tables show them."""

CORE, SPARSE, PCIE = "core", "sparse core", "pcie"
"""Parts of a device that work side by side; links are others, one for each axis of the torus."""

KERNEL_EFFICIENCY = 0.68
"""Of the matrix units' peak, for all that a kernel computes, padding and repeated tiles too."""

LINK_EFFICIENCY = 0.9
"""Of what the links carry."""

MEMORY_EFFICIENCY = 0.8
"""Of HBM's bandwidth, for arrays that are read or written from one end to the other."""

COLLECTIVES = {
    "all-gather": GATHERS,
    "all-reduce": REDUCTIONS,
    "reduce-scatter": REDUCTIONS,
    "all-to-all": EXCHANGE,
    "ragged-all-to-all": EXCHANGE,
    "collective-permute": EXCHANGE,
}

MOVES = frozenset((
    "bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice",
    "dynamic-update-slice", "fusion", "get-tuple-element", "iota", "pad", "parameter", "reshape",
    "slice", "transpose", "tuple",
))  # fmt: skip
"""Opcodes that move numbers and compute none: what has no others is a copy."""

HOST_MEMORY = "S(5)"
"""How a layout says that an array lies in the host's memory."""


@dataclass(frozen=True)
class Cost:
    """Seconds for which an instruction keeps parts of a device busy.

    Attributes:
        parts: which; more than one where an exchange goes along several axes of the torus.
        sent: bytes over links.
        counted: False for matrix work of which only the bytes are known.
    """

    kind: str
    parts: tuple[str, ...]
    seconds: float
    sent: float = 0.0
    counted: bool = True


class Costs:
    """The costs of a program's instructions on a slice."""

    def __init__(self, program: Program, chips: Slice) -> None:
        self.program, self.slice, self.chip = program, chips, chips.chip

    def of(self, instruction: Instruction, scope: dict[str, Instruction]) -> Cost:
        """The cost of an instruction, once; it stands in the computation `scope`."""
        shapes = [scope[name].shape for name in instruction.operands]
        if collective := self.collective(instruction):
            return self._exchange(collective, instruction)
        if kernels.is_kernel(instruction):
            return self._kernel(instruction, shapes)
        if any(HOST_MEMORY in shape for shape in (instruction.shape, *shapes)):
            moved = _moved(instruction, shapes)
            return Cost(HOST, (PCIE,), moved / (self.chip.host / self.chip.devices))
        kind = self._kind(instruction)
        estimate = self._by_cycles(instruction)
        if kind == MATMUL and estimate is not None:
            return Cost(kind, (CORE,), estimate)
        seconds = self._by_memory(touched_bytes(self.program, instruction, shapes))
        least = seconds if estimate is None else min(seconds, estimate)
        return Cost(kind, (CORE,), least, counted=kind != MATMUL)

    def _kind(self, instruction: Instruction) -> str:
        inner = (instruction, *self.program.inside(instruction))
        opcodes = {found.opcode.removesuffix("-start") for found in inner}
        if opcodes & {"convolution", "dot"}:
            return MATMUL
        return COPIES if opcodes <= MOVES else REST

    def _by_cycles(self, instruction: Instruction) -> float | None:
        return None if instruction.cycles is None else instruction.cycles / self.chip.clock

    def collective(self, instruction: Instruction) -> Instruction | None:
        """The exchange between devices that an instruction is, or is a fusion around.

        A fusion that computes while an exchange goes on counts as what it computes: the exchange
        was started before, and is waited for later.
        """
        if instruction.value("calls").startswith("async_collective_fusion"):
            return None
        for found in (instruction, *self.program.inside(instruction)):
            if found.opcode.removesuffix("-start") in COLLECTIVES:
                return found
        return None

    def _by_memory(self, moved: float) -> float:
        return moved / (self.chip.hbm / self.chip.devices * MEMORY_EFFICIENCY)

    def _kernel(self, call: Instruction, shapes: list[str]) -> Cost:
        work = kernels.work(call, shapes, self.chip)
        rate = self.chip.flops[work.numbers] / self.chip.devices * KERNEL_EFFICIENCY
        whole_numbers = all(dtype[0] in "su" for dtype, _ in arrays(call.shape))
        counted = work.told or work.flops > 0 or whole_numbers
        seconds = max(work.flops / rate, self._by_memory(work.nbytes))
        return Cost(work.kind, (CORE,), seconds, counted=counted)

    def _exchange(self, found: Instruction, whole: Instruction) -> Cost:
        opcode = found.opcode.removesuffix("-start")
        kind = COLLECTIVES[opcode]
        group = first_group(found.attributes, len(self.slice.places))
        size = len(group)
        result = sum(_filled(found, array) for array in _results(found))
        sent = result * (size - 1) / size
        if opcode == "reduce-scatter":
            sent *= size
        if opcode == "all-reduce" and not whole.value("calls").startswith("all-reduce-scatter"):
            sent *= 2  # sums scattered, then gathered
        hops = self.slice.hops(group) if kind == EXCHANGE else 1
        links = self.slice.links(group, alike=kind != EXCHANGE)
        if opcode == "collective-permute":  # one way only
            links = 1 / self.chip.devices
        parts = tuple(f"links {way.axis}" for way in self.slice.ways(group)) or ("links",)
        return Cost(kind, parts, sent * hops / (links * self.chip.link * LINK_EFFICIENCY), sent)


def _results(collective: Instruction) -> list[Array]:
    """What an exchange gives; one that is only started has what it was given before it."""
    found = [array for array in arrays(collective.shape) if array[1]]
    match collective.opcode:
        case "all-gather-start" | "collective-permute-start":
            return found[len(found) // 2 :]
        case "ragged-all-to-all-start":  # rows, where they go, numbers of rows, the result
            return found[1:2]
        case _:
            return found


def _filled(collective: Instruction, array: Array) -> float:
    """Bytes of what an exchange gives: of a ragged one those of the rows that there usually are."""
    if not collective.opcode.startswith("ragged"):
        return array_bytes(array)
    room = array[1][0]
    return array_bytes(array) * min(kernels.usual_rows(collective) or room, room) / room


def _moved(instruction: Instruction, shapes: list[str]) -> float:
    """Bytes of a copy between HBM and the host's memory; a slice's own where one moves."""
    match instruction.opcode:
        case "dynamic-update-slice" | "dynamic-update-slice-start":
            return nbytes(shapes[1])
        case "dynamic-slice":
            return nbytes(instruction.shape)
        case "dynamic-slice-start":  # of the whole array, the slice, and a few numbers
            return sorted(map(array_bytes, arrays(instruction.shape)))[-2]
        case _:
            return nbytes(shapes[0]) if shapes else 0
