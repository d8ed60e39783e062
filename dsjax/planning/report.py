"""Plans and accounts as text, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from dsjax.checkpoint.tables import human, table
from dsjax.planning.account import Account
from dsjax.planning.costs import KINDS
from dsjax.planning.plan import ACCEPTED, Plan


def plan_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """What `dsjax plan --json` prints: six keys that programs rely on, then the rest in groups.

    Bytes are those of a device; `mfu` is a fraction; what a plan that does not fit cannot know is
    None. `price` is in dollars, for a chip and hour.
    """
    hours = plan.chip_hours
    return {
        "fits": plan.fits,
        "hbm_bytes": round(plan.hbm),
        "step_seconds": plan.account and plan.account.seconds,
        "tokens_per_second_per_chip": plan.tokens_per_second_per_chip,
        "mfu": plan.mfu,
        "versions": plan.versions,
        "topology": {
            "name": plan.topology,
            "chips": plan.chips,
            "devices": plan.chips * plan.chip.devices,
            "mesh": plan.mesh,
        },
        "memory": {kind: round(size) for kind, size in plan.memory.items()},
        "account": plan.account and account_json(plan.account),
        "run": {
            **plan.details,
            "tokens_per_step": plan.tokens,
            "chip_hours": hours,
            "dollars": hours and price and hours * price,
            "memory_seconds": plan.memory_seconds,
            "tokens_per_second_of_a_sequence": plan.sequence_rates,
        },
        "warnings": plan.warnings,
        "compile_seconds": plan.compile_seconds,
    }


def print_plan(console: Console, plan: Plan, price: float | None) -> None:
    """Memory, time by kind, what it comes to, and what is doubtful."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    console.print(f"{plan.topology}, {plan.chips} chips: {mesh}\n", highlight=False)
    shown = table(console, "memory of a device", "")
    for kind, size in plan.memory.items():
        shown.add_row(kind, human(round(size)))
    shown.add_row("in all", human(round(plan.hbm)))
    shown.add_row("of", human(round(plan.chip.hbm_bytes / plan.chip.devices)))
    console.print(shown)
    if plan.account:
        print_account(console, plan.account)
        console.print("\n".join(_sums(plan, price)), highlight=False)
    else:
        console.print("does not fit", style="bold red")
    for line in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(line)}", highlight=False)


def _sums(plan: Plan, price: float | None) -> list[str]:
    """What a step comes to."""
    rate, mfu, hours = plan.tokens_per_second_per_chip, plan.mfu, plan.chip_hours
    lines = [f"{plan.tokens:,} tokens a step, {rate:,.0f} a second and chip, {mfu:.1%} of peak"]
    if hours:
        cost = f", {hours * price:,.0f} dollars" if price else ""
        lines.append(f"{plan.details['run_tokens']:,} tokens take {hours:,.0f} chip-hours{cost}")
    if plan.account and plan.memory_seconds and plan.details["step"] == "decode":
        share = plan.memory_seconds / plan.account.seconds
        rates = " to ".join(f"{rate:,.1f}" for rate in plan.sequence_rates or [])
        drafted = len(plan.sequence_rates or []) > 1
        lines.append(
            f"{rates} tokens a second of a sequence"
            + (f", {ACCEPTED[0]:.0%} to {ACCEPTED[1]:.0%} of drafts accepted" if drafted else "")
            + f"; reading weights and cache takes {share:.0%} of the step"
        )
    return lines


def account_json(account: Account) -> dict[str, Any]:
    """Seconds and bytes of a step by kind; kinds that do not occur are left out."""
    return {
        kind: {
            "core_seconds": account.core[kind],
            "waited_seconds": account.waited[kind],
            "hidden_seconds": account.hidden[kind],
            "link_bytes": account.sent[kind],
        }
        for kind in occurring(account)
    }


def print_account(console: Console, account: Account) -> None:
    """One line a kind, and their sum: a step is what the core does and what it waits for."""
    scale, unit = (1, "s") if account.seconds >= 1 else (1000, "ms")
    titles = (f"{part}, {unit}" for part in ("core", "waited for", "hidden"))
    shown = table(console, "a step", *titles, "share", "over links")
    parts = account.core, account.waited, account.hidden
    for kind in occurring(account):
        times = (f"{scale * part[kind]:.3f}" if part[kind] else "" for part in parts)
        share = (account.core[kind] + account.waited[kind]) / account.seconds
        sent = account.sent[kind]
        shown.add_row(kind, *times, f"{share:.1%}", human(round(sent)) if sent else "")
    sums = (f"{scale * sum(part.values()):.3f}" for part in parts)
    shown.add_row("in all", *sums, f"{scale * account.seconds:.3f} {unit}",
                  human(round(sum(account.sent.values()))))  # fmt: skip
    console.print(shown)


def occurring(account: Account) -> list[str]:
    """Kinds of work that a step has."""
    return [
        kind for kind in KINDS if account.core[kind] + account.waited[kind] + account.hidden[kind]
    ]
