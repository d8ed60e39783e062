"""The header of a GGUF file, walked through before the `gguf` package believes it.

The package reads counts and lengths as they stand and makes an object of every text. Where a file
says 2^60, it reads on behind the file's end, and comes to no end itself. So all is measured here
first, and nothing is kept but places: what has a length must end within the file.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from dsjax.small_files import open_file

TEXT, LIST = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the other kinds of values, by the number that the format gives them."""

MAX_TENSORS = 100_000
MAX_FIELDS = 10_000
MAX_ITEMS = 1_000_000
"""Texts and numbers in all fields: the package makes some 700 bytes of each. Llama 3's and Qwen's
tokenizers have some 500,000: tokens, their kinds, and merges."""

MAX_DIMENSIONS = 4
"""What ggml has."""


def check_header(file: Path) -> None:
    """Measure a file's header.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no GGUF, or its fields and tensors are not within it.
    """
    with open_file(file) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    """A place in the header, and what may still be met behind it."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._place = 0
        self._left = MAX_ITEMS

    def header(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._place = 4
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3, little-endian")
        tensors, fields = self._number("Q"), self._number("Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise ValueError(f"{tensors} tensors and {fields} fields are more than any model has")
        for _ in range(fields):
            self._text()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._tensor()

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._skip(struct.calcsize(kind)))
        return value

    def _skip(self, size: int) -> int:
        """Go on by so many bytes, which must be there; where they begin."""
        place = self._place
        if size > len(self._data) - place:
            raise ValueError(f"{size} bytes from {place} on are not in it; fetch it again")
        self._place = place + size
        return place

    def _text(self) -> None:
        self._skip(self._number("Q"))

    def _value(self, kind: int) -> None:
        if kind == LIST:
            kind, count = self._number("I"), self._number("Q")
            if count > self._left:
                raise ValueError(f"a list of {count}, where all have at most {MAX_ITEMS}")
            self._left -= count
        else:
            count = 1
        if kind == TEXT:
            for _ in range(count):
                self._text()
        elif kind in WIDTHS:
            self._skip(count * WIDTHS[kind])
        else:
            raise ValueError(f"a value of kind {kind} at {self._place} is not known")

    def _tensor(self) -> None:
        self._text()
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions; ggml has {MAX_DIMENSIONS}")
        numbers = 1
        for _ in range(dimensions):
            numbers *= self._number("Q")
        # No block holds more numbers in a byte than one of 256 in 50: 2^63 are in no file.
        if numbers > 8 * len(self._data):
            raise ValueError(f"a tensor of {numbers} numbers is not within {len(self._data)} bytes")
        self._skip(12)
