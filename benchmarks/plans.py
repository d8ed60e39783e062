"""Plan every run that docs/pods.md shows, and write its table.

    pip install -e '.[plan]'
    python benchmarks/plans.py --write

Compiles V3's train step twice and R1's steps for slices that are not there: on two cores an hour,
the second time, from what `dsjax plan` keeps, minutes. Prints the table and one JSON line a plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsjax.cli import run
from dsjax.errors import UserError
from dsjax.small_files import write_whole

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "pods.md"
BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"
"""What the table stands between."""

PLANS = [
    # Four microbatches, or three: 49,152 tokens on a v5p, and on each of a TPU7x's two devices.
    ["v3-671b-v5p-512", "--topology", "v5p:8x8x8", "training.batch_size=6144"],
    ["v3-671b-tpu7x-256", "--topology", "tpu7x:4x8x8", "training.batch_size=6144"],
    ["v2-lite-16b-v5e-16", "--topology", "v5e:4x4"],
    ["v2-lite-16b-v5e-32", "--topology", "v5e:4x8"],
    ["serving/r1-v5e-64", "--topology", "v5e:8x8"],
    ["serving/r1-v5e-64", "--topology", "v5e:8x8", "drafts=1"],
    ["serving/r1-v5e-64", "--topology", "v5e:8x8", "step=prefill"],
    ["serving/r1-tpu7x-16", "--topology", "tpu7x:2x2x4"],
    ["serving/r1-tpu7x-16", "--topology", "tpu7x:2x2x4", "step=prefill"],
]

HEAD = """\
| plan | memory of a device | a step | tokens a second and chip | of peak | compiled in |
|---|---|---|---|---|---|"""


def main() -> None:
    """Plan, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/pods.md")
    write = parser.parse_args().write
    lines = []
    for words in PLANS:
        plan = _plan(words)
        print(json.dumps({"plan": words, **plan}), flush=True)
        lines.append(_line(words, plan))
    made = "\n".join([HEAD, *lines])
    print(made)
    if write:
        before, rest = GUIDE.read_text().split(BEGIN)
        _, after = rest.split(END)
        write_whole(GUIDE, f"{before}{BEGIN}\n{made}\n{END}{after}".encode())


def _plan(words: list[str]) -> dict[str, Any]:
    """What `dsjax plan --json` says; in a process of its own, which knows one kind of chip."""
    command = [sys.executable, "-m", "dsjax", "plan", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"dsjax plan {' '.join(words)}: ended with {done.returncode}")
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _line(words: list[str], plan: dict[str, Any]) -> str:
    name = f"`{' '.join(words)}`".replace(" --topology", ":")
    held, compiled = f"{plan['hbm_bytes'] / 1e9:.1f} GB", f"{plan['compile_seconds']:.0f} s"
    if not plan["fits"]:
        return f"| {name} | {held}: does not fit | | | | {compiled} |"
    seconds = plan["step_seconds"]
    step = f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
    rate = f"{plan['tokens_per_second_per_chip']:,.0f}"
    if rates := plan["run"].get("tokens_per_second_of_a_sequence"):
        share = plan["run"]["memory_seconds"] / seconds
        rate += (
            f"; of a sequence {' to '.join(f'{r:.1f}' for r in rates)}, {share:.0%} of the limit"
        )
    return f"| {name} | {held} | {step} | {rate} | {plan['mfu']:.1%} | {compiled} |"


if __name__ == "__main__":
    run(main)
