"""The numbers that this host needs of a model in an object store, each fetched once.

On a disk a tensor is a view, and looking at it reads it. In an object store every look would be a
request, and devices of one host look at the same tensors: so what all of them need of a parameter
is known before, fetched by many requests at a time, and looked at in memory. Beside the finished
parameters there is then one more, as it is stored, and the slice of it that is made.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from jax.sharding import Sharding

from dsjax.checkpoint.families import Tensor
from dsjax.checkpoint.safetensors import DTYPES, Entry, Stored
from dsjax.checkpoint.source import Source
from dsjax.errors import UserError
from dsjax.places import REQUESTS, WINDOW, ObjectPath

Rows = dict[tuple[int, ...], list[tuple[int, int]]]
"""Of every layer and expert, the rows that are needed: ranges that do not touch."""


@dataclass(frozen=True)
class Fetched:
    """A tensor of which some rows were fetched; the others are there and hold anything."""

    entry: Stored
    array: np.ndarray

    @property
    def file(self) -> Path:
        """Where it is stored, for messages."""
        return self.entry.file

    @property
    def dtype(self) -> str:
        """By the name that safetensors has for it."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the released files."""
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.entry.nbytes

    def read(self) -> np.ndarray:
        """All of it."""
        return self.array

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Some of its numbers, in the file's order."""
        return self.array.reshape(-1)[begin:end]


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a tensor, and of all that must be copies of it."""

    name: str
    out: np.ndarray
    start: int
    entry: Entry
    copies: tuple[tuple[str, Entry], ...]

    def fetch(self) -> None:
        data = self._read(self.entry)
        self.out[:] = np.frombuffer(data, np.uint8)
        for name, copy in self.copies:
            if self._read(copy) != data:
                raise UserError(
                    f"{copy.file}: {name} differs from {self.name}, which the MTP layer shares; "
                    "they must be the same"
                )

    def _read(self, entry: Entry) -> bytes:
        assert isinstance(entry.file, ObjectPath)
        data = entry.file.read_range(entry.start + self.start, len(self.out))
        if len(data) < len(self.out):
            raise UserError(f"{entry.file}: became shorter while it was read; fetch it again")
        return data


def fetch(
    pieces: list[Tensor], source: Source, shape: tuple[int, ...], place: Sharding
) -> Mapping[str, Stored]:
    """The tensors of one parameter, scales included, as far as this process's devices need them.

    What MTP repeats in the files is compared on the way: each host compares what it fetches.

    Raises:
        UserError: they cannot be read, or a repeat differs from what it repeats.
    """
    if not isinstance(source.folder, ObjectPath):
        return source.stored
    rows = _rows(shape, len(shape) - len(pieces[0].inner), place)
    repeats = _repeats(source)
    found: dict[str, Stored] = {}
    work: list[_Piece] = []
    for tensor in pieces:
        for begin, end, name in _ranges(tensor, source, rows):
            entry = source.stored[name]
            if not isinstance(entry, Entry):  # brought to another form as it is read
                found.setdefault(name, Fetched(entry, entry.read()))
                continue
            if name not in found:
                found[name] = Fetched(entry, np.empty(entry.shape, DTYPES[entry.dtype]))
            held = found[name].read().reshape(-1).view(np.uint8)
            copies = tuple(repeats.get(name, ()))
            for start in range(begin, end, WINDOW):
                part = held[start : min(start + WINDOW, end)]
                work.append(_Piece(name, part, start, entry, copies))
    with ThreadPoolExecutor(REQUESTS) as pool:
        jobs = [pool.submit(piece.fetch) for piece in work]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _rows(shape: tuple[int, ...], stacked: int, place: Sharding) -> Rows:
    """What the devices of this process hold, of the first dimension that is not stacked."""
    wanted: dict[tuple[int, ...], set[tuple[int, int]]] = defaultdict(set)
    for slices in place.addressable_devices_indices_map(shape).values():
        cut = [range(size)[part] for part, size in zip(slices or (), shape, strict=True)]
        for index in product(*cut[:stacked]):
            wanted[index].add((cut[stacked].start, cut[stacked].stop))
    return {index: list(_joined(sorted(ranges))) for index, ranges in wanted.items()}


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, with those that touch made one."""
    begin, end = 0, 0
    for first, last in ranges:
        if first > end:
            if end > begin:
                yield begin, end
            begin = first
        begin, end = (begin, max(end, last)) if end > begin else (first, last)
    if end > begin:
        yield begin, end


def _ranges(tensor: Tensor, source: Source, rows: Rows) -> Iterator[tuple[int, int, str]]:
    """Bytes of a tensor that are needed, and all of its scales, which are few."""
    needed = rows.get(tensor.index, [])
    size = DTYPES[source.stored[tensor.name].dtype].itemsize
    width = size * math.prod(tensor.inner[1:])
    for begin, end in needed:
        yield begin * width, end * width, tensor.name
    if needed and tensor.scale and tensor.scale[0] in source.stored:
        name = tensor.scale[0]
        yield 0, source.stored[name].nbytes, name


def _repeats(source: Source) -> dict[str, list[tuple[str, Entry]]]:
    """What the files repeat in bytes of their own, by what it repeats."""
    found: dict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for tensor in source.parts:
        if tensor.repeats:
            copy = source.stored[tensor.name]
            assert isinstance(copy, Entry)
            if copy is not source.stored[tensor.repeats]:
                found[tensor.repeats].append((tensor.name, copy))
    return found
