"""The picture of a plan: where the time of a step goes."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from dsjax.planning.plan import Plan
from dsjax.planning.report import occurring
from dsjax.small_files import write_whole

INK, ACCENT, SECOND, QUIET = "#1f2933", "#1769aa", "#c2410c", "#9aa5b1"


def draw_plan(plan: Plan, path: Path, title: str) -> None:
    """Draw a bar for each kind of work: what the core does, waits for, and does not notice.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=130)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    ax = figure.subplots()
    if plan.account is None:
        ax.text(0.5, 0.5, "does not fit", ha="center", color=SECOND, fontsize=14)
        ax.axis("off")
    else:
        kinds = occurring(plan.account)
        scale, unit = (1, "seconds") if plan.account.seconds >= 1 else (1000, "milliseconds")
        left = [0.0] * len(kinds)
        # A bar without length would end the axis where it begins: at the end of another bar.
        ax.use_sticky_edges = False
        for part, label, color in (
            (plan.account.core, "the core's own", ACCENT),
            (plan.account.waited, "waited for", SECOND),
            (plan.account.hidden, "hidden behind it", QUIET),
        ):
            lengths = [scale * part[kind] for kind in kinds]
            ax.barh(kinds, lengths, left=left, color=color, label=label, height=0.6)
            left = [begin + length for begin, length in zip(left, lengths, strict=True)]
        ax.invert_yaxis()
        ax.set_xlim(left=0)
        step = scale * plan.account.seconds
        ax.set_xlabel(f"{unit}, of a step of {step:.3g}; {plan.mfu:.1%} of peak")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())
