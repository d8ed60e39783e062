"""How commands about checkpoints print numbers. Imports no jax."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def table(console: Console, *titles: str) -> Table:
    """A table whose first column is names; frames only where a terminal shows them."""
    made = Table(box=box.SIMPLE if console.is_terminal else None, header_style="bold")
    for place, title in enumerate(titles):
        made.add_column(title, justify="right" if place and title else "left", no_wrap=True)
    return made


def human(size: int) -> str:
    """Bytes in decimal units.

    >>> human(1_365_273_000_000)
    '1,365.3 GB'
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return f"{size} bytes"
