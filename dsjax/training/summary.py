"""What a run ended with: one table, and the same figures as JSON."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsjax.training.metrics import Record


def summary_of(records: list[Record], compressors: dict[str, float] | None) -> dict[str, Any]:
    """Figures of a finished run; those of held-out text where some was held out.

    Args:
        compressors: bits per byte that others need for it; None where nothing was held out.
    """
    steps = [r for r in records if "loss" in r]
    summary: dict[str, Any] = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "skipped_steps": sum(not r["finite"] for r in steps),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steps),
        "loss": steps[-1]["loss"],
    }
    if compressors is not None:
        final = next(r for r in reversed(records) if r.get("held_out_complete"))
        summary |= {
            "held_out_loss": final["held_out_loss"],
            "bits_per_byte": {"model": final["held_out_bits_per_byte"]} | compressors,
            "mtp_acceptance": final["held_out_acceptance"],
            "max_violation": final["held_out_max_violation"],
        }
    return summary


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("tokens seen", f"{summary['tokens']:,}")
    table.add_row("tokens per second, median", f"{summary['tokens_per_second']:,.0f}")
    if "bits_per_byte" in summary:
        names = {"model": "this model", "gzip -9": "gzip -9", "xz -9e": "xz -9e"}
        for key, value in summary["bits_per_byte"].items():
            table.add_row(f"held-out bits per byte, {names[key]}", f"{value:.3f}")
        if len(summary["bits_per_byte"]) > 1:
            beaten = _beaten(summary["bits_per_byte"])
            table.add_row("", f"below {' and '.join(beaten)}" if beaten else "above both")
        if summary["mtp_acceptance"] is not None:
            table.add_row("MTP drafts accepted, held out", f"{summary['mtp_acceptance']:.1%}")
        if summary["max_violation"]:
            worst = max(summary["max_violation"])
            table.add_row("MaxVio over the held-out set, worst layer", f"{worst:.2f}")
    if summary["skipped_steps"]:
        table.add_row("steps skipped, not finite", f"{summary['skipped_steps']:,}")
    console.print(table)


def _beaten(bits: dict[str, float]) -> list[str]:
    """The compressors that need more bits than the model."""
    return [name for name, value in bits.items() if name != "model" and bits["model"] < value]
