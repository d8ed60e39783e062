"""Writing a conversion into an object store, which has no rename and no folders. Imports no jax.

Objects get their final names as they are written. What opens a folder, its `config.json` or
`config.yaml`, is written last: before that no reader takes the folder for a model, ours or
another library's. The journal is objects too, below `DST.partial/`: one says what the conversion
is, and one for each finished job lists its objects with their digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from dsjax.checkpoint.journal import check_identity
from dsjax.checkpoint.manifest import MANIFEST, Digest, Leaves, manifest_bytes
from dsjax.checkpoint.weights_folder import CONFIG
from dsjax.errors import UserError
from dsjax.places import ObjectPath, ObjectStoreError, as_path, each, telling

BEGUN = "begun.json"
OPENING = frozenset({"config.json", CONFIG})


class ObjectJournal:
    """As `Journal`, of a conversion into an object store.

    It cannot tell whether another process still writes the same conversion. Both would write the
    same bytes to the same names, so nothing comes of it but work done twice.

    Raises:
        UserError: something is there already, or was begun by another conversion.
    """

    withheld = OPENING

    def __init__(self, destination: ObjectPath, identity: dict[str, Any]) -> None:
        self._destination = destination
        self._home = home_of(destination)
        self._opening: dict[str, bytes] = {}
        self._digests: dict[str, Digest] = {}
        self.done: dict[str, Digest] = {}
        check_unused(destination)
        begun = self._home / BEGUN
        if not begun.create(json.dumps(identity).encode()):
            check_identity(self._home, json.loads(begun.read_bytes()), identity)
            self._resume()

    @property
    def partial(self) -> ObjectPath:
        """The folder that is written, to be looked at anew."""
        return _again(self._destination)

    def add(self, files: dict[str, Digest]) -> None:
        """These objects are in the store."""
        (self._home / f"{min(files)}.json").write_bytes(json.dumps(files).encode())
        self.done |= files

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write small files, but those that open the folder."""
        self._opening = {name: data for name, data in files.items() if name in OPENING}
        self._digests = {name: _digest(data) for name, data in files.items()}
        rest = files.keys() - OPENING
        each(lambda name: (self.partial / name).write_bytes(files[name]), rest, self.partial)

    def finish(self, leaves: Leaves) -> None:
        """Write the manifest, open the folder, and forget the journal."""
        manifest = manifest_bytes(None, leaves, self.done | self._digests)
        (self.partial / MANIFEST).write_bytes(manifest)
        for name, data in self._opening.items():
            (self.partial / name).write_bytes(data)
        _delete(self._home)

    def close(self) -> None:
        """Nothing: what is there remains, to go on from."""

    def remove(self) -> None:
        """Delete all that was written, and the journal after it."""
        _delete(self.partial)
        _delete(self._home)

    def _resume(self) -> None:
        listed = [path for path in self._home.rglob("*.json") if path.is_file()]
        listed.remove(self._home / BEGUN)
        folder = self.partial
        for data in each(ObjectPath.read_bytes, listed, folder):
            files: dict[str, Digest] = json.loads(data)
            if all(_has_size(folder / name, d["bytes"]) for name, d in files.items()):
                self.done |= files


class ObjectWriter:
    """A new object and its digest; nothing appears before it is finished."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._stream: Any = path.writer()

    def put(self, data: Any) -> None:
        """Send the next bytes, some megabytes at a time."""
        self._sha256.update(data)
        self._bytes += len(data)
        with telling(self._path):
            self._stream.write(data)

    def finish(self) -> Digest:
        """Let the object appear."""
        with telling(self._path):
            self._stream.close()
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Give up what is not finished."""
        if not self._stream.closed:
            self._stream.closed = True  # else its finalizer would finish it
            with suppress(ObjectStoreError), telling(self._path):
                self._stream.discard()  # what cannot be discarded now expires by itself


class ObjectComparer:
    """An object that must hold what it is given."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._size = path.stat().st_size
        self._at = 0

    def put(self, data: Any) -> None:
        """Compare the next bytes."""
        found = self._path.read_ahead(self._at, len(data), self._size)
        if bytes(found) != bytes(data):
            raise UserError(
                f"{self._path}: differs from the source within {len(data)} bytes from {self._at} "
                "on; convert again"
            )
        self._at += len(data)

    def finish(self) -> Digest:
        """Nothing may be left over."""
        if self._at != self._size:
            raise UserError(f"{self._path}: is longer than what was written; convert again")
        return {}

    def close(self) -> None:
        """Nothing is held."""


def home_of(destination: ObjectPath) -> ObjectPath:
    """Where the journal of a conversion into `destination` is."""
    return _again(destination.parent / f"{destination.name}.partial")


def check_unused(destination: ObjectPath) -> None:
    """Raise `UserError` if something is there that no conversion goes on from."""
    if destination.name == "" or len(PurePosixPath(destination.key).parts) < 2:
        raise UserError(f"{destination}: is a whole bucket; choose a folder in it")
    if _again(destination).exists() and not home_of(destination).exists():
        raise UserError(f"{destination}: exists already; choose a new folder")


def _again(path: ObjectPath) -> ObjectPath:
    """The same path, to look anew at what is there."""
    found = as_path(str(path))
    assert isinstance(found, ObjectPath)
    return found


def _delete(folder: ObjectPath) -> None:
    found = [path for path in _again(folder).rglob("*") if path.is_file()]
    each(partial(ObjectPath.unlink, missing_ok=True), found, folder)


def _digest(data: bytes) -> Digest:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _has_size(path: ObjectPath, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
