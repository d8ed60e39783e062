"""Pre-training from a configuration to a finished run directory (`dsjax.training.run`)."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from dsjax.config import PretrainConfig
from dsjax.data.held_out import HeldOutRows, compression_baselines, held_out_rows
from dsjax.data.pipeline import sample_texts, training_iterator
from dsjax.data.sources import Corpus, open_corpus
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings
from dsjax.places import as_path
from dsjax.training.progress import say
from dsjax.training.run import Run, make_layout, rows_read_here, together, train
from dsjax.training.step import init_state
from sharding.distributed import agree, is_alone, share


def pretrain(config: PretrainConfig, console: Console) -> None:
    """Train, or go on training, until `training.tokens` are seen; then evaluate and summarize.

    With several processes all call this on the same configuration, and share the run directory.
    The first one writes and prints; each writes its part of the checkpoints. `train` says how it
    leaves.

    Raises:
        UserError: the configuration, the data, the tokenizer or the run directory cannot be used,
            by any of the processes. Nothing has been written then, but a tokenizer that was trained
            for several processes.
    """
    with together(config, console) as console:
        _pretrain(config, console)


def _pretrain(config: PretrainConfig, console: Console) -> None:
    """`pretrain`, once all processes have come together."""
    layout = make_layout(config)
    abstract = jax.eval_shape(partial(init_state, config))
    shardings = tree_shardings(abstract, layout)
    length = config.data.sequence_length
    rows = rows_read_here(layout, config.training.microbatch_size, length)
    corpus = open_corpus(config.data)
    agree("the data", {"corpus": corpus.fingerprint})
    tokenizer = _tokenizer(config, corpus, as_path(config.run_dir), console)
    agree("the tokenizer", {"digest": tokenizer.digest})
    data = training_iterator(
        corpus,
        tokenizer,
        config.data,
        microbatch_size=config.training.microbatch_size,
        seed=config.seed,
        rows=rows.tolist(),
    )
    run = Run(
        config=config,
        settings=config,
        layout=layout,
        tokens=config.training.tokens,
        rows=rows,
        data=data,
        held_out=_held_out(config, corpus, tokenizer),
        abstract=abstract,
        begin=lambda: jax.jit(partial(init_state, config), out_shardings=shardings)(),
        complete=lambda state: state,
        finish=lambda folder: None,
        write_files=lambda folder: tokenizer.save(folder / "tokenizer"),
        compressors=partial(compression_baselines, corpus),
    )
    train(run, console)


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
