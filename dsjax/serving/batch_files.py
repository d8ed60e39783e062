"""The two files of a batch: lines read when they are needed, and records that outlive a kill.

Records are appended to OUTPUT.partial, one line each, flushed before the next; when all are there
the file is renamed to OUTPUT. Each begins with an id that says what it answers: a fingerprint of
the input, and a digest of the custom_id (or of the line's number, where that is all there is). So
the records themselves say what is done and of what, and nothing else has to be kept in step.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from dsjax.errors import UserError
from dsjax.serving.json_body import foreign_encoding

MAX_LINE = 2**26
"""Bytes of a line; a longer one is refused, and never held in memory."""

_BLANK = codecs.BOM_UTF8 + b" \t\r\n\v\f"
"""Bytes of a blank line. Windows tools begin a file with a byte order mark."""

_RECORD = re.compile(rb'\{"id":"batch_req_([0-9a-f]{16})_([0-9a-f]{32})"')


class Line(NamedTuple):
    """A line of the input that is not blank."""

    number: int
    """From 1, blank lines counted."""
    data: bytes | None
    """None: it is too long."""


class Survey(NamedTuple):
    """What is known of an input before any of it is done."""

    source: Path
    fingerprint: str
    lines: int
    """That are not blank."""


def read_lines(source: Path) -> Iterator[Line]:
    """The input's lines, one in memory at a time."""
    with source.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE):
            number += 1
            whole = len(data) < MAX_LINE
            while len(data) == MAX_LINE and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE)
            if not whole or data.strip(_BLANK):
                yield Line(number, data if whole else None)


def survey(source: Path, name: str) -> Survey:
    """Read the input once, to count it and to know it again, together with the model's name.

    Raises:
        UserError: it is no file, has nothing in it, or is not UTF-8.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file; expected JSON lines, one request each")
    try:
        with source.open("rb") as file:
            found = foreign_encoding(file.read(4))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
        lines = sum(1 for _ in read_lines(source))
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if found:
        raise UserError(f"{source}: is {found}; expected JSON lines in UTF-8, uncompressed")
    if not lines:
        raise UserError(f"{source}: has no lines; expected one request in each")
    digest.update(name.encode())
    return Survey(source, digest.hexdigest()[:16], lines)


def key_of(custom_id: str | int) -> bytes:
    """What stands for a custom_id, or for the number of a line, in 16 bytes."""
    return hashlib.blake2b(json.dumps(custom_id).encode(), digest_size=16).digest()


def open_records(output: Path, survey: Survey) -> Records | None:
    """The records that are there so far; None when `output` is whole already.

    Raises:
        UserError: another process writes it, or what is there belongs to another input.
    """
    partial = output.with_name(output.name + ".partial")
    if output.resolve() == survey.source.resolve():
        raise UserError(f"{output}: is the input; choose another output")
    if _is_whole(output, survey):
        return None
    file = _lock(partial)
    try:
        if _is_whole(output, survey):  # finished by whoever held the lock until now
            partial.unlink()
            file.close()
            return None
        return Records(output, partial, file, survey)
    except UserError:
        file.close()
        raise


class Records:
    """Records of the output, locked for this process; a context that leaves no empty file."""

    def __init__(self, output: Path, partial: Path, file: BinaryIO, survey: Survey):
        self.done: set[bytes] = set()
        """The keys of what is answered."""
        self.partial = partial
        self._output = output
        self._file = file
        self._survey = survey
        file.seek(0)
        end = 0
        for line in file:
            if not line.endswith(b"\n"):  # torn by a kill
                file.truncate(end)
                break
            end += len(line)
            key = _key(line, survey)
            if key is None or key in self.done:
                raise UserError(
                    f"{partial}: holds answers to another input or under another --name; finish "
                    "that batch, delete the file, or choose another output"
                )
            self.done.add(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.done:
            self.partial.unlink()  # while it is still locked
        self._file.close()

    @property
    def whole(self) -> bool:
        """Whether every line is answered."""
        return len(self.done) == self._survey.lines

    def write(self, key: bytes, content: Mapping[str, Any]) -> None:
        """Append a record; once this returns, no kill of the process loses it."""
        record = {"id": f"batch_req_{self._survey.fingerprint}_{key.hex()}", **content}
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # JSON can spell half a surrogate pair, UTF-8 cannot: it stays escaped.
        self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self.done.add(key)

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            UserError: there are not as many records as lines.
        """
        if not self.whole:
            raise UserError(
                f"{self._survey.source}: {self._survey.lines} lines when it was counted, but "
                f"{len(self.done)} when it was read; {self.partial} holds the answers"
            )
        os.fsync(self._file.fileno())
        self.partial.rename(self._output)
        folder = os.open(self._output.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too outlives a power cut
        finally:
            os.close(folder)


def _lock(partial: Path) -> BinaryIO:
    """Open the file of partial results for this process alone."""
    while True:
        try:
            file = partial.open("a+b")
        except OSError as error:
            raise UserError(f"{partial}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have renamed or removed it between our two calls.
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            busy = isinstance(error, BlockingIOError)
            reason = "another process is writing it" if busy else error.strerror
            raise UserError(f"{partial}: cannot be locked: {reason}") from None
        file.close()


def _is_whole(output: Path, survey: Survey) -> bool:
    """Whether the output is there with one record for each line of this very input."""
    if not output.exists():
        return False
    keys: set[bytes | None] = set()
    if output.is_file():
        with output.open("rb") as file:
            keys = {_key(line, survey) if line.endswith(b"\n") else None for line in file}
    if None in keys or len(keys) != survey.lines:
        raise UserError(
            f"{output}: exists, and is not the answer to {survey.source} under this --name; move "
            "it away or choose another output"
        )
    return True


def _key(line: bytes, survey: Survey) -> bytes | None:
    """What a record answers; None when it is no record of this input."""
    found = _RECORD.match(line)
    if found is None or found[1].decode() != survey.fingerprint:
        return None
    return bytes.fromhex(found[2].decode())
