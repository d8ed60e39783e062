"""What a Pallas kernel does, counted from its shapes: the compiler does not know.

A kernel's own cost estimate is believed if it has bytes as well as operations; some libraries write
a round number of operations and no bytes, as a hint to the scheduler. Two kinds are counted from
their shapes whatever they say, because what they compute is more than what is useful:

- A grouped matmul reads rows in tiles, and a tile once for each group that has rows in it. Its grid
  is among its operands: offsets of `groups + 1`, and twice as many numbers as there are visits, the
  group and the tile of each. Groups of any size cause `groups - 1` visits more than tiles. Where
  there is room for more rows than there are as a rule, and our code says so, tiles are of those.
- Attention computes whole blocks of scores, those on and below the diagonal; their size is in the
  kernel's metadata. Heads narrower than the matrix unit leave the rest of it idle.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dsjax.kernels.usual import USUAL_ROWS
from dsjax.planning.chips import Chip
from dsjax.planning.hlo import Array, Instruction, arrays, hbm_bytes

GROUPED, ATTENTION, OTHER = "grouped matmul", "attention", "other kernels"


@dataclass(frozen=True)
class Work:
    """Operations of the matrix units, and bytes to and from HBM, of one call.

    Attributes:
        numbers: what is multiplied, of `Chip.flops`: fp8 or int8 where the chip has a faster unit
            for it and both factors are of it.
        told: the kernel says itself what it moves; without operations, it multiplies nothing then.
    """

    kind: str
    flops: float
    nbytes: float
    numbers: str = "bf16"
    told: bool = False


def is_kernel(instruction: Instruction) -> bool:
    """Whether it calls a Pallas kernel."""
    return instruction.value("custom_call_target") == "tpu_custom_call"


def work(call: Instruction, shapes: list[str], chip: Chip) -> Work:
    """What one call of a kernel does; `shapes` are those of its operands.

    Operations are 0 where neither the shapes nor the kernel tell them.
    """
    inputs = [array for shape in shapes for array in arrays(shape)]
    results = arrays(call.shape)
    flops, moved = (float(call.value(key) or 0) for key in ("flops", "bytes_accessed"))
    least = hbm_bytes(call.shape) + sum(map(hbm_bytes, shapes))
    numbers = _numbers(inputs, chip)
    if grouped := _grouped(inputs, results, usual_rows(call)):
        return Work(GROUPED, grouped, max(moved, least), numbers)
    kind = ATTENTION if re.search("attention|mha|mqa", call.name + call.attributes) else OTHER
    if moved:
        return Work(kind, flops, moved, numbers, told=True)
    counted = _attention(call, inputs, results, chip) if kind == ATTENTION else 0
    return Work(kind, counted, least, numbers)


def _numbers(inputs: list[Array], chip: Chip) -> str:
    """What the two largest inputs, taken for the factors, are made of."""
    largest = sorted(inputs, key=lambda array: math.prod(array[1]))[-2:]
    short = {"fp8" if dtype.startswith("f8") else "int8" if dtype == "s8" else "bf16"
             for dtype, _ in largest}  # fmt: skip
    found = short.pop() if len(short) == 1 else "bf16"
    return found if found in chip.flops else "bf16"


def usual_rows(instruction: Instruction) -> int | None:
    """How many rows there are as a rule, where our code says so (`dsjax.kernels.usual`)."""
    found = re.search(rf'op_name="[^"]*{USUAL_ROWS}(\d+)', instruction.attributes)
    return int(found[1]) if found else None


def _grouped(inputs: list[Array], results: list[Array], usual: int | None) -> float:
    """Operations of a grouped matmul or of its weight gradient; 0 for any other kernel.

    [rows, k] x [groups, k, n] -> [rows, n], a sum of such products where it takes more stacks, or
    [rows, k] x [rows, n] -> [groups, k, n], to which it may add a stack that it takes.
    """
    counts = [sizes[0] for dtype, sizes in inputs if dtype == "s32" and len(sizes) == 1]
    rows = [sizes[0] for dtype, sizes in inputs if dtype != "s32" and len(sizes) == 2]
    taken = [sizes for _, sizes in inputs if len(sizes) == 3]
    stacks = taken + [sizes for _, sizes in results if len(sizes) == 3]
    if not rows or not stacks or stacks[0][0] + 1 not in counts:
        return 0
    groups, *matrix = stacks[0]
    visits = max((count for count in counts if counts.count(count) > 1), default=0)
    tiles = visits - (groups - 1)
    if tiles <= 0:
        return 0
    count = min(rows[0], usual or rows[0])
    needed = math.ceil(count / math.ceil(rows[0] / tiles))
    products = max(len(taken), 1)
    return 2 * products * count * math.prod(matrix) * (needed + groups - 1) / needed


def _attention(call: Instruction, inputs: list[Array], results: list[Array], chip: Chip) -> float:
    """Operations of causal attention; its first wide inputs are queries, keys and values.

    Each is [..., length, width]. Products of a pass, S scores, O output, d gradients:

        forward: S O    dq: S dS dQ    dk and dv: S dV dS dK, and dQ where it is among the results
    """
    wide = [sizes for dtype, sizes in inputs if dtype[0] not in "sup" and len(sizes) >= 3]
    if len(wide) < 3:
        return 0
    queries, keys, values = wide[:3]
    if queries[-1] != keys[-1] or keys[-2] != values[-2]:
        return 0
    unit = chip.matrix_width
    qk, v = (math.ceil(sizes[-1] / unit) * unit for sizes in (queries, values))
    if "dkv" in call.name:
        fused = sum(sizes[-1] == queries[-1] for _, sizes in results) > 1
        side, width = "_dkv", 2 * qk + 2 * v + (qk if fused else 0)
    elif "dq" in call.name:
        side, width = "_dq", 2 * qk + v
    else:
        side, width = "", qk + v
    block = max(_block(call, f"block_q{side}"), _block(call, f"block_kv{side}"))
    visited = (1 + min(block / keys[-2], 1)) / 2
    return 2 * math.prod(queries[:-1]) * keys[-2] * visited * width


def _block(call: Instruction, key: str) -> int:
    """The number behind a key of the kernel's metadata, which is JSON inside a string; or 0."""
    found = re.search(rf'{key}\\*":\s*(\d+)', call.attributes)
    return int(found[1]) if found else 0
