"""Held-out evaluation: rows that predict every token once, and what compressors reach."""

from __future__ import annotations

import logging
import lzma
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsjax.data.packing import best_fit
from dsjax.data.sources import Corpus
from dsjax.data.tokenizer import EncodingError, Tokenizer
from dsjax.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """The held-out documents as rows, in a fixed random order: the first few are a fair sample.

    `scored[i, t]` says that what position t of row i predicts, token t + 1, counts. Every token of
    every document counts once, its eos too, its bos not. Segment 0 is padding. `num_bytes` is
    the size of all documents in UTF-8.
    """

    tokens: Int32[np.ndarray, "N S"]
    segment_ids: Int32[np.ndarray, "N S"]
    scored: Bool[np.ndarray, "N S"]
    num_bytes: int

    def bits_per_byte(self, nats: float) -> float:
        """The score, given the sum of -log p over all scored predictions of all rows."""
        return nats / math.log(2) / self.num_bytes


class _Window(NamedTuple):
    ids: Int32[np.ndarray, " N"]
    first_scored: int
    """The first position whose prediction counts; all later ones count, but the window's last."""


def held_out_rows(corpus: Corpus, tokenizer: Tokenizer, sequence_length: int) -> HeldOutRows:
    """Cut the held-out documents into rows of `sequence_length`.

    A long document becomes windows that overlap by half a row, the last one aligned with its end:
    but for its first window, every token is predicted with at least half a row to its left. Short
    documents share rows.
    """
    windows: list[_Window] = []
    num_bytes = 0
    for text in corpus.held_out_texts():
        try:
            ids = tokenizer.encode(text)
        except EncodingError as error:
            logger.warning("left out: a document that begins with %r: %s", text[:40], error)
            continue
        num_bytes += len(text.encode())
        windows += _windows(tokenizer.document(ids), sequence_length)
    if not windows:
        raise UserError("none of the held-out documents can be encoded; use another tokenizer")
    rows = best_fit([len(window.ids) for window in windows], sequence_length)
    np.random.default_rng(0).shuffle(rows)
    shape = (len(rows), sequence_length)
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    scored = np.zeros(shape, bool)
    for row, members in enumerate(rows):
        begin = 0
        for segment, member in enumerate(members, start=1):
            window = windows[member]
            end = begin + len(window.ids)
            tokens[row, begin:end] = window.ids
            segment_ids[row, begin:end] = segment
            scored[row, begin + window.first_scored : end - 1] = True
            begin = end
    return HeldOutRows(tokens, segment_ids, scored, num_bytes)


def _windows(ids: Int32[np.ndarray, " N"], length: int) -> Iterator[_Window]:
    """Cover one document; each prediction counts in the first window that makes it."""
    stride = length // 2
    last = max(0, len(ids) - length)
    done = 0  # predictions made so far: of the tokens 1 to `done`
    for begin in [*range(0, last, stride), last]:
        window = ids[begin : begin + length]
        yield _Window(window, first_scored=done - begin)
        done = begin + len(window) - 1


def compression_baselines(corpus: Corpus) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9e need for the held-out documents as one stream.

    They start knowing nothing, the model has read the training set: a low bar and a higher one.
    """
    # wbits 31 is gzip's own header and trailer around zlib's stream.
    gzip, xz = zlib.compressobj(9, wbits=31), lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    plain_size = gzip_size = xz_size = 0
    for text in corpus.held_out_texts():
        data = text.encode()
        plain_size += len(data)
        gzip_size += len(gzip.compress(data))
        xz_size += len(xz.compress(data))
    gzip_size += len(gzip.flush())
    xz_size += len(xz.flush())
    return {"gzip -9": 8 * gzip_size / plain_size, "xz -9e": 8 * xz_size / plain_size}
