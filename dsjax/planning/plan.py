"""`dsjax plan`: a run's train step on a slice that is not there, compiled and accounted for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dsjax.config import PretrainConfig
from dsjax.planning.account import Account, account
from dsjax.planning.chips import Chip, Slice, parse_topology
from dsjax.planning.compile import (
    Compiled,
    abstract_state,
    compile_once,
    described_devices,
    lower_step,
    microbatches,
    versions,
)
from dsjax.planning.costs import COLLECTIVES, COPIES
from dsjax.planning.hlo import Program, parse
from dsjax.planning.memory import replicated, state_bytes
from dsjax.planning.useful import flops_per_token
from dsjax.training.run import make_layout
from sharding.rules import Layout

LARGE = 0.01
"""Share of a step, or of a device's memory, from which something is worth a warning."""


@dataclass(frozen=True)
class Plan:
    """What is known of a run's train step; `report` shows it.

    Attributes:
        chips: how many; jax sees `chip.devices` devices on each.
        mesh: sizes of the axes that are longer than 1.
        tokens: of the largest batch, in all.
        memory: bytes on a device by kind.
        hbm: bytes that a device needs, as the compiler says.
        account: of one step; None when it does not fit.
        useful: model FLOPs of one token, in the paper's count.
        run_tokens: of the whole run.
        warnings: what is probably not meant, and what would make the run fit.
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
    run_tokens: int
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
        """Of the whole run, at the rate of its largest batch; None when it does not fit."""
        rate = self.tokens_per_second_per_chip
        return rate and self.run_tokens / rate / 3600


def make_plan(config: PretrainConfig, topology: str, cache: Path) -> Plan:
    """Compile the train step for a slice, or take what was compiled before from `cache`.

    Raises:
        UserError: no such slice; the mesh or the batch does not divide; no compiler.
    """
    chip, shape = parse_topology(topology)
    found = versions()
    devices = described_devices(topology)
    layout = make_layout(config, devices)
    state = abstract_state(config, layout)
    compiled = compile_once(lower_step(config, layout, state), cache)
    held = state_bytes(state)
    beside = compiled.hbm - held["weights"] - held["moments"]
    memory = {**held, "activations": max(beside - held["gradients"], 0.0)}
    slots, rows = microbatches(config)
    warnings = [
        f"every device holds all of {name}: {size / 1e9:.1f} GB"
        for name, size in replicated(state, LARGE * chip.hbm_bytes / chip.devices)
    ]
    counted = None
    if compiled.refusal:
        warnings += [compiled.refusal, remedy(config, layout, memory, chip)]
    else:
        counted, seen = _read(compiled, layout, chip, shape)
        warnings += seen
    return Plan(
        topology=topology,
        chip=chip,
        chips=len(devices) // chip.devices,
        mesh={axis: size for axis, size in layout.mesh.shape.items() if size > 1},
        tokens=slots * rows * config.data.sequence_length,
        memory=memory,
        hbm=compiled.hbm,
        account=counted,
        useful=flops_per_token(state.model, config.model, config.data.sequence_length),
        run_tokens=config.training.tokens,
        warnings=warnings,
        versions=found,
        compile_seconds=compiled.seconds,
    )


def _read(
    compiled: Compiled, layout: Layout, chip: Chip, shape: tuple[int, ...]
) -> tuple[Account, list[str]]:
    program = parse(compiled.text.splitlines())
    places = (tuple(device.coords)[: chip.axes] for device in layout.mesh.devices.flat)
    counted = account(program, Slice(chip, shape, tuple(places)))
    return counted, doubts(program, counted)


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


def remedy(config: PretrainConfig, layout: Layout, memory: dict[str, float], chip: Chip) -> str:
    """The setting that helps most when a program does not fit."""
    capacity = chip.hbm_bytes / chip.devices
    lasting = memory["weights"] + memory["moments"] + memory["gradients"]
    if lasting > 0.8 * capacity:
        return (
            f"weights, moments and gradients alone take {lasting / 1e9:.1f} of "
            f"{capacity / 1e9:.1f} GB: a larger slice, split over mesh.fsdp or mesh.expert"
        )
    training = config.training
    least = math.prod(layout.mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    if training.microbatch_size > least:
        return f"a smaller training.microbatch_size would help; the least is {least}"
    if not training.remat.startswith("keep_layer_inputs"):
        return "training.remat=keep_layer_inputs would help: layers are computed again"
    if training.remat != "keep_layer_inputs_on_host":
        return "training.remat=keep_layer_inputs_on_host would help"
    return "a larger slice would help, or mesh.context, or mesh.tensor"
