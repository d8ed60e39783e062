"""A compiled program as XLA prints it: computations, and their instructions in the scheduled order.

Only what an account needs is read: names, shapes, opcodes, operands, and a few attributes by
pattern. The text of 671B has some 10 MB; it is read line by line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from dsjax.errors import UserError

Array = tuple[str, tuple[int, ...]]
"""dtype and dimensions, such as ("bf16", (8, 4096, 7168))."""

UNKNOWN_CYCLES = 2**62
"""From here on `estimated_cycles` means that the compiler does not know: it writes 2**63 - 1."""

_BEGINS_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ENDS_COMPUTATION = re.compile(r"\}(, execution_thread=.*)?$")
_BEGINS_INSTRUCTION = re.compile(r"  (?:ROOT )?%?[\w.\-]+ = ")
_INSTRUCTION = re.compile(
    r"  (?:ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [a-z])|\S+) ([a-z][a-z0-9\-]*)\((.*)", re.DOTALL
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b(pred|bf16|f\d+\w*|[su]\d+)\[([\d,]*)\]")
_LAID_OUT = re.compile(
    _ARRAY.pattern + r"(?:\{([\d,]*)(?::T\(([\d,]*)\))?[^}S]*(?:S\((\d+)\))?[^}]*\})?"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(_NAME.findall(self.arguments))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, without the condition and the body of a loop."""
        return tuple(
            name
            for found in _CALLED.findall(self.attributes)
            for name in re.findall(r"[\w.\-]+", found)
        )

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where there is none, or one that means "unknown"."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found and int(found[1]) < UNKNOWN_CYCLES else None

    def value(self, key: str) -> str:
        """What stands behind `key=` or `"key":`, without quotes; "" where the key is not there."""
        found = re.search(rf'(?:\b{key}=|"{key}":)"?%?([\w.\-]+)', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Program:
    """The computations by name, and the name of the one that a device runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """What an instruction runs, all the way down; loops and their trips apart."""
        for name in instruction.called:
            for inner in self.computations[name].values():
                yield inner
                yield from self.inside(inner)


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, those of a tuple in order."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
    ]


def array_bytes(array: Array) -> float:
    """Bytes of an array without the padding of its layout; half a byte a number for int4."""
    dtype, sizes = array
    bits = re.search(r"\d+", dtype)
    return math.prod(sizes) * (int(bits[0]) / 8 if bits else 1)


def nbytes(shape: str) -> float:
    """Bytes of all arrays of a shape."""
    return sum(map(array_bytes, arrays(shape)))


def hbm_bytes(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in HBM, filled up to the tiles of their layouts.

    A layout such as {1,0:T(8,128)S(1)} names dimensions from the fastest on, the tile of the
    fastest ones, and another memory than HBM.
    """
    total = 0.0
    for dtype, dimensions, order, tile, memory in _LAID_OUT.findall(shape):
        sizes = [int(size) for size in dimensions.split(",") if size]
        fastest = [int(place) for place in order.split(",") if place]
        widths = [int(width) for width in reversed(tile.split(",")) if width]
        for place, width in zip(fastest, widths, strict=False):
            sizes[place] = math.ceil(sizes[place] / width) * width
        total += 0 if memory else array_bytes((dtype, tuple(sizes)))
    return total


def parse(lines: Iterable[str]) -> Program:
    """Read the text of an optimized, scheduled program.

    Raises:
        UserError: it has no entry computation, or is not scheduled.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, scheduled = "", None, False
    for line in _whole_lines(lines):
        if line.startswith("HloModule"):
            scheduled = "is_scheduled=true" in line
        elif begin := _BEGINS_COMPUTATION.match(line):
            current = computations.setdefault(begin[2], {})
            entry = begin[2] if begin[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = found.groups()
            current[name] = Instruction(name, shape, opcode, *_split_arguments(rest))
    if not entry or not scheduled:
        raise UserError(
            "this is no compiled program: expected the text of a scheduled HLO module, with its "
            "ENTRY; `compiled.as_text()` gives it"
        )
    return Program(computations, entry)


def _whole_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines of the text, those that XLA broke inside an attribute joined again."""
    held = ""
    for line in lines:
        line = line.rstrip("\n")
        if held and not (_BEGINS_INSTRUCTION.match(line) or _ENDS_COMPUTATION.match(line)):
            held += line
            continue
        if held:
            yield held
        held = ""
        if _BEGINS_INSTRUCTION.match(line):
            held = line
        else:
            yield line
    if held:
        yield held


def _split_arguments(rest: str) -> tuple[str, str]:
    """What stands inside the parentheses that have just been opened, and what stands behind."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""
