"""The picture of a run of reinforcement learning: is it learning, and at what price."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsjax.posttraining.grpo_loop import ACTIVITIES
from dsjax.small_files import write_whole
from dsjax.training.metrics import Record
from dsjax.training.picture import ACCENT, INK, QUIET, SECOND, numbers, smooth


def draw_rewards(records: list[Record], path: Path, title: str) -> None:
    """Draw `rewards.png` from a run's records."""
    steps = [r for r in records if "reward" in r]
    held_out = [r for r in records if "held_out_pass_at_1" in r]
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=130)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    axes = figure.subplots(2, 3)
    x = numbers(steps, "step")
    _solved(axes[0, 0], steps, held_out, x)
    _lines(axes[0, 1], steps, x, "mean of each reward", _rewards(steps))
    _lines(axes[0, 2], steps, x, "tokens an answer", ["answer_tokens"])
    _lines(axes[1, 0], steps, x, "entropy and KL, nats a token", ["entropy", "kl"])
    shares = ["equal_groups", "truncated", "clipped", "unscored"]
    _lines(axes[1, 1], steps, x, "share of groups, answers, tokens", shares)
    _seconds(axes[1, 2], steps, x)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())


def _solved(ax: Axes, steps: list[Record], held_out: list[Record], x: np.ndarray) -> None:
    solved = numbers(steps, "solved")
    ax.plot(x, solved, color=ACCENT, lw=0.4, alpha=0.35)
    ax.plot(x, smooth(solved), color=ACCENT, lw=1.2, label="training")
    if held_out:
        at = numbers(held_out, "step")
        ax.plot(at, numbers(held_out, "held_out_pass_at_1"), "o-", ms=3, color=SECOND,
                label="held out, pass@1")  # fmt: skip
        if "held_out_best_constant" in held_out[-1]:
            ax.axhline(held_out[-1]["held_out_best_constant"], color=QUIET, lw=1, ls="--",
                       label="best constant answer")  # fmt: skip
    ax.set_ylim(0, 1)
    _finish(ax, "answers that are right")


def _rewards(steps: list[Record]) -> list[str]:
    """All that the run ever had: one that was added or left out has a gap."""
    names = [name for step in steps for name in step if name.startswith("reward_")]
    return ["reward", *dict.fromkeys(names)]


def _lines(ax: Axes, steps: list[Record], x: np.ndarray, title: str, names: list[str]) -> None:
    for name, color in zip(names, (ACCENT, SECOND, INK, QUIET) * 4, strict=False):
        label = name.removeprefix("reward_").replace("_", " ")
        ax.plot(x, smooth(numbers(steps, name)), color=color, lw=1.2, label=label)
    _finish(ax, title)


def _seconds(ax: Axes, steps: list[Record], x: np.ndarray) -> None:
    parts = [smooth(numbers(steps, f"{name}_seconds")) for name in ACTIVITIES]
    ax.stackplot(x, *parts, labels=ACTIVITIES, colors=(ACCENT, QUIET, SECOND))
    _finish(ax, "seconds a step")


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=7, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
