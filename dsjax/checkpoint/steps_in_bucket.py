"""The steps of a run in an object store, which has no rename: the manifest is written last.

    folder/00000120/state/          every array, as orbax writes it, by all processes
    folder/00000120/extra.json      what is not an array
    folder/00000120/objects.json    size and checksum of every object of the state
    folder/00000120/manifest.json   digests of the two files above, shape and dtype of every array

A step without a manifest is none: a save that is under way, or was killed, or is being deleted.

On a disk the manifest has a digest of every byte, which is read to make it and to check it. To read
back terabytes is no way to save. The store itself keeps a CRC32C of each object, which it made of
what arrived and checks whenever it moves or sends bytes; so a step is sound when its objects are
those that were there when it was saved, which one listing tells. What that does not find is a
change between the device and the store: connections are encrypted, and so protected.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from typing import Any

from dsjax.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    Digest,
    Leaves,
    manifest_bytes,
    read_manifest,
)
from dsjax.places import ObjectPath, as_path, each
from dsjax.small_files import MAX_JSON_BYTES, parse_json

STATE, EXTRA, OBJECTS = "state", "extra.json", "objects.json"


class StepsInBucket:
    """The steps below `folder`. Of several processes one calls what writes; any may read."""

    def __init__(self, folder: ObjectPath) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """See that the folder can be written, and clear it of what a killed run left.

        For the run that owns the folder alone: another one's save under way looks the same.
        """
        probe = self._folder / "probe"
        probe.write_bytes(b"")
        probe.unlink()
        for step in self._found(complete=False):
            self._delete(step)

    def path(self, step: int) -> ObjectPath:
        """Where a step is, to be looked at anew."""
        return _anew(self._folder / f"{step:08d}")

    def steps(self) -> list[int]:
        """The complete steps, oldest first."""
        return self._found(complete=True)

    def begin(self, step: int) -> ObjectPath:
        """Where a save of this step writes its `state`; what was there is deleted."""
        self._delete(step)
        return self.path(step)

    def commit(self, step: int, folder: ObjectPath, leaves: Leaves, extra: str) -> None:
        """Make a step of what `begin` gave, once every process has written its state."""
        objects = json.dumps(_objects(_anew(folder / STATE)), indent=0, sort_keys=True)
        files = {EXTRA: extra.encode(), OBJECTS: objects.encode()}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        digests = {name: _digest(data) for name, data in files.items()}
        (folder / MANIFEST).write_bytes(manifest_bytes(step, leaves, digests))

    def discard(self, folder: ObjectPath) -> None:
        """Delete what a failed save has written."""
        self._delete(int(folder.name))

    def remove_beyond(self, newest: int, keep: int) -> None:
        """Delete all steps but `newest` and the `keep - 1` before it."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-keep:]
        for step in steps:
            if step not in kept:
                self._delete(step)

    def verify(self, step: int, part: tuple[int, int]) -> Leaves:
        """The leaves of a step, once its objects are known to be those that were saved.

        One listing tells of all, so every process checks every `part`.

        Raises:
            DamagedError: one is changed, missing or surplus, or they are of another step.
        """
        return verify_step(self.path(step), step)

    def _found(self, complete: bool) -> list[int]:
        folder = _anew(self._folder)
        names = [path.name for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name)]
        return sorted(
            int(name) for name in names if (folder / name / MANIFEST).is_file() == complete
        )

    def _delete(self, step: int) -> None:
        """The manifest first: a half deleted step is none."""
        folder = self.path(step)
        (folder / MANIFEST).unlink(missing_ok=True)
        rest = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        each(partial(ObjectPath.unlink, missing_ok=True), rest, folder)


def verify_step(folder: ObjectPath, step: int) -> Leaves:
    """As `StepsInBucket.verify`, of the step in `folder`."""
    manifest = read_manifest(folder)
    if manifest["step"] != step:
        raise DamagedError(f"{MANIFEST} is of step {manifest['step']}")
    small = {name: _read(folder / name) for name in (EXTRA, OBJECTS)}
    for name, data in small.items():
        if _digest(data) != manifest["files"].get(name):
            raise DamagedError(f"{name} does not have the digest in the manifest")
    saved: dict[str, Any] = parse_json(small[OBJECTS], OBJECTS)
    found = _objects(folder / STATE)
    if missing := saved.keys() - found.keys():
        raise DamagedError(f"{STATE}/{min(missing)} is missing")
    if surplus := found.keys() - saved.keys():
        raise DamagedError(f"{STATE}/{min(surplus)} is not in {OBJECTS}")
    for name, described in saved.items():
        if found[name] != described:
            raise DamagedError(f"{STATE}/{name} is not what was saved, by {OBJECTS}")
    return manifest["leaves"]


def _objects(state: ObjectPath) -> dict[str, dict[str, Any]]:
    """Size and checksum of every object, as the store lists them."""
    return {
        path.relative_to(state).as_posix(): {"bytes": path.stat().st_size, "crc32c": path.crc32c}
        for path in state.rglob("*")
        if path.is_file()
    }


def _read(file: ObjectPath) -> bytes:
    if not file.is_file():
        raise DamagedError(f"{file.name} is missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise DamagedError(f"{file.name} has more than {MAX_JSON_BYTES} bytes")
    return file.read_bytes()


def _digest(data: bytes) -> Digest:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _anew(path: ObjectPath) -> ObjectPath:
    found = as_path(str(path))
    assert isinstance(found, ObjectPath)
    return found
