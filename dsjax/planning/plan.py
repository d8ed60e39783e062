"""`dsjax plan`: a step on a slice that is not there, compiled and accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsjax.planning.account import Account, account
from dsjax.planning.chips import Chip, Slice, parse_topology
from dsjax.planning.compile import compile_once, described_devices, versions
from dsjax.planning.costs import COLLECTIVES, COPIES
from dsjax.planning.hlo import Program, parse
from dsjax.planning.job import Job

LARGE = 0.01
"""Share of a step, or of a device's memory, from which something is worth a warning."""


ACCEPTED = 0.85, 0.9
"""Of the tokens that MTP drafts first; DeepSeek-V3 (arXiv:2412.19437) section 5.4.3."""


@dataclass(frozen=True)
class Plan:
    """What is known of a step; `report` shows it.

    Attributes:
        chips: how many; jax sees `chip.devices` devices on each.
        mesh: sizes of the axes that are longer than 1.
        tokens: that all devices together process in a step.
        memory: bytes on a device by kind.
        hbm: bytes that a device needs, as the compiler says.
        account: of one step; None when it does not fit.
        useful: model FLOPs of one token, in the paper's count.
        details: of the job.
        read: of the job.
        warnings: what is probably not meant, and what would make it fit.
    """

    topology: str
    chip: Chip
    chips: int
    mesh: dict[str, int]
    tokens: int
    memory: dict[str, float]
    hbm: float
    account: Account | None
    useful: float
    details: dict[str, Any]
    read: float | None
    warnings: list[str]
    versions: dict[str, str]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return self.account is not None

    @property
    def tokens_per_second_per_chip(self) -> float | None:
        """None when it does not fit."""
        return self.account and self.tokens / self.account.seconds / self.chips

    @property
    def mfu(self) -> float | None:
        """Useful operations over those of the chip's bfloat16 peak; None when it does not fit."""
        rate = self.tokens_per_second_per_chip
        return rate and rate * self.useful / self.chip.flops["bf16"]

    @property
    def chip_hours(self) -> float | None:
        """Of a whole training run, at the rate of its largest batch."""
        rate, tokens = self.tokens_per_second_per_chip, self.details.get("run_tokens")
        return rate and tokens and tokens / rate / 3600

    @property
    def memory_seconds(self) -> float | None:
        """How long HBM takes to read weights and cache once: no decoding is faster."""
        return self.read and self.read / (self.chip.hbm / self.chip.devices)

    @property
    def sequence_rates(self) -> list[float] | None:
        """Tokens a second of a sequence that is decoded; a range where MTP drafts, of its first
        draft alone.
        """
        if self.account is None or self.details.get("step") != "decode":
            return None
        accepted = ACCEPTED if self.details["drafts"] else (0.0,)
        return [(1 + share) / self.account.seconds for share in accepted]


def make_plan(job_on: Callable[[Sequence[Any]], Job], topology: str, cache: Path) -> Plan:
    """Compile a step for a slice, or take what was compiled before from `cache`.

    Args:
        job_on: the step on the devices of the slice; its errors are the user's.

    Raises:
        UserError: no such slice; no compiler; what `job_on` raises.
    """
    chip, shape = parse_topology(topology)
    found = versions()
    devices = described_devices(topology)
    job = job_on(devices)
    compiled = compile_once(job.lowered, cache)
    capacity = chip.hbm_bytes / chip.devices
    warnings = [
        f"every device holds all of {name}: {size / 1e9:.1f} GB"
        for name, size in job.whole
        if size >= LARGE * capacity
    ]
    counted = None
    if compiled.refusal:
        warnings += [compiled.refusal, job.remedy(capacity)]
    else:
        program = parse(compiled.text.splitlines())
        places = (tuple(place.coords)[: chip.axes] for place in job.layout.mesh.devices.flat)
        counted = account(program, Slice(chip, shape, tuple(places)))
        warnings += doubts(program, counted)
    known = job.lasting | job.passing
    return Plan(
        topology=topology,
        chip=chip,
        chips=len(devices) // chip.devices,
        mesh={axis: size for axis, size in job.layout.mesh.shape.items() if size > 1},
        tokens=job.tokens,
        memory=known | {"activations": max(compiled.hbm - sum(known.values()), 0)},
        hbm=compiled.hbm,
        account=counted,
        useful=job.useful,
        details=job.details,
        read=job.read,
        warnings=warnings,
        versions=found,
        compile_seconds=compiled.seconds,
    )


def doubts(program: Program, counted: Account) -> list[str]:
    """What of a program is probably not meant, and what the account does not know of it."""
    found = {
        instruction.name: instruction
        for scope in program.computations.values()
        for instruction in scope.values()
    }
    lines = [
        f"a large copy: {name}, {found[name].shape}, {seconds:.3f} s a step"
        for (kind, name), seconds in counted.each.items()
        if kind == COPIES and seconds >= LARGE * counted.seconds
    ]
    added = [
        name
        for name, instruction in found.items()
        if instruction.opcode in COLLECTIVES and "is_spmd_generated" in instruction.attributes
    ]
    if added:
        lines.append(f"{len(added)} exchanges that nobody asked for, such as {added[0]}")
    for kind, how in (
        ("loop", "loops, whose length only the run decides, are counted as one pass"),
        (
            "work",
            "kernels or matmuls, which do not tell their operations, are counted by their bytes",
        ),
    ):
        unknown = [name for name in counted.unknown if name.startswith(kind)]
        if unknown:
            lines.append(f"{len(unknown)} {how}: the step takes longer than this account says")
    return lines
