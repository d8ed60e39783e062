"""A new order of the documents in every epoch, computed from the seed, never stored."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int, UInt32

from dsjax.data.sources import Selection

_ROUNDS = 4


class _Epoch(NamedTuple):
    order: Int[np.ndarray, " N"]
    """The block that comes at each rank."""
    ends: Int[np.ndarray, " N"]
    """Documents up to and with the block at each rank."""
    seeds: UInt32[np.ndarray, " N"]
    """Of the order within the block at each rank."""


class ShuffledDocuments(grain.MapDataset[str]):
    """Element i is a document's text; indices beyond the length are later epochs.

    Every epoch is a permutation of its own. Documents that are read from disk together (a row
    group of parquet) stay together: blocks come in random order, and so do the documents of a
    block. Where a format seeks freely all documents are one block.
    """

    def __init__(self, selection: Selection, seed: int):
        super().__init__()
        self._selection = selection
        self._seed = seed
        ends = np.searchsorted(selection.indices, np.cumsum(selection.documents.blocks))
        begins = np.concatenate([[0], ends[:-1]])
        self._begins = begins[ends > begins]
        self._sizes = (ends - begins)[ends > begins]
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __len__(self) -> int:
        return len(self._selection)

    def __getitem__(self, index: int) -> str:
        number, position = divmod(index, len(self))
        epoch = self._epoch(number)
        rank = int(np.searchsorted(epoch.ends, position, side="right"))
        block = epoch.order[rank]
        size = int(self._sizes[block])
        within = position - int(epoch.ends[rank]) + size
        place = index_shuffle(within, size - 1, seed=int(epoch.seeds[rank]), rounds=_ROUNDS)
        return self._selection[int(self._begins[block]) + place]

    def _draw_epoch(self, number: int) -> _Epoch:
        blocks = len(self._sizes)
        seeds = np.random.SeedSequence([self._seed, number]).generate_state(blocks + 1)
        last = int(seeds[-1])
        order = np.array(
            [index_shuffle(rank, blocks - 1, seed=last, rounds=_ROUNDS) for rank in range(blocks)]
        )
        return _Epoch(order, np.cumsum(self._sizes[order]), seeds[:-1])
