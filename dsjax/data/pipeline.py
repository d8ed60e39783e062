"""The iterator that training reads: endless, mixed, sharded by process, exactly resumable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Int32

from dsjax.config import DataConfig
from dsjax.data.fim import fill_in_the_middle, fim_ids
from dsjax.data.packing import PackedRows, Row
from dsjax.data.shuffle import ShuffledDocuments
from dsjax.data.sources import Corpus, Selection
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError
from dsjax.places import ahead

_AHEAD = 64
"""Microbatches made before they are asked for: a shuffle window is filled while these are used."""


class Batch(TypedDict):
    """One microbatch of this process. Segments count from 1 in every row and bound attention."""

    tokens: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]


def training_iterator(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    microbatch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingIterator:
    """Read `corpus.train` for ever, `microbatch_size` rows at a time for this process.

    Each source is shuffled anew every epoch; of the stream that results, process p of n takes every
    n-th document from the p-th on, so that the processes' shares are disjoint and together
    complete. Documents become bos, tokens, eos, a `fim_rate` of them with the middle last, and are
    packed per source. The rows of a long document follow one another, and would make batch after
    batch of a single document: they are shuffled within windows. Sources are then mixed row by
    row, so that a source's weight is its share of the tokens (to one percent of itself), whatever
    its documents' lengths.

    Raises `UserError` when the tokenizer lacks a token that is needed.
    """
    tokenizer.document([])  # an error of the tokenizer is better now than in a thread
    if config.fim_rate > 0:
        fim_ids(tokenizer)
    seeds = np.random.SeedSequence(seed).spawn(len(corpus.train))
    rows = [
        _shuffled_rows(selection, tokenizer, config, source_seed, process_index, process_count)
        for selection, source_seed in zip(corpus.train, seeds, strict=True)
    ]
    mixed = grain.IterDataset.mix(rows, [selection.weight for selection in corpus.train])
    batches = grain.experimental.ThreadPrefetchIterDataset(
        mixed.batch(microbatch_size), prefetch_buffer_size=_AHEAD
    )
    identity = {
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.digest,
        "sequence_length": config.sequence_length,
        "fim_rate": config.fim_rate,
        "shuffle_window": config.shuffle_window,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    return TrainingIterator(iter(batches), identity)


class TrainingIterator(grain.DatasetIterator[Batch]):
    """Batches whose position can be saved as JSON, and is only taken back for the same data.

    grain accepts any iterator's position for any other; here the position carries what it is a
    position in.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], identity: dict[str, Any]):
        super().__init__(batches)
        self._batches = batches
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position before the next batch, and the identity of the data; fit for JSON."""
        return {"data": dict(self._identity), "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was taken; `UserError` when that was in other data."""
        for key, mine in self._identity.items():
            saved = state["data"][key]
            if saved != mine:
                raise UserError(
                    f"cannot resume from a position in other data: {key} was {saved}, is {mine}; "
                    "restore the data and settings of the saved run, or start another run"
                )
        self._batches.set_state(state["position"])


def sample_texts(corpus: Corpus, max_bytes: int) -> Iterator[str]:
    """Training documents for a tokenizer: at random, from each source by its weight.

    Stops a source at the document that brings it past its share of `max_bytes`, or at its end.
    The same corpus gives the same documents.
    """
    total = sum(selection.weight for selection in corpus.train)
    for selection in corpus.train:
        left = max_bytes * selection.weight / total
        shuffled = ShuffledDocuments(selection, seed=0)
        place = selection.documents.files[0].path
        for text in ahead(shuffled.__getitem__, range(len(shuffled)), place):
            if left <= 0:
                break
            left -= len(text.encode())
            yield text


def _shuffled_rows(
    selection: Selection,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: np.random.SeedSequence,
    process_index: int,
    process_count: int,
) -> grain.IterDataset[Row]:
    """The endless rows of a source's documents that belong to one process."""
    shuffle_seed, fim_seed, row_seed = seed.generate_state(3).tolist()
    documents = _encoded(selection, tokenizer, config.fim_rate, shuffle_seed, fim_seed)
    # One thread tokenizes some 500,000 tokens a second, more than a host's accelerators train on;
    # more of them only wait for a bucket's answers.
    threads = selection.documents.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16, threads))
    mine = documents[process_index::process_count].to_iter_dataset(options)
    return grain.experimental.WindowShuffleIterDataset(
        PackedRows(mine, config.sequence_length),
        window_size=config.shuffle_window,
        seed=row_seed >> 1,  # grain adds the window's number, and takes no sum from 2^32 on
    )


def _encoded(
    selection: Selection, tokenizer: Tokenizer, fim_rate: float, shuffle_seed: int, fim_seed: int
) -> grain.MapDataset[Int32[np.ndarray, " N"]]:
    """The endless stream of a source's documents, as ids; grain gives each its random generator."""

    def encode(text: str, random: np.random.Generator) -> Int32[np.ndarray, " N"]:
        if random.random() < fim_rate:
            return tokenizer.document(fill_in_the_middle(text, tokenizer, random))
        return tokenizer.document(tokenizer.encode(text))

    shuffled = ShuffledDocuments(selection, shuffle_seed)
    return shuffled.repeat().random_map(encode, seed=fim_seed)
