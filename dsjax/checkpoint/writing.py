"""The files of a conversion, written or compared by threads. Imports no jax.

A thread writes one file from front to back, hashing as it goes. What it does with bytes (reading,
widening, hashing, writing) lets the other threads run. Its memory is a slab read and a slab
written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import numpy as np

from dsjax.checkpoint.conversion import Job
from dsjax.checkpoint.manifest import Digest
from dsjax.checkpoint.streams import slabs
from dsjax.checkpoint.to_objects import ObjectComparer, ObjectWriter
from dsjax.errors import UserError
from dsjax.places import REQUESTS, ObjectPath

THREADS = min(16, max(2, os.cpu_count() or 1))
"""As many as cores: the kernel reads ahead and writes behind. More than that were slower."""

THREAD_BYTES = 1 << 25
"""Memory of one thread, about: 128 rows of the widest matrix, as float32 and once more."""

Advance = Callable[[float], None]
"""Told of bytes, read and written."""


class _Writer:
    """A new file and its digest."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")
        self._sha256 = hashlib.sha256()

    def put(self, data: Any) -> None:
        self._sha256.update(data)
        self._file.write(data)

    def finish(self) -> Digest:
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        self._file.close()


class _Comparer:
    """A file that must hold what it is given."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("rb", buffering=0)
        # From the disk, not from what the kernel remembers of writing it.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def put(self, data: Any) -> None:
        begin = self._file.tell()
        found = self._file.read(len(data))
        if found != bytes(data):
            raise UserError(
                f"{self._path}: differs from the source within {len(data)} bytes from {begin} on; "
                "check the disk and convert again"
            )

    def finish(self) -> Digest:
        if self._file.read(1):
            raise UserError(f"{self._path}: is longer than what was written; convert again")
        return {}

    def close(self) -> None:
        self._file.close()


def write_job(job: Job, folder: Path, stop: Event, advance: Advance) -> dict[str, Digest]:
    """Write a job's files, flushed to the disk, and return their digests."""
    return _stream(job, folder, stop, advance, _writer)


def compare_job(job: Job, folder: Path, stop: Event, advance: Advance) -> None:
    """Make a job's numbers once more from the source, and compare its files with them.

    Raises:
        UserError: they differ.
    """
    _stream(job, folder, stop, advance, _comparer)


def _writer(path: Path) -> _Writer | ObjectWriter:
    return ObjectWriter(path) if isinstance(path, ObjectPath) else _Writer(path)


def _comparer(path: Path) -> _Comparer | ObjectComparer:
    return ObjectComparer(path) if isinstance(path, ObjectPath) else _Comparer(path)


def _stream(
    job: Job,
    folder: Path,
    stop: Event,
    advance: Advance,
    kind: Callable[[Path], _Writer | _Comparer | ObjectWriter | ObjectComparer],
) -> dict[str, Digest]:
    with ExitStack() as stack:
        files = [kind(folder / output.path) for output in job.outputs]
        for file in files:
            stack.callback(file.close)
        for output, file in zip(job.outputs, files, strict=True):
            file.put(output.header)
        for item in job.items:
            both = 1 + item.bytes_in / max(item.value_bytes + item.scale_bytes, 1)
            for are_scales, part in slabs(item):
                if stop.is_set():
                    return {}
                files[-1 if are_scales else 0].put(part.reshape(-1).view(np.uint8).data)
                advance(part.nbytes * both)
        return {output.path: file.finish() for output, file in zip(job.outputs, files, strict=True)}


def threads_for(*places: Path) -> int:
    """How many threads read and write there: of an object store, one waits while others work."""
    remote = any(isinstance(place, ObjectPath) for place in places)
    return max(THREADS, REQUESTS) if remote else THREADS


def in_threads(tasks: Iterable[Callable[[Event], None]], *places: Path) -> None:
    """Run tasks, each of which ends early when the event is set; the first failure ends all.

    `places` are where they read and write, for there to be enough of them.
    """
    stop = Event()
    with ThreadPoolExecutor(threads_for(*places), thread_name_prefix="convert") as pool:
        futures = [pool.submit(task, stop) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
