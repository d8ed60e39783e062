"""What a conversion has finished, so that it goes on after a kill. Imports no jax.

Files are written into `DST.partial`, and `DST.partial.jsonl` beside it is the journal. Its first
line says what the conversion is; each line after it lists files that are on the disk, with their
digests. A line that was cut off by a kill is no line.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from dsjax.checkpoint.manifest import Digest, Leaves, flush_directory, write_manifest
from dsjax.errors import UserError, one_line


class Journal:
    """The journal of one conversion, which it alone writes.

    Raises:
        UserError: the folder is of another conversion, of one that is running, or of none.
    """

    withheld: frozenset[str] = frozenset()
    """Files of `put` that are not there before `finish`."""

    def __init__(self, destination: Path, identity: dict[str, Any]) -> None:
        self._destination = destination.absolute()
        self.partial = partial = self._destination.with_name(f"{self._destination.name}.partial")
        self._path = partial.with_name(f"{partial.name}.jsonl")
        self._writing = Lock()
        if partial.exists() and not self._path.exists():
            raise UserError(f"{partial}: in the way, and of no conversion; remove it")
        try:
            self._file = self._path.open("ab+")
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {one_line(error)}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{partial}: another conversion is writing it") from None
        try:
            self.done = self._resume(identity) if partial.exists() else {}
        except UserError:
            self._file.close()
            raise
        if not partial.exists():
            self._file.truncate(0)
            self._write(identity)
            partial.mkdir()

    def add(self, files: dict[str, Digest]) -> None:
        """These files are on the disk."""
        with self._writing:
            self._write(files)
            self.done |= files

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write small files."""
        for name, data in files.items():
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            (self.partial / name).write_bytes(data)

    def finish(self, leaves: Leaves) -> None:
        """Write the manifest, give the folder its name, and forget the journal."""
        write_manifest(self.partial, None, leaves, self.done)
        os.rename(self.partial, self._destination)
        flush_directory(self._destination.parent)
        self.remove()

    def close(self) -> None:
        """Stop writing; what is there remains, to go on from."""
        self._file.close()

    def remove(self) -> None:
        """Forget the conversion, and all that it has written under its working name."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._path.unlink(missing_ok=True)

    def _resume(self, identity: dict[str, Any]) -> dict[str, Digest]:
        """What is finished; everything else in the folder is removed."""
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
        begun, *finished = [_parse(line) for line in lines] or [{}]
        check_identity(self.partial, begun, identity)
        done: dict[str, Digest] = {}
        for files in finished:
            if all(_has_size(self.partial / name, digest) for name, digest in files.items()):
                done |= files
        for path in self.partial.rglob("*"):
            if path.is_file() and path.relative_to(self.partial).as_posix() not in done:
                path.unlink()
        return done

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def check_identity(partial: Path, begun: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise `UserError` unless what was begun is the conversion that wants to go on."""
    if begun == identity:
        return
    if begun.get("options") != identity["options"]:
        was = begun.get("options", "no options that are known")
        raise UserError(f"{partial}: was begun with {was}; give the same, or remove it")
    raise UserError(
        f"{partial}: was begun from another source, or the source has changed since; remove it"
    )


def _parse(line: bytes) -> dict[str, Any]:
    """A line of the journal; one that is none says nothing, and what it spoke of is done again."""
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _has_size(path: Path, digest: Any) -> bool:
    sized = isinstance(digest, dict) and path.is_file()
    return sized and path.stat().st_size == digest.get("bytes")
