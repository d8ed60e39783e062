"""The account of `dsjax plan` beside step times that were measured on real slices.

    python benchmarks/calibrate_plan.py v5p-8x8x8-run.hlo.gz v5p-8x8x8-run.json [more pairs]

A program is the text of the compiled step of one device, `compiled.as_text()`, plain or through
gzip; its file's name begins with the slice it is for, as in v5p-8x8x8. Beside it stands a JSON file
with `measured_step_s`; `measured_step_s_for_these_tokens` goes before it, for programs that were
compiled for other tokens than were measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from rich.console import Console

from dsjax.checkpoint.tables import table
from dsjax.cli import run
from dsjax.errors import UserError
from dsjax.planning.account import Account, account
from dsjax.planning.chips import parse_topology, whole_slice
from dsjax.planning.costs import KERNEL_EFFICIENCY, KINDS
from dsjax.planning.hlo import parse


def main() -> None:
    """One table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="PROGRAM MEASURED")
    files = parser.parse_args().files
    if len(files) % 2:
        raise UserError(f"{files[-1]}: expected pairs, a program and what was measured of it")
    pairs = list(zip(files[::2], files[1::2], strict=True))
    accounts = {program.name.split(".")[0]: read_account(program) for program, _ in pairs}
    measured = [read_measured(measured) for _, measured in pairs]
    print_side_by_side(accounts, measured)
    print(
        json.dumps(
            {
                name: {"step_seconds": found.seconds, "measured_seconds": seconds,
                       "ratio": found.seconds / seconds}
                for (name, found), seconds in zip(accounts.items(), measured, strict=True)
            }
            | {"kernel_efficiency": KERNEL_EFFICIENCY}
        )
    )  # fmt: skip


def read_account(program: Path) -> Account:
    """The account of a program on the slice that its file's name begins with."""
    chip, _, rest = program.name.partition("-")
    chips = whole_slice(*parse_topology(f"{chip}:{rest.split('-')[0].split('.')[0]}"))
    opener = gzip.open if program.suffix == ".gz" else open
    with opener(program, "rt") as lines:
        return account(parse(lines), chips)


def read_measured(file: Path) -> float:
    """Seconds of a step, as measured."""
    record = json.loads(file.read_text())
    return record.get("measured_step_s_for_these_tokens", record["measured_step_s"])


def print_side_by_side(accounts: dict[str, Account], measured: list[float]) -> None:
    """By kind: seconds of the core and, behind a plus, those that it waits."""
    console = Console()
    shown = table(console, "", *accounts)
    for kind in KINDS:
        cells = [f"{one.core[kind]:.2f} + {one.waited[kind]:.2f}" for one in accounts.values()]
        shown.add_row(kind, *cells)
    found = [one.seconds for one in accounts.values()]
    shown.add_row("step", *(f"{seconds:.2f}" for seconds in found))
    shown.add_row("measured", *(f"{seconds:.2f}" for seconds in measured))
    ratios = (mine / theirs - 1 for mine, theirs in zip(found, measured, strict=True))
    shown.add_row("", *(f"{ratio:+.1%}" for ratio in ratios))
    console.print(shown)


if __name__ == "__main__":
    run(main)
