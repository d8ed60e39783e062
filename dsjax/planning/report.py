"""An account as a table, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from dsjax.checkpoint.tables import human, table
from dsjax.planning.account import Account
from dsjax.planning.costs import KINDS


def account_json(account: Account) -> dict[str, Any]:
    """Seconds and bytes of a step by kind; kinds that do not occur are left out."""
    return {
        kind: {
            "core_seconds": account.core[kind],
            "waited_seconds": account.waited[kind],
            "hidden_seconds": account.hidden[kind],
            "link_bytes": account.sent[kind],
        }
        for kind in _occurring(account)
    }


def print_account(console: Console, account: Account) -> None:
    """One line a kind, and their sum: the step is what the core does and what it waits for."""
    shown = table(console, "", "core s", "waited s", "share", "hidden s", "over links")
    for kind in _occurring(account):
        core, waited = account.core[kind], account.waited[kind]
        shown.add_row(
            kind,
            f"{core:.3f}",
            f"{waited:.3f}" if waited or account.hidden[kind] else "",
            f"{(core + waited) / account.seconds:.1%}",
            f"{account.hidden[kind]:.3f}" if account.hidden[kind] else "",
            human(round(account.sent[kind])) if account.sent[kind] else "",
        )
    shown.add_row(
        "step",
        f"{sum(account.core.values()):.3f}",
        f"{sum(account.waited.values()):.3f}",
        f"{account.seconds:.3f} s",
        f"{sum(account.hidden.values()):.3f}",
        human(round(sum(account.sent.values()))),
    )
    console.print(shown)


def _occurring(account: Account) -> list[str]:
    return [
        kind for kind in KINDS if account.core[kind] + account.waited[kind] + account.hidden[kind]
    ]
