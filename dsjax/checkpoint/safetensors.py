"""Reading safetensors: headers that are believed only after they are checked, tensors as views.

A file is eight bytes of length, a JSON header of that length, and the tensors' bytes. What a header
says decides what is read from where, so everything is checked against the file's size before it is
used. The format's own library accepts duplicate keys, the last one silently winning; this does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ml_dtypes
import numpy as np

from dsjax.errors import UserError
from dsjax.places import ObjectPath, ObjectStoreError, each
from dsjax.small_files import MAX_JSON_BYTES, is_text, open_file, parse_json, read_json

Tensor = TypeVar("Tensor")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

MAX_RANK = 64
"""Dimensions that an array of numpy can have."""

COMPARED = 1 << 20
"""Numbers that are compared at a time."""

MAX_NUMBERS = 1 << 58
"""In one tensor: the format's library counts their bits in 64 bits."""

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


class InParts:
    """What follows, for a stored tensor, from its `shape`, its `dtype` and `read_flat`."""

    __slots__ = ()
    dtype: Any
    shape: Any

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """All of it."""
        return self.read_flat(0, math.prod(self.shape)).reshape(self.shape)

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end`, in the order of the released file."""
        raise NotImplementedError


class Stored(Protocol):
    """A tensor where it is stored."""

    @property
    def file(self) -> Path:
        """Where, for messages."""
        ...

    @property
    def dtype(self) -> str:
        """By the name that safetensors has for it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the released files."""
        ...

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        ...

    def read(self) -> np.ndarray:
        """All of it."""
        ...

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Some of its numbers, in the file's order."""
        ...


@dataclass(frozen=True, slots=True)
class Entry(InParts):
    """One tensor as its header describes it; `start` is counted in bytes from the file's begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The tensor as a read-only view of the file: only what is looked at enters memory."""
        if isinstance(self.file, ObjectPath):
            return InParts.read(self)
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape).view(
            np.ndarray
        )

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end`, in the file's order, in memory of their own.

        A view would count the file's pages as this process's memory; a stream must not.
        """
        size = DTYPES[self.dtype].itemsize
        start, length = self.start + begin * size, (end - begin) * size
        if isinstance(self.file, ObjectPath):
            data = self.file.read_ahead(start, length, self.start + self.nbytes)
        else:
            data = self._pread(start, length)
        if len(data) < length:
            raise UserError(f"{self.file}: became shorter while it was read; fetch it again")
        return np.frombuffer(data, DTYPES[self.dtype])

    def _pread(self, start: int, length: int) -> bytes:
        with self.file.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, start)
            # What will probably be asked for next is fetched while this is worked on.
            os.posix_fadvise(file.fileno(), start + length, length, os.POSIX_FADV_WILLNEED)
        return data


def same_numbers(one: Any, other: Any) -> bool:
    """Whether two stored tensors are equal bit by bit; they are read a few megabytes at a time."""
    if one is other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = math.prod(one.shape)
    return all(
        one.read_flat(begin, end).tobytes() == other.read_flat(begin, end).tobytes()
        for begin, end in ((at, min(at + COMPARED, size)) for at in range(0, size, COMPARED))
    )


def read_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder that holds `model.safetensors`, or shards and their index.

    Raises:
        UserError: there are no weights, a header is damaged, the index and the headers disagree,
            or a shard's name leads out of the folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise UserError(f"{folder}: has both {SINGLE} and {INDEX}; remove the one that is stale")
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise UserError(f"{folder}: no weights; expected {SINGLE} or {INDEX} with its shards")
    return read_shards(folder, INDEX, read_header)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file, by name.

    Raises:
        UserError: the file cannot be read, is truncated, or its header is not what the format
            promises: unique names, known dtypes, and byte ranges that fit the shapes and cover the
            file from the header to its end without gap or overlap.
    """
    try:
        with open_file(file) as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise UserError(
                    f"{file}: its header claims {length} bytes, the limit is {MAX_JSON_BYTES}; "
                    "this is no safetensors file, or a damaged one"
                )
            if size < 8 + length:
                raise UserError(
                    f"{file}: truncated: {size} bytes, but its header alone takes {8 + length}; "
                    "fetch it again"
                )
            header = parse_json(stream.read(length), str(file))
    except ObjectStoreError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    _check_metadata(header.pop("__metadata__", {}), file)
    entries, ranges = {}, []
    for name, described in header.items():
        if not name.isprintable():
            raise UserError(f"{file}: {name!r}: a tensor's name is printable text")
        dtype, shape, begin, end = _parse_entry(described, f"{file}: {name}")
        entries[name] = Entry(file, dtype, shape, 8 + length + begin)
        ranges.append((begin, end, name))
    _check_ranges(ranges, size - 8 - length, file)
    return entries


def _check_metadata(metadata: Any, file: Path) -> None:
    """Text by names, which we have no use for; but the format promises it."""
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(map(is_text, texts)):
        raise UserError(f"{file}: its __metadata__ is no object of texts; fetch it again")


def _parse_entry(described: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry, consistent with each other."""
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: a tensor is described by dtype, shape and data_offsets")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _is_shape(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        # They are cut before they are spelled: a list may have a million numbers.
        short = [
            repr(value[:9] if isinstance(value, list) else value) for value in (shape, offsets)
        ]
        raise UserError(f"{where}: shape {short[0]} or data_offsets {short[1]} are not sizes")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise UserError(
            f"{where}: {dtype} of shape {shape} takes {needed} bytes, but its data_offsets "
            f"{offsets} hold {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _is_shape(values: Any) -> bool:
    """Whether these are sizes of an array; also if one of them is 0, the others are bounded."""
    return _are_sizes(values) and math.prod(n or 1 for n in values) < MAX_NUMBERS


def _are_sizes(values: Any) -> bool:
    """Whether these are some sizes. A million of them would take hours to multiply."""
    return (
        isinstance(values, list)
        and len(values) <= MAX_RANK
        and all(type(n) is int and 0 <= n < 1 << 63 for n in values)
    )


def _check_ranges(ranges: list[tuple[int, int, str]], size: int, file: Path) -> None:
    """Byte ranges must follow one another from 0 to `size`: nothing twice, nothing unnamed."""
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin < expected:
            raise UserError(f"{file}: {name} begins at byte {begin}, inside the tensor before it")
        if begin > expected:
            raise UserError(
                f"{file}: bytes {expected} to {begin}, before {name}, belong to nothing"
            )
        expected = end
    if expected > size:
        raise UserError(
            f"{file}: truncated: its tensors take {expected} bytes, the file has {size}; "
            "fetch it again"
        )
    if expected < size:
        raise UserError(f"{file}: {size - expected} bytes at its end belong to no tensor")


def _read_index(index: Path) -> dict[str, set[str]]:
    """The tensors that the index puts in each shard; a shard is a plain name in this folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected a weight_map from tensor names to file names")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not _is_plain(shard):
            raise UserError(
                f"{index}: {name} lies in {shard!r}; a shard is the name of a file in this folder"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _is_plain(name: Any) -> bool:
    """Whether this is the name of a file, and leads nowhere."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not set(name) & set("/\\")
    )


def read_shards(
    folder: Path, index: str, read: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `read` makes of all shards, which must hold the very tensors that `index` puts there.

    Raises:
        UserError: they do not; or a shard's name leads out of the folder.
    """
    shards = _read_index(folder / index)
    entries: dict[str, Tensor] = {}
    names = sorted(shards)
    headers = each(read, [folder / shard for shard in names], folder)
    for shard, header in zip(names, headers, strict=True):
        promised = shards[shard]
        if absent := sorted(promised - header.keys()):
            raise UserError(
                f"{folder / index}: says that {shard} holds {absent[0]}, but it does not "
                f"({len(absent)} such tensors)"
            )
        if unlisted := sorted(header.keys() - promised):
            raise UserError(
                f"{folder / shard}: holds {unlisted[0]}, but {index} does not say so "
                f"({len(unlisted)} such tensors)"
            )
        entries |= header
    return entries
