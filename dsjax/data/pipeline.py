"""The iterator that training reads: endless, mixed, by rows, exactly resumable."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Int32

from dsjax.config import DataConfig
from dsjax.data.batches import Batches
from dsjax.data.fim import fill_in_the_middle, fim_ids
from dsjax.data.packing import PackedRows, Row
from dsjax.data.shuffle import ShuffledDocuments
from dsjax.data.sources import Corpus, Selection
from dsjax.data.tokenizer import EncodingError, Tokenizer
from dsjax.errors import UserError
from dsjax.places import ahead

_AHEAD = 64
"""Microbatches made before they are asked for: a shuffle window is filled while these are used."""


MAX_FAILED = 1000
"""Documents in a row that may fail to be encoded before the run ends."""

logger = logging.getLogger(__name__)


class Batch(TypedDict):
    """The rows of one microbatch. Segments count from 1 in every row and bound attention."""

    tokens: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]


def training_iterator(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    microbatch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> TrainingIterator:
    """Read `corpus.train` for ever: of every microbatch of `microbatch_size` rows, `rows`, or all.

    What row r of the n-th microbatch is depends on the seed, the sizes and `config.streams`, not on
    who reads it: processes that read some rows each, whatever their number, together read what a
    single one does, and every document comes once.

    Each source is shuffled anew every epoch; of the documents that result, stream s of n takes
    every n-th from the s-th on, and gives every microbatch its s-th n-th of rows. Only the streams
    of `rows` are read. Documents become bos, tokens, eos, a `fim_rate` of them with the middle
    last, and are packed per source. The rows of a long document follow one another, and would make
    batch after batch of a single document: they are shuffled within windows. Sources are then mixed
    row by row, so that a source's weight is its share of the tokens (to one percent of itself),
    whatever its documents' lengths.

    Raises `UserError` when the tokenizer lacks a token that is needed.
    """
    tokenizer.document([])  # an error of the tokenizer is better now than in a thread
    if config.fim_rate > 0:
        fim_ids(tokenizer)
    each = microbatch_size // config.streams
    rows = range(microbatch_size) if rows is None else rows
    seeds = np.random.SeedSequence(seed).spawn(len(corpus.train))
    streams = {
        stream: _batches(corpus, tokenizer, config, seeds, stream, each)
        for stream in sorted({row // each for row in rows})
    }
    identity = {
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.digest,
        "sequence_length": config.sequence_length,
        "fim_rate": config.fim_rate,
        "shuffle_window": config.shuffle_window,
        "seed": seed,
        "streams": config.streams,
    }
    return TrainingIterator(streams, [divmod(row, each) for row in rows], identity)


class TrainingIterator(Batches):
    """Microbatches out of streams, each of which is read ahead by a thread."""

    def __init__(
        self,
        streams: dict[int, grain.DatasetIterator[Batch]],
        rows: list[tuple[int, int]],
        identity: dict[str, Any],
    ):
        """Every batch is made of `rows`: of which stream, and which of the rows that it gives."""
        super().__init__(identity, {"tokens": np.int32, "segment_ids": np.int32})
        self._streams = streams
        self._rows = rows

    def __next__(self) -> dict[str, np.ndarray]:
        batches = {stream: next(batches) for stream, batches in self._streams.items()}
        return {
            name: np.stack([batches[stream][name][row] for stream, row in self._rows])
            for name in self.fields
        }

    def position(self) -> dict[str, Any]:
        """Of each stream that is read here."""
        return {str(stream): batches.get_state() for stream, batches in self._streams.items()}

    def move_to(self, position: dict[str, Any]) -> None:
        """Go on with every stream."""
        for stream, batches in self._streams.items():
            batches.set_state(position[str(stream)])

    def close(self) -> None:
        """Stop reading ahead."""
        for batches in self._streams.values():
            batches.close()


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


def _batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DataConfig,
    seeds: list[np.random.SeedSequence],
    stream: int,
    rows: int,
) -> grain.DatasetIterator[Batch]:
    """One stream, so many rows at a time, read ahead by a thread."""
    shuffled = [
        _shuffled_rows(selection, tokenizer, config, seed, stream)
        for selection, seed in zip(corpus.train, seeds, strict=True)
    ]
    mixed = grain.IterDataset.mix(shuffled, [selection.weight for selection in corpus.train])
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        mixed.batch(rows), prefetch_buffer_size=_AHEAD
    )
    return iter(ahead)


def _shuffled_rows(
    selection: Selection,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: np.random.SeedSequence,
    stream: int,
) -> grain.IterDataset[Row]:
    """The endless rows of a source's documents that belong to one stream."""
    shuffle_seed, fim_seed, row_seed = seed.generate_state(3).tolist()
    documents = _encoded(selection, tokenizer, config.fim_rate, shuffle_seed, fim_seed)
    # One thread tokenizes some 500,000 tokens a second, more than a host's accelerators train on;
    # more of them only wait for a bucket's answers.
    threads = selection.documents.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16, threads))
    mine = documents[stream :: config.streams].to_iter_dataset(options)
    return grain.experimental.WindowShuffleIterDataset(
        PackedRows(mine, config.sequence_length),
        window_size=config.shuffle_window,
        seed=row_seed >> 1,  # grain adds the window's number, and takes no sum from 2^32 on
    )


def _encoded(
    selection: Selection, tokenizer: Tokenizer, fim_rate: float, shuffle_seed: int, fim_seed: int
) -> grain.MapDataset[Int32[np.ndarray, " N"]]:
    """The endless stream of a source's documents, as ids; grain gives each its random generator.

    A document that cannot be encoded is None, which is passed over, with a line that says so.
    """
    failed = 0

    def encode(text: str, random: np.random.Generator) -> Int32[np.ndarray, " N"]:
        nonlocal failed
        try:
            if random.random() < fim_rate:
                ids = fill_in_the_middle(text, tokenizer, random)
            else:
                ids = tokenizer.encode(text)
        except EncodingError as error:
            failed += 1
            if failed > MAX_FAILED:  # or a source of nothing else would be read for ever
                raise UserError(
                    f"{selection.documents.files[0].path}: more than {MAX_FAILED} documents in a "
                    f"row cannot be encoded; {error}"
                ) from None
            logger.warning("left out: a document that begins with %r: %s", text[:40], error)
            return None  # pyright: ignore[reportReturnType]
        failed = 0
        return tokenizer.document(ids)

    shuffled = ShuffledDocuments(selection, shuffle_seed)
    return shuffled.repeat().random_map(encode, seed=fim_seed)
