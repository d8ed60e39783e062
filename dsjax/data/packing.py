"""Rows of one length out of documents of any length: cut without padding, or whole with some."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Int32


class Row(TypedDict):
    """Tokens of consecutive documents, and which document each belongs to, counted from 1."""

    tokens: Int32[np.ndarray, " S"]
    segment_ids: Int32[np.ndarray, " S"]


class PackedRows(grain.IterDataset[Row]):
    """Concatenate endless documents of ids and cut the stream every `sequence_length` tokens.

    A document that a cut divides goes on in the next row, as a segment of its own. The iterator's
    state is the position of the document at the cut and how much of it was used, plain enough for
    JSON. (grain's ConcatThenSplitIterDataset keeps tuples in its state; after JSON they are lists,
    it takes them for another thing, and a document is lost: grain 0.2.18.)
    """

    def __init__(self, documents: grain.IterDataset[Int32[np.ndarray, " N"]], sequence_length: int):
        super().__init__(documents)
        self._documents = documents
        self._sequence_length = sequence_length

    def __iter__(self) -> grain.DatasetIterator[Row]:
        return _PackedRowsIterator(iter(self._documents), self._sequence_length)


class _PackedRowsIterator(grain.DatasetIterator[Row]):
    def __init__(self, documents: grain.DatasetIterator[np.ndarray], sequence_length: int):
        super().__init__(documents)
        self._documents = documents
        self._sequence_length = sequence_length
        self._before_document = documents.get_state()
        self._document = np.empty(0, np.int32)
        self._used = 0

    def __next__(self) -> Row:
        tokens = np.empty(self._sequence_length, np.int32)
        segment_ids = np.empty(self._sequence_length, np.int32)
        filled, segment = 0, 0
        while filled < self._sequence_length:
            if self._used == len(self._document):
                self._before_document = self._documents.get_state()
                self._document, self._used = next(self._documents), 0
            taken = self._document[self._used : self._used + self._sequence_length - filled]
            place = slice(filled, filled + len(taken))
            segment += 1
            tokens[place] = taken
            segment_ids[place] = segment
            filled += len(taken)
            self._used += len(taken)
        return Row(tokens=tokens, segment_ids=segment_ids)

    def get_state(self) -> dict[str, Any]:
        return {"before_document": self._before_document, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before_document = state["before_document"]
        self._used = state["used"]
        self._documents.set_state(self._before_document)
        self._document = next(self._documents) if self._used else np.empty(0, np.int32)


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best fit, longest first: the members of each row, each whole; none may be longer than a row.

    How many rows that takes depends on the lengths alone, not on their order.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # what is left of a row, and its number; ascending
    for member in np.argsort(lengths, kind="stable")[::-1].tolist():
        length = lengths[member]
        at = bisect_left(open_rows, (length, 0))
        if at < len(open_rows):
            left, row = open_rows.pop(at)
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(member)
        if left > length:
            insort(open_rows, (left - length, row))
    return rows
