"""Pre-training from a configuration to a finished run directory, resuming where it left off.

run_dir/config.yaml        the resolved configuration
run_dir/tokenizer/         the tokenizer, trained on the training documents or given
run_dir/checkpoints/       the newest saves, each complete and checked (dsjax.checkpoint.store)
run_dir/metrics.jsonl      one record a step, and one an evaluation
run_dir/tensorboard/       the same numbers
run_dir/training.png       the picture
run_dir/summary.json       what the run ended with
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dsjax.checkpoint.store import CheckpointStore, abstract_on
from dsjax.config import PretrainConfig, RunConfig
from dsjax.config_files import write_config
from dsjax.data.held_out import HeldOutRows, held_out_rows
from dsjax.data.pipeline import TrainingIterator, sample_texts, training_iterator
from dsjax.data.sources import Corpus, open_corpus
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings
from dsjax.places import as_path
from dsjax.small_files import write_whole
from dsjax.training.bucket_metrics import open_log, read_records
from dsjax.training.host_memory import keep_freed_memory
from dsjax.training.loop import Clock, TrainingLoop
from dsjax.training.picture import draw_run
from dsjax.training.profile import StepProfiler
from dsjax.training.progress import say
from dsjax.training.signals import catch_termination
from dsjax.training.step import TrainState, init_state
from dsjax.training.summary import show_summary, summary_of
from sharding.context_parallel import check_context
from sharding.distributed import agree, is_alone, is_first, local_rows, processes, share
from sharding.mesh import make_mesh
from sharding.rules import TRAIN_RULES, Layout, use_layout


def pretrain(config: PretrainConfig, console: Console) -> None:
    """Train, or go on training, until `training.tokens` are seen; then evaluate and summarize.

    With several processes all call this on the same configuration, and share the run directory.
    The first one writes and prints; each writes its part of the checkpoints.

    Leaves with exit code 128 + signal after saving when SIGTERM or SIGINT arrives, and with 1
    when `training.max_bad_steps` steps in a row are not finite, or when a process is lost.

    Raises:
        UserError: the configuration, the data, the tokenizer or the run directory cannot be used,
            by any of the processes. Nothing has been written then, but a tokenizer that was trained
            for several processes.
    """
    with processes(config.distributed):
        agree("the configuration", config.model_dump(exclude={"distributed"}))
        agree("the environment", _environment())
        _pretrain(config, console if is_first() else Console(quiet=True))


def _environment() -> dict[str, Any]:
    """What has to be the same on every host."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "devices": [jax.local_devices()[0].device_kind, jax.local_device_count()],
        "versions": {package: version(package) for package in packages},
    }


def _pretrain(config: PretrainConfig, console: Console) -> None:
    """`pretrain`, once all processes have come together."""
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    layout = make_layout(config)
    abstract = jax.eval_shape(partial(init_state, config))
    shardings = tree_shardings(abstract, layout)
    length = config.data.sequence_length
    rows = rows_read_here(layout, config.training.microbatch_size, length)
    corpus = open_corpus(config.data)
    agree("the data", {"corpus": corpus.fingerprint})
    folder = as_path(config.run_dir)
    tokenizer = _tokenizer(config, corpus, folder, console)
    agree("the tokenizer", {"digest": tokenizer.digest})
    data = training_iterator(
        corpus,
        tokenizer,
        config.data,
        microbatch_size=config.training.microbatch_size,
        seed=config.seed,
        rows=rows.tolist(),
    )
    held_out = _held_out(config, corpus, tokenizer)
    placed = abstract_on(abstract, shardings)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    with closing(data), closing(store), use_layout(layout), catch_termination() as termination:
        state, clock = _resume(config, store, placed, data, console)
        share("run directory", lambda: _write_beginning(config, folder, tokenizer))
        if state is None:
            state = jax.jit(partial(init_state, config), out_shardings=shardings)()
        with (
            closing(open_log(folder, clock.step)) as log,
            closing(StepProfiler(config.profile, folder)) as profiler,
        ):
            read = (data, rows, held_out)
            written = (store, log, profiler, console)
            loop = TrainingLoop(config, layout, state, clock, *read, *written, termination)
            loop.run()
            done_before = log.is_evaluated and loop.clock == clock
            if loop.exit_code is None and held_out is not None and not done_before:
                loop.evaluate(limit=None)
        if loop.exit_code is not None:
            sys.exit(loop.exit_code)
    share("summary", lambda: _finish(config, folder, corpus, held_out, console))


def _write_beginning(config: PretrainConfig, folder: Path, tokenizer: Tokenizer) -> None:
    write_config(config, folder)
    tokenizer.save(folder / "tokenizer")


def make_layout(config: RunConfig, devices: Sequence[Any] | None = None) -> Layout:
    """The mesh of a run over all devices, or these, and its rule table.

    Raises:
        UserError: the mesh or the rules cannot be; the message says what could.
    """
    if unknown := sorted(set(config.rules) - set(TRAIN_RULES)):
        raise UserError(f"rules: unknown logical axis {unknown[0]!r}; known: {sorted(TRAIN_RULES)}")
    sizes, dcn = config.mesh.model_dump(exclude={"dcn"}), config.mesh.dcn.model_dump()
    changes = {name: tuple(axes) for name, axes in config.rules.items()}
    layout = Layout(make_mesh(sizes, devices, dcn=dcn), {**TRAIN_RULES, **changes})
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


def _tokenizer(config: PretrainConfig, corpus: Corpus, folder: Path, console: Console) -> Tokenizer:
    """The given tokenizer, the run's own from before, or a new one from the training documents."""
    vocab_size = config.model.vocab_size
    own = folder / "tokenizer"
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
    elif share("own tokenizer", own.is_dir):
        tokenizer = load_tokenizer(own)
    elif is_alone():
        tokenizer = _trained_tokenizer(config, corpus, console)
    else:
        share("tokenizer", lambda: _trained_tokenizer(config, corpus, console).save(own))
        tokenizer = load_tokenizer(str(own))  # in a bucket: what is there now
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, more than "
            f"model.vocab_size={vocab_size}; raise model.vocab_size"
        )
    return tokenizer


def _trained_tokenizer(config: PretrainConfig, corpus: Corpus, console: Console) -> Tokenizer:
    begin = time.monotonic()
    texts = sample_texts(corpus, config.data.tokenizer_train_bytes)
    tokenizer = train_tokenizer(texts, config.model.vocab_size)
    seconds = time.monotonic() - begin
    say(console, f"tokenizer: {tokenizer.vocab_size:,} entries, trained in {seconds:.1f} s")
    return tokenizer


def _held_out(config: PretrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> HeldOutRows | None:
    if config.data.held_out_fraction == 0:
        return None
    return held_out_rows(corpus, tokenizer, config.data.sequence_length)


def _resume(
    config: PretrainConfig,
    store: CheckpointStore,
    placed: TrainState,
    data: TrainingIterator,
    console: Console,
) -> tuple[TrainState | None, Clock]:
    """State and place of the newest sound checkpoint; None and the beginning when there is none."""
    restored = store.restore(placed)
    if restored is None:
        return None, Clock()
    step, state, extra = restored
    saved, wanted = extra["model"], config.model.model_dump()
    for key in wanted:
        if saved.get(key) != wanted[key]:
            raise UserError(
                f"{config.run_dir}: holds a checkpoint of another model: {key} was "
                f"{saved.get(key)}, is {wanted[key]}; restore the setting or choose another run_dir"
            )
    data.set_state(extra["data"])
    say(console, f"resuming {config.run_dir} at step {step:,}")
    return state, Clock(step, extra["tokens"])


def _finish(
    config: PretrainConfig,
    folder: Path,
    corpus: Corpus,
    held_out: HeldOutRows | None,
    console: Console,
) -> None:
    """Picture, summary file and table of a run that has seen all its tokens."""
    records = read_records(folder)
    title = f"{folder.name}: {records[-1]['tokens'] / 1e6:,.2f}M tokens"
    draw_run(records, folder / "training.png", title)
    summary = summary_of(config, records, corpus if held_out is not None else None)
    write_whole(folder / "summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
    show_summary(summary, console)
    say(console, f"run directory: {folder}")
