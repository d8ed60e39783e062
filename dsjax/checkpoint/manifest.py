"""The manifest of a checkpoint: a SHA-256 digest of every file, checked before anything is read.

Neither orbax nor the file formats below it checksum array data, so one flipped bit would restore
silently wrong. `manifest.json` lists the digest and size of every other file of the folder; its own
first line is the digest of the bytes that follow that line. So every bit of the folder is covered,
and the manifest is still plain JSON:

    {"sha256": "<digest of all bytes after this line>",
     "step": 120,
     "leaves": {"params.embed": {"shape": [512, 64], "dtype": "float32"}, ...},
     "files": {"extra.json": {"bytes": 57, "sha256": "..."}, ...}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dsjax.errors import UserError
from dsjax.places import WINDOW, ObjectPath, ObjectStoreError
from dsjax.small_files import MAX_JSON_BYTES, open_file, parse_json, read_small

Item = TypeVar("Item")
Result = TypeVar("Result")

MANIFEST = "manifest.json"

Leaves = dict[str, dict[str, Any]]
"""Shape and dtype of every array by name: `{"step": {"shape": [], "dtype": "int32"}}`."""

Digest = dict[str, Any]
"""What the manifest says of a file: `{"bytes": 57, "sha256": "..."}`."""


class DamagedError(Exception):
    """A checkpoint is not, byte for byte, what its manifest says; the message names the file."""


def write_manifest(
    folder: Path, step: int | None, leaves: Leaves, known: Mapping[str, Digest] | None = None
) -> None:
    """Hash every file of `folder`, write its manifest, and flush all of it to the disk.

    Nothing may change in `folder` afterwards. Files are hashed in parallel; one pass reads each.
    What is `known` of a file, which was hashed and flushed as it was written, is taken as it is.
    `step` is None where the folder is of no run.
    """
    paths = _files_of(folder)
    known = known or {}

    def entry(path: Path) -> Digest:
        return known.get(path.relative_to(folder).as_posix()) or _digest(path, flush=True)

    entries = _in_parallel(entry, paths)
    files = {path.relative_to(folder).as_posix(): e for path, e in zip(paths, entries, strict=True)}
    (folder / MANIFEST).write_bytes(manifest_bytes(step, leaves, files))
    _digest(folder / MANIFEST, flush=True)
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_directory(directory)


def manifest_bytes(step: int | None, leaves: Leaves, files: Mapping[str, Digest]) -> bytes:
    """The manifest of a folder of these `files`."""
    body = {"step": step, "leaves": leaves, "files": {n: files[n] for n in sorted(files, key=Path)}}
    rest = json.dumps(body, indent=1).removeprefix("{\n").encode()
    return _first_line(rest) + rest


def verify(folder: Path, step: int | None, part: tuple[int, int] = (0, 1)) -> Leaves:
    """The leaves of the checkpoint in `folder`, once every byte of it has been checked.

    With `part`, (i, n), only every n-th file from the i-th on: n processes share the work.

    Raises `DamagedError` when a file is changed, truncated, unreadable, missing or surplus, or when
    the folder holds another step than `step`.
    """
    try:
        manifest = read_manifest(folder)
        if manifest["step"] != step:
            raise DamagedError(f"{MANIFEST} is of step {manifest['step']}")
        _check_files(folder, manifest["files"], part)
    except ObjectStoreError:
        raise  # it says all that is known, in one line
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror})") from error
    return manifest["leaves"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says; raises `DamagedError` if it is not sound itself."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{MANIFEST} is missing")
    try:
        data = read_small(path, MAX_JSON_BYTES)
        rest = data.partition(b"\n")[2]
        if data != _first_line(rest) + rest:
            raise DamagedError(f"{MANIFEST} does not have the digest in its first line")
        tree = parse_json(data, MANIFEST)
    except UserError as error:
        raise DamagedError(str(error)) from None
    files = _lists(tree.get("files"), bytes=int, sha256=str)
    if not files or not _lists(tree.get("leaves"), shape=list, dtype=str) or "step" not in tree:
        raise DamagedError(f"{MANIFEST} does not say its step, files and leaves")
    return tree


def _lists(found: Any, **kinds: type) -> bool:
    """Whether everything in it has these keys, with values of these kinds."""
    return isinstance(found, dict) and all(
        isinstance(item, dict) and all(isinstance(item.get(key), k) for key, k in kinds.items())
        for item in found.values()
    )


def flush_directory(directory: Path) -> None:
    """Make the names in `directory` durable; flushing a file does not flush its name."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_files(folder: Path, listed: dict[str, Digest], part: tuple[int, int]) -> None:
    """Raise `DamagedError` unless `folder` holds just the `listed` files, a part bit for bit."""
    found = {path.relative_to(folder).as_posix() for path in _files_of(folder)}
    if missing := listed.keys() - found:
        raise DamagedError(f"{min(missing)} is missing")
    if surplus := found - listed.keys():
        raise DamagedError(f"{min(surplus)} is not in the manifest")

    def check(name: str) -> None:
        actual, expected = _digest(folder / name), listed[name]
        if actual["bytes"] != expected["bytes"]:
            raise DamagedError(f"{name} has {actual['bytes']} bytes, not {expected['bytes']}")
        if actual != expected:
            raise DamagedError(f"{name} does not have the digest in the manifest")

    index, count = part
    _in_parallel(check, sorted(listed)[index::count])


def _files_of(folder: Path) -> list[Path]:
    """Everything in `folder` that the manifest has to list, sorted."""
    manifest = folder / MANIFEST
    return sorted(p for p in folder.rglob("*") if not p.is_dir() and p != manifest)


def _in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map over threads: hashing releases the interpreter lock, so files go at disk or CPU speed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


def _digest(path: Path, flush: bool = False) -> Digest:
    if isinstance(path, ObjectPath):
        return _digest_object(path)
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def _digest_object(path: ObjectPath) -> Digest:
    sha256, size = hashlib.sha256(), path.stat().st_size
    for begin in range(0, size, WINDOW):
        sha256.update(path.read_range(begin, WINDOW))
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _first_line(rest: bytes) -> bytes:
    """The line that protects the manifest: it opens the JSON object that `rest` goes on with."""
    return b'{"sha256": "%s",\n' % hashlib.sha256(rest).hexdigest().encode()
