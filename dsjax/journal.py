"""A file of records that outlives a kill: JSON lines, each under a key, each written once.

The first line holds the settings that the records depend on; who comes with other settings is
refused, so records of two kinds never meet in one file. Answers that take hours to draw are kept
so, and what verifiers said of them.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

from dsjax.errors import UserError
from dsjax.small_files import parse_json

Key = TypeVar("Key", bound=NamedTuple)


class Journal(Generic[Key]):
    """Records by key; a context that keeps the file to this process.

    Args:
        path: made if it is not there; a last line that a kill tore is cut off.
        settings: flat, of JSON.
        kind: what a record is about, a NamedTuple of JSON; its fields stand first in each line.

    Raises:
        UserError: another process has the file, or it is not ours, or has other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], kind: type[Key]):
        self.records: dict[Key, dict[str, Any]] = {}
        self.written = 0
        """Of the records, those of this process."""
        self.settings = dict(settings)
        self._path = path
        self._kind = kind
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, key: Key, record: Mapping[str, Any]) -> None:
        """Append a record; once this returns, no kill of the process loses it."""
        assert key not in self.records
        self._append({**key._asdict(), **record})
        self.records[key] = dict(record)
        self.written += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = "another process is writing it; wait for it, or choose another output folder"
            raise UserError(f"{self._path}: {problem}") from None

    def _read(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        end, found = 0, None
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                break
            end += len(line)
            record = parse_json(line, f"{self._path}: line {number}")
            if found is None:
                found = record
                self._compare(record.get("settings"), settings)
            else:
                self._take(record, number)
        if found is None:
            self._append({"settings": dict(settings)})

    def _take(self, record: dict[str, Any], number: int) -> None:
        try:
            key = self._kind._make([record.pop(name) for name in self._kind._fields])
        except KeyError as error:
            problem = f"line {number}: is no record of this kind, {error} is missing"
            raise UserError(f"{self._path}: {problem}") from None
        if key in self.records:
            raise UserError(f"{self._path}: line {number}: {key} stands in an earlier line too")
        self.records[key] = record

    def _compare(self, found: Any, settings: Mapping[str, Any]) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{self._path}: is no journal; choose another output folder")
        refuse_other_settings(self._path, found, settings)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(as_line(record))
        self._file.flush()


def refuse_other_settings(
    path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """See that what `path` was made with, `found`, is what is asked for now.

    Raises:
        UserError: a setting differs; the message names the first.
    """
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise UserError(
                f"{path}: was made with {name}={found.get(name)!r}, now it is "
                f"{settings.get(name)!r}; choose another output folder, or delete this one"
            )


def as_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON. Half a surrogate pair, which JSON can spell and UTF-8 cannot, stays escaped.

    Raises:
        ValueError: a number is infinite, or none.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"
