"""Text files, whole or by lines, the same for every task.

Names that end with .gz or .zst say that a file is compressed. A byte order mark at the beginning is
no part of the text. Damage is named by the line or byte where reading ended. Lines end at a line
feed alone: the other line ends of Unicode may stand inside a JSON string.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from dsjax.data.files import open_path
from dsjax.errors import UserError, one_line
from dsjax.places import ObjectPath

COMPRESSED = (".gz", ".zst")
"""Ends of the names of files that are decompressed while they are read."""

MAX_BYTES = 2**31
"""Of one file that is held in memory, decompressed. LiveCodeBench's largest has 1.3 GB."""

MAX_LINE = 2**30
"""Bytes of a line."""

_CHUNK = 1 << 20

_DAMAGE = OSError, EOFError, zlib.error
"""What reading raises where a file is damaged, or its disk."""


Line = tuple[int, int, bytes]
"""Its number, from 1, blank ones counted; the bytes before it, once decompressed, a byte order mark
counted; and what it holds. A plain tuple: files have a million a second of them."""


def is_compressed(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.name.lower().endswith(COMPRESSED)


def read_lines(path: Path) -> Iterator[Line]:
    """Read a file line by line, one in memory at a time.

    Raises:
        UserError: the file cannot be read, is damaged, or has a line of more than `MAX_LINE` bytes.
    """
    number = at = 0
    with _open_decompressed(path) as stream:
        try:
            for data in iter(partial(stream.readline, MAX_LINE + 1), b""):
                number += 1
                if len(data) > MAX_LINE:
                    raise UserError(f"{path}:{number}: the line has more than {MAX_LINE:,} bytes")
                if number == 1 and data.startswith(codecs.BOM_UTF8):
                    at = len(codecs.BOM_UTF8)
                    data = data[at:]
                yield number, at, data
                at += len(data)
        except _DAMAGE as error:
            raise _damaged(error, f"{path}:{number + 1}") from None


def read_bytes(path: Path) -> bytes:
    """Read a whole file, decompressed, with its byte order mark.

    Raises:
        UserError: the file cannot be read, is damaged, or has more than `MAX_BYTES` bytes.
    """
    parts, size = [], 0
    # Of an object all is fetched by one request.
    raw = io.BytesIO(path.read_bytes()) if isinstance(path, ObjectPath) else None
    with _open_decompressed(path, raw) as stream:
        try:
            while part := stream.read(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes; split it")
        except _DAMAGE as error:
            raise _damaged(error, f"{path}: byte {size}") from None
    return b"".join(parts)


def read_text(path: Path) -> str:
    """Read a whole file as text, without its byte order mark.

    Raises:
        UserError: as `read_bytes`, or the file is not UTF-8.
    """
    return decode(read_bytes(path), str(path)).removeprefix("\ufeff")


def decode(data: bytes, where: str, begin: int = 0) -> str:
    """Decode UTF-8.

    Args:
        data: the bytes.
        where: file, or file and line, for the message.
        begin: bytes of the file before them.

    Raises:
        UserError: it is not UTF-8; the message names the byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {begin + error.start} is 0x{data[error.start]:02x}, which is not "
            "UTF-8; convert the file to UTF-8 or leave it out"
        ) from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError: it is something else; the message says what was found.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}")
    return found


@contextmanager
def _open_decompressed(path: Path, raw: BinaryIO | None = None) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        try:
            stream: Any = stack.enter_context(raw or open_path(path))
        except UserError:
            raise  # an object store's error is one line already
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        name = path.name.lower()
        if name.endswith(".gz"):
            stream = stack.enter_context(gzip.open(stream))
        elif name.endswith(".zst"):
            stream = stack.enter_context(_open_zstd(stream, path))
        yield stream


def _open_zstd(stream: BinaryIO, path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{path}: reading .zst needs pyarrow; pip install 'dsjax[data]', or decompress it"
        ) from None
    return io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(stream, "zstd")), _CHUNK)


def _damaged(error: Exception, where: str) -> UserError:
    if isinstance(error, UserError):  # an object store's, which says all that is known
        return error
    return UserError(f"{where}: damaged from here on: {one_line(error)}")
