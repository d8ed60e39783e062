"""Held-out pass@1 of several runs of reinforcement learning, in one picture.

    python benchmarks/held_out_curves.py runs/seed-0 runs/seed-1 runs/control --output curves.png

A run that dealt out anew who was right (`grpo.shuffled_rewards`) is dashed. Prints one table and
one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dsjax.cli import run
from dsjax.config_files import load_run_config
from dsjax.config_grpo import GrpoRunConfig
from dsjax.errors import UserError
from dsjax.training.bucket_metrics import read_records

PASS, CONSTANT = "held_out_pass_at_1", "held_out_best_constant"


def main() -> None:
    """Read, draw, say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = [draw(axes, run) for run in args.runs]
    axes.axhline(rows[0]["best_constant"], color="gray", linewidth=1, linestyle=":")
    axes.annotate("best constant answer", (0, rows[0]["best_constant"]), (0, -10),
                  textcoords="offset points", color="gray", fontsize=8)  # fmt: skip
    axes.set(xlabel="step", ylabel="pass@1 on held-out questions", ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)
    print(f"{'run':24} {'first':>7} {'last':>7} {'constant':>9} {'minutes':>8}")
    for row in rows:
        print(
            f"{row['run']:24} {row['first']:7.3f} {row['last']:7.3f} {row['best_constant']:9.3f} "
            f"{row['minutes']:8.1f}"
        )
    print(json.dumps(rows))


def draw(axes: Any, run: Path) -> dict[str, Any]:
    """One run's curve, and its figures."""
    config = load_run_config(run / "config.yaml")
    if not isinstance(config, GrpoRunConfig):
        raise UserError(f"{run}: task is {config.task}; expected grpo")
    records = read_records(run)
    evaluated = [record for record in records if PASS in record]
    control = config.grpo.shuffled_rewards
    label = f"seed {config.seed}, who is right dealt anew" if control else f"seed {config.seed}"
    steps, passed = ([record[key] for record in evaluated] for key in ("step", PASS))
    axes.plot(steps, passed, "--" if control else "-", linewidth=1.5, label=label)
    seconds = sum(v for r in records for k, v in r.items() if k.endswith("_seconds"))
    return {
        "run": run.name,
        "first": passed[0],
        "last": passed[-1],
        "best_constant": evaluated[-1][CONSTANT],
        "minutes": seconds / 60,
    }


if __name__ == "__main__":
    run(main)
