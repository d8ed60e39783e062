"""A run of the training loop, whatever its rows are made of, from its parts to its directory.

run_dir/config.yaml        the resolved configuration
run_dir/tokenizer/         the tokenizer, and what belongs to it
run_dir/checkpoints/       the newest saves, each complete and checked (dsjax.checkpoint.store)
run_dir/metrics.jsonl      one record a step, and one an evaluation
run_dir/tensorboard/       the same numbers
run_dir/training.png       the picture
run_dir/summary.json       what the run ended with
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dsjax.checkpoint.store import CheckpointStore, abstract_on
from dsjax.config import MeshConfig, RunConfig, TrainRunConfig
from dsjax.config_files import write_config
from dsjax.data.batches import Batches
from dsjax.data.held_out import HeldOutRows
from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings
from dsjax.places import as_path
from dsjax.small_files import write_whole
from dsjax.training.bucket_metrics import open_log, read_records
from dsjax.training.changes import (
    Change,
    describe_changes,
    refuse_other_arrays,
    resumed_changes,
    say_resumed,
)
from dsjax.training.loop import Clock, StepMaker, TrainingLoop
from dsjax.training.picture import draw_run
from dsjax.training.profile import StepProfiler
from dsjax.training.progress import say
from dsjax.training.signals import catch_termination
from dsjax.training.step import TrainState, kept, make_train_step
from dsjax.training.summary import show_summary, summary_of
from sharding.context_parallel import check_context
from sharding.distributed import agree, is_first, local_rows, processes, share
from sharding.mesh import devices_wanted, make_mesh
from sharding.rules import TRAIN_RULES, Layout, use_layout


@dataclass(frozen=True)
class Run:
    """What a task brings to the loop."""

    config: TrainRunConfig
    settings: RunConfig
    """What is written as config.yaml."""
    layout: Layout
    tokens: int
    """How many the loop sees, padding included."""
    rows: np.ndarray
    """Which rows of a microbatch `data` gives: those of this process."""
    data: Batches
    held_out: HeldOutRows | None
    abstract: TrainState
    """Shapes and dtypes of all of the state."""
    begin: Callable[[], TrainState]
    """Makes the state before the first step, on the mesh; called where there is no checkpoint."""
    complete: Callable[[TrainState], TrainState]
    """Makes a state of what `kept` left of one in a checkpoint."""
    write_files: Callable[[Path], None]
    """Writes the tokenizer, and what else belongs there, into the run directory."""
    finish: Callable[[Path], None]
    """Writes what the task adds to the directory of a finished run."""
    compressors: Callable[[], dict[str, float]]
    """Bits per byte of compressors on the held-out text, for the summary."""
    make_step: StepMaker = make_train_step
    beside: Callable[[], tuple[Any, ...]] = tuple
    """Makes what the step takes beside the state, on the mesh: a teacher."""


@contextmanager
def together(config: RunConfig, console: Console) -> Iterator[Console]:
    """All processes of a run, once they have agreed; where this is not the first, nothing is said.

    Raises:
        UserError: they differ in configuration, devices or versions.
    """
    wanted = max(config.mesh.cpu_devices, devices_wanted(*_sizes(config.mesh)))
    with processes(config.distributed, wanted):
        agree("the configuration", config.model_dump(exclude={"distributed"}))
        agree("the environment", _environment())
        yield console if is_first() else Console(quiet=True)


def _environment() -> dict[str, Any]:
    """What has to be the same on every host."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "devices": [jax.local_devices()[0].device_kind, jax.local_device_count()],
        "versions": {package: version(package) for package in packages},
    }


def _sizes(mesh: MeshConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """Devices along each axis within a slice, and slices along each."""
    return mesh.model_dump(exclude={"dcn", "boxes", "cpu_devices"}), mesh.dcn.model_dump()


def make_layout(config: RunConfig, devices: Sequence[Any] | None = None) -> Layout:
    """The mesh of a run over all devices, or these, and its rule table.

    Raises:
        UserError: the mesh or the rules cannot be; the message says what could.
    """
    if unknown := sorted(set(config.rules) - set(TRAIN_RULES)):
        raise UserError(f"rules: unknown logical axis {unknown[0]!r}; known: {sorted(TRAIN_RULES)}")
    changes = {name: tuple(axes) for name, axes in config.rules.items()}
    sizes, dcn = _sizes(config.mesh)
    mesh = make_mesh(sizes, devices, dcn=dcn, boxes=config.mesh.boxes)
    layout = Layout(mesh, {**TRAIN_RULES, **changes})
    for name in layout.rules:
        layout.gathered_axes(name)
    return layout


def rows_read_here(layout: Layout, microbatch_size: int, length: int) -> np.ndarray:
    """Which rows of a microbatch go to this process's devices; says if that does not divide."""
    shape = (microbatch_size, length)
    check_context(length, layout.ways("sequence"))
    try:
        return local_rows(layout.sharding(("batch", None), shape), shape, axis=0)
    except UserError as error:
        raise UserError(f"training.microbatch_size={microbatch_size}: {error}") from None


def train(run: Run, console: Console) -> None:
    """Train, or go on training, until the run's tokens are seen; then evaluate and summarize.

    Leaves with exit code 128 + signal after saving when SIGTERM or SIGINT arrives, and with 1
    when `training.max_bad_steps` steps in a row are not finite, or when a process is lost.

    Raises:
        UserError: the run directory cannot be used. Nothing has been written then.
    """
    config, layout = run.config, run.layout
    folder = as_path(config.run_dir)
    saved = kept(run.abstract)
    placed = abstract_on(saved, tree_shardings(saved, layout))
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    with closing(run.data), closing(store), use_layout(layout), catch_termination() as termination:
        state, clock = _resume(run, store, placed, console)
        share("run directory", lambda: _write_beginning(run, folder))
        state = run.begin() if state is None else run.complete(state)
        with (
            closing(open_log(folder, clock.step)) as log,
            closing(StepProfiler(config.profile, folder)) as profiler,
        ):
            read = (run.data, run.rows, run.held_out)
            written = (store, log, profiler, console)
            loop = TrainingLoop(
                config, run.tokens, layout, state, clock, *read, *written, termination,
                make_step=run.make_step, beside=run.beside(),
            )  # fmt: skip
            loop.run()
            done_before = log.is_evaluated and loop.clock == clock
            if loop.exit_code is None and run.held_out is not None and not done_before:
                loop.evaluate(limit=None)
        if loop.exit_code is not None:
            sys.exit(loop.exit_code)
    share("summary", lambda: _finish(run, folder, console))


def _write_beginning(run: Run, folder: Path) -> None:
    write_config(run.settings, folder)
    run.write_files(folder)


def _resume(
    run: Run, store: CheckpointStore, placed: TrainState, console: Console
) -> tuple[TrainState | None, Clock]:
    """What is kept of the newest sound checkpoint, and its place; None where there is none."""
    folder = as_path(run.config.run_dir)
    changes = resumed_changes(folder, run.settings, store)
    restored = store.restore(placed)
    if restored is None:
        return None, Clock()
    step, state, extra = restored
    saved, wanted = extra["model"], run.config.model.model_dump()
    refuse_other_arrays(folder, [Change(f"model.{k}", saved.get(k), wanted[k]) for k in wanted
                                 if saved.get(k) != wanted[k]])  # fmt: skip
    try:
        run.data.set_state(extra["data"])
    except UserError as error:
        told = f"; {describe_changes(changes)}" if changes else ""
        raise UserError(f"{run.config.run_dir}: {error}{told}") from None
    say_resumed(console, run.config.run_dir, step, changes)
    return state, Clock(step, extra["tokens"])


def _finish(run: Run, folder: Path, console: Console) -> None:
    """Picture, summary file and table of a run that has seen all its tokens."""
    records = read_records(folder)
    title = f"{folder.name}: {records[-1]['tokens'] / 1e6:,.2f}M tokens"
    draw_run(records, folder / "training.png", title)
    summary = summary_of(records, run.compressors() if run.held_out is not None else None)
    write_whole(folder / "summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
    show_summary(summary, console)
    run.finish(folder)
    say(console, f"run directory: {folder}")
