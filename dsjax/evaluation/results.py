"""The results of an evaluation: results.json, a table, a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from dsjax.evaluation.statistics import Estimate, Grade, TaskScore
from dsjax.small_files import write_whole

INK, ACCENT, SECOND, QUIET = "#1f2933", "#1769aa", "#c2410c", "#9aa5b1"


def write_results(path: Path, about: Mapping[str, Any], scores: Mapping[str, TaskScore]) -> None:
    """Write scores as JSON; shares are from 0 to 1, intervals are [low, high]."""
    tasks = {name: _plain(score) for name, score in scores.items()}
    written = json.dumps({**about, "tasks": tasks}, indent=2, ensure_ascii=False)
    write_whole(path, written.encode() + b"\n")


def _plain(score: TaskScore) -> dict[str, Any]:
    plain = dataclasses.asdict(score)
    for field, name in (("pass_at_1", "pass@1"), ("cons_at_k", "cons@k"), ("pass_at_k", "pass@k")):
        value: Estimate | None = getattr(score, field)
        del plain[field]
        plain[name] = value and {"value": value.value, "interval": [value.low, value.high]}
    return plain


def print_table(console: Console, scores: Mapping[str, TaskScore]) -> None:
    """One line a task; scores in percent."""
    table = Table(box=box.SIMPLE if console.is_terminal else None, header_style="bold")
    table.add_column("task", no_wrap=True)
    for title in ("questions", "k", "pass@1", "95%", "cons@k", "pass@k", "answered", "cut off",
                  "tokens"):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for name, score in scores.items():
        one, cons = score.pass_at_1, score.cons_at_k
        table.add_row(
            name,
            f"{score.questions:,}",
            str(score.k),
            f"{100 * one.value:.1f}",
            f"{100 * one.low:.1f}-{100 * one.high:.1f}",
            "-" if cons is None else f"{100 * cons.value:.1f}",
            f"{100 * score.pass_at_k.value:.1f}",
            f"{score.answered:.0%}",
            f"{score.truncated:.0%}",
            f"{score.mean_tokens:,.0f}",
        )
    console.print(table)


def draw_results(
    path: Path,
    title: str,
    scores: Mapping[str, TaskScore],
    grades: Mapping[str, Sequence[Sequence[Grade]]],
) -> None:
    """Draw results.png: scores with their intervals, and how long right and wrong answers are."""
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(scores)), layout="constrained", dpi=130)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(scores)
    _scores(left, [scores[name] for name in names])
    _lengths(right, [[g for samples in grades[name] for g in samples] for name in names])
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)  # the first one on top
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())


def _scores(axes: Axes, scores: Sequence[TaskScore]) -> None:
    ones = [score.pass_at_1 for score in scores]
    axes.barh(range(len(scores)), [100 * one.value for one in ones], height=0.5, color=ACCENT)
    for place, one in enumerate(ones):
        axes.plot([100 * one.low, 100 * one.high], [place, place], color=INK, lw=1.2)
    axes.plot([], [], color=INK, lw=1.2, label="95% interval")
    voted = [(n, s.cons_at_k.value) for n, s in enumerate(scores) if s.cons_at_k is not None]
    if voted and scores[0].k > 1:
        places, values = zip(*voted, strict=True)
        axes.plot([100 * value for value in values], places, "D", ms=5, color=SECOND, clip_on=False,
                  label=f"cons@{scores[0].k}")  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_title("pass@1, percent", fontsize=9, color=INK, loc="left")


def _lengths(axes: Axes, grades: Sequence[Sequence[Grade]]) -> None:
    """Medians as dots, the middle half as lines."""
    for offset, correct, color in ((-0.12, True, ACCENT), (0.12, False, QUIET)):
        for place, every in enumerate(grades):
            tokens = sorted(g.tokens for g in every if g.correct is correct)
            if tokens:
                low, middle, high = (tokens[int(q * (len(tokens) - 1))] for q in (0.25, 0.5, 0.75))
                axes.plot([low, high], [place + offset] * 2, color=color, lw=2)
                axes.plot(middle, place + offset, "o", ms=4, color=color)
        axes.plot([], [], "o-", ms=4, color=color, label="right" if correct else "wrong")
    axes.set_xlim(left=0)
    axes.set_title("tokens of an answer: median and middle half", fontsize=9, color=INK, loc="left")
