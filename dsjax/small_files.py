"""Files that are small unless something is wrong: read within bounds, written whole; real JSON.

What lies beside weights comes from strangers, or from half a download. A pipe never ends, a device
has no size, and a text of brackets takes twenty times its size once it is parsed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import Any, NoReturn

from dsjax.errors import UserError, one_line
from dsjax.places import ObjectPath, ObjectStoreError

MAX_JSON_BYTES = 20_000_000
"""What is parsed at once: at its worst some 500 MB of objects. DeepSeek-R1's index has 9 MB,
for 91,991 tensors, and its largest header 80 kB."""

MAX_BYTES = 100_000_000
"""What is read at once; tokenizers take a tenth of it."""


def open_file(file: Path) -> BufferedReader:
    """A file for reading; what is no file is not opened: to open a pipe is to wait for its writer.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    if not S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(file))
    return file.open("rb")


def read_small(file: Path, limit: int = MAX_BYTES) -> bytes:
    """All of a file.

    Raises:
        UserError: it cannot be read, is no regular file, or has more than `limit` bytes.
    """
    try:
        with open_file(file) as stream:
            size = file.stat().st_size
            data = stream.read(size) if size <= limit else b""
    except ObjectStoreError:
        raise  # it says all that is known, in one line
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if size > limit:
        raise UserError(f"{file}: has {size} bytes, the limit is {limit}; it is damaged")
    return data


def write_whole(file: Path, data: bytes | Iterable[bytes]) -> None:
    """Make or replace a file, or an object, in one piece: no one finds half of it.

    Parts are written to a disk as they come.

    Raises:
        UserError: it cannot be written.
    """
    parts = [data] if isinstance(data, bytes) else data
    if isinstance(file, ObjectPath):
        file.write_bytes(b"".join(parts))
        return
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            stream.writelines(parts)
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: as `read_small` and `parse_json`.
    """
    return parse_json(read_small(file, MAX_JSON_BYTES), str(file))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The same; a file that is not there says nothing."""
    return read_json(path) if path.is_file() else {}


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """One JSON object of UTF-8 bytes, in which no key stands twice and every number is one.

    Raises:
        UserError: it is anything else.
    """
    try:
        tree = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not the JSON expected here: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(tree).__name__}")
    return tree


def is_text(value: Any) -> bool:
    """Whether this is text in whole characters: JSON can spell half a one, and UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands twice")
    return tree


def _refuse_constant(name: str) -> NoReturn:
    """Of NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not JSON")
