"""What an instruction moves between HBM and its core: of an array it may take a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsjax.planning.hlo import Instruction, Program, array_bytes, arrays, hbm_bytes

_TAKE = frozenset(("dynamic-slice", "gather", "slice"))
_PUT = {"dynamic-update-slice": 1, "scatter": 2}
"""What puts a part into its first operand, in place; and which operand the part is."""


def touched_bytes(program: Program, instruction: Instruction, shapes: Sequence[str]) -> float:
    """Bytes read and written, each once.

    Args:
        shapes: of the operands.
    """
    if instruction.opcode in _TAKE:
        return 2 * hbm_bytes(instruction.shape)
    if instruction.opcode in _PUT:
        return 2 * hbm_bytes(shapes[_PUT[instruction.opcode]])
    if instruction.opcode == "copy-start":  # its shape names what it reads beside what it writes
        return hbm_bytes(instruction.shape)
    if instruction.opcode == "slice-start":  # likewise, and it reads the part that it writes
        _, written = instruction.shape.split("}), ", 1)
        return array_bytes(arrays(written)[0]) + hbm_bytes(written)
    if instruction.opcode != "fusion":
        return hbm_bytes(instruction.shape) + sum(map(hbm_bytes, shapes))
    inside = program.computations[instruction.called[0]]
    parameters = [found for found in inside.values() if found.opcode == "parameter"]
    read = sum(_read(found, inside, shapes[int(found.arguments)]) for found in parameters)
    return read + _written(instruction, inside)


def _read(parameter: Instruction, inside: Mapping[str, Instruction], shape: str) -> float:
    """Bytes of a fusion's operand: parts, if all that uses it takes parts or puts one into it."""
    users = [found for found in inside.values() if parameter.name in found.operands]
    parts = 0.0
    for user in users:
        if user.operands[0] != parameter.name or parameter.name in user.operands[1:]:
            return hbm_bytes(shape)
        if user.opcode in _TAKE:
            parts += hbm_bytes(user.shape)
        elif user.opcode not in _PUT:
            return hbm_bytes(shape)
    return min(parts, hbm_bytes(shape))


def _written(fusion: Instruction, inside: Mapping[str, Instruction]) -> float:
    """Bytes of a fusion's results; where a part is put into one, that part, read and written."""
    *_, root = inside.values()
    written = hbm_bytes(fusion.shape)
    for found in [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while found.opcode == "bitcast":
            found = inside[found.operands[0]]
        if found.opcode in _PUT:
            part = inside[found.operands[_PUT[found.opcode]]]
            written += 2 * hbm_bytes(part.shape) - hbm_bytes(found.shape)
    return max(written, 0)
