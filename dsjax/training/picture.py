"""The picture of a run: losses, expert balance, learning rate, throughput."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dsjax.small_files import write_whole
from dsjax.training.metrics import Record

INK, ACCENT, SECOND, QUIET = "#1f2933", "#1769aa", "#c2410c", "#9aa5b1"


def draw_run(records: list[Record], path: Path, title: str) -> None:
    """Draw `training.png` from a run's records."""
    steps = [r for r in records if "loss" in r]
    held_out = [r for r in records if "held_out_loss" in r]
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=130)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    axes = figure.subplots(2, 3)
    millions = np.array([r["tokens"] for r in steps]) / 1e6
    _losses(axes[0, 0], steps, held_out, millions)
    _violations(axes[0, 1], steps, millions)
    _loads(axes[0, 2], held_out)
    _line(axes[1, 0], millions, [r["learning_rate"] for r in steps], "learning rate")
    _line(axes[1, 1], millions, [r["tokens_per_second"] for r in steps], "tokens per second")
    axes[1, 1].set_ylim(bottom=0)
    _line(axes[1, 2], millions, numbers(steps, "grad_norm"), "gradient norm")
    axes[1, 2].set_yscale("log")
    # Plain numbers: a formula such as 10^2 looks up twenty fonts, with a warning for each missing.
    axes[1, 2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1, 2].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[1, 2].yaxis.set_minor_formatter(NullFormatter())
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())


def _losses(ax: Axes, steps: list[Record], held_out: list[Record], x: np.ndarray) -> None:
    mtp = np.array([np.mean(r["mtp_loss"]) if r["mtp_loss"] else np.nan for r in steps])
    if np.isfinite(mtp).any():
        ax.plot(x, smooth(mtp), color=INK, lw=1, label="MTP")
    loss = numbers(steps, "loss")
    ax.plot(x, loss, color=ACCENT, lw=0.4, alpha=0.35)
    _line(ax, x, smooth(loss), "loss, nats per token", label="next token")
    if held_out:
        tokens = [r["tokens"] / 1e6 for r in held_out]
        ax.plot(tokens, numbers(held_out, "held_out_loss"), "o-", ms=3, color=SECOND,
                label="held out")  # fmt: skip
    ax.legend(frameon=False, fontsize=8)


def _violations(ax: Axes, steps: list[Record], x: np.ndarray) -> None:
    layers = np.array([r["max_violation"] for r in steps], float)
    for layer in layers.T:
        ax.plot(x, layer, color=QUIET, lw=0.6)
    if layers.size:
        _line(ax, x, layers.max(1), "MaxVio of each batch, every layer", label="worst layer")
        ax.legend(frameon=False, fontsize=8)
    ax.set_ylim(bottom=0)


def _loads(ax: Axes, held_out: list[Record]) -> None:
    """Each expert's load over the mean, layer by layer, on held-out text."""
    ax.set_title("held-out load of each expert / mean", fontsize=9, color=INK, loc="left")
    load = np.array(held_out[-1]["held_out_load"] if held_out else [], float)
    if not load.size:
        ax.set_axis_off()
        return
    relative = load * load.shape[1]
    image = ax.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    ax.set_xlabel("expert", fontsize=8)
    ax.set_ylabel("expert layer, MTP last", fontsize=8)
    ax.set_yticks(range(len(relative)))
    ax.tick_params(labelsize=7)
    ax.figure.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=7)


def _line(
    ax: Axes, x: np.ndarray, y: np.ndarray | list[float], title: str, label: str | None = None
) -> None:
    ax.plot(x, y, color=ACCENT, lw=1.2, label=label)
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel("million tokens", fontsize=8)
    ax.tick_params(labelsize=7, which="both")
    ax.spines[["top", "right"]].set_visible(False)


def smooth(y: np.ndarray) -> np.ndarray:
    """Mean of the finite values within a hundredth of the run to either side."""
    window = np.ones(2 * (len(y) // 100) + 1)
    finite = np.isfinite(y)
    total = np.convolve(np.where(finite, y, 0.0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def numbers(records: list[Record], name: str) -> np.ndarray:
    """One figure of every record; NaN where it was not finite, or is not there.

    A run that went on with other settings has records without the figures that came with them.
    """
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], float)
