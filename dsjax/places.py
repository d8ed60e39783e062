"""Paths of this machine and of an object store, told apart where they enter. Imports no jax.

`as_path` makes a `Path` of anything; where that begins with gs:// it is an `ObjectPath`, and what
reads or writes it reads or writes objects, by HTTP. Nothing of an object store is imported before
there is such a path. A path of this machine is a plain `Path`, with nothing in between.
"""

from __future__ import annotations

import io
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path, PosixPath
from stat import S_IFREG
from types import SimpleNamespace
from typing import Any, TypeVar

from dsjax.errors import UserError, hub_hint, one_line

T = TypeVar("T")
R = TypeVar("R")

WINDOW = 1 << 24
"""Bytes of one request, where more will be read than is asked for now; two for each thread."""

REQUESTS = 16
"""How many are under way at a time. One gets some 100 MB/s from a bucket, whatever the network."""

SILENCE = 120.0
"""Seconds without a byte after which a request is made again; the library would wait for ever."""

_SCHEME = "gs:"
_FACTS = ("size", "generation", "crc32c")
_LOGIN = "log in by `gcloud auth application-default login`, or ask the bucket's owner"


class ObjectStoreError(UserError, OSError):
    """An object cannot be read or written. Transient failures were tried again before."""


def as_path(path: str | Path) -> Path:
    """A `Path`; an `ObjectPath` where `path` begins with gs://.

    Raises:
        UserError: it is of another object store, or names no bucket.
    """
    if isinstance(path, ObjectPath):
        return path
    if "://" in str(path) and not str(path).startswith(f"{_SCHEME}//"):
        raise UserError(
            f"{path}: expected a path of this machine or gs://BUCKET/PATH{hub_hint(path)}"
        )
    plain = Path(path)
    if plain.parts[:1] != (_SCHEME,):
        return plain
    if len(plain.parts) == 1:
        raise UserError(f"{path}: names no bucket; expected gs://BUCKET/PATH")
    if plain.parts[1] == "BUCKET":  # in configs/ and the guides; no real name has capitals
        raise UserError(f"{path}: BUCKET stands for your own bucket; write its name")
    return ObjectPath(*plain.parts)


def local_path(path: str | Path, what: str) -> Path:
    """A `Path` of this machine, for `what` is not kept in an object store.

    Raises:
        UserError: it is in one.
    """
    found = as_path(path)
    if isinstance(found, ObjectPath):
        raise UserError(f"{found}: {what} must be on a disk of this machine; give such a path")
    return found


def each(function: Callable[[T], R], items: Iterable[T], place: Path) -> list[R]:
    """Map in the items' order; if `place` is in an object store, several requests at a time."""
    return list(ahead(function, items, place))


def ahead(function: Callable[[T], R], items: Iterable[T], place: Path) -> Iterator[R]:
    """As `each`, one result after the other; some `REQUESTS` are made before they are wanted."""
    if not isinstance(place, ObjectPath):
        yield from map(function, items)
        return
    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(REQUESTS) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > REQUESTS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


class ObjectPath(PosixPath):
    """A path in a bucket: gs://BUCKET/NAME. A folder is what objects' names begin with.

    What is asked about objects (`is_file`, `stat`, `glob`, ...) is answered from a listing, which
    is made at the first question and shared by all paths that are derived from one by `/`: a
    folder of ten thousand objects takes two requests, not ten thousand. Make a new path by
    `as_path` to look again. Reading and writing always go to the store.

    What this class does not override would touch a file of this machine; it asks for
    `__fspath__`, and that raises.
    """

    _listing: _Listing | None = None

    def __str__(self) -> str:
        text = super().__str__()
        colon, slashes = _SCHEME, f"{_SCHEME}//"
        return slashes + text[len(colon) + 1 :] if self.parts[:1] == (colon,) else text

    def __fspath__(self) -> str:
        raise UserError(
            f"{self}: is in an object store, and is needed as a file; copy it to a disk"
        )

    def __truediv__(self, key: Any) -> ObjectPath:
        return self._derived(super().__truediv__(key))

    @property
    def parent(self) -> ObjectPath:
        """The folder that this is in."""
        return self._derived(super().parent)

    @property
    def key(self) -> str:
        """Bucket and name, as the library wants them."""
        return "/".join(self.parts[1:])

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Itself; there are no links."""
        return self

    # -------------------------------------------------------------------------------------
    # What is there
    # -------------------------------------------------------------------------------------

    def exists(self, **_: Any) -> bool:
        """Whether it is an object or a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        """Whether it is an object."""
        return self.key in self._listed.objects

    def is_dir(self, **_: Any) -> bool:
        """Whether some object's name begins with it."""
        return self.key in self._listed.folders

    def stat(self, **_: Any) -> Any:
        """Size, and the time of writing in the store's clock; nothing else.

        Raises:
            ObjectStoreError: there is no such object.
        """
        found = self._listed.objects.get(self.key)
        if found is None:
            raise ObjectStoreError(f"{self}: no such object")
        # A generation is the microsecond of writing, and no two of an object are the same.
        return SimpleNamespace(
            st_mode=S_IFREG,
            st_size=int(found["size"]),
            st_mtime_ns=1000 * int(found["generation"]),
        )

    @property
    def crc32c(self) -> str:
        """The store's own checksum of the object, in base64."""
        self.stat()
        return self._listed.objects[self.key]["crc32c"]

    def iterdir(self) -> Iterator[ObjectPath]:
        """Objects and folders in it."""
        return self.glob("*")

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:
        """Objects and folders below it whose names match, part by part; there is no `**`."""
        parts = pattern.split("/")
        for names in self._below():
            if len(names) == len(parts) and all(map(fnmatchcase, names, parts)):
                yield self / "/".join(names)

    def rglob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:
        """Objects and folders below it, at any depth, whose last name matches."""
        for names in self._below():
            if fnmatchcase(names[-1], pattern):
                yield self / "/".join(names)

    def _below(self) -> list[list[str]]:
        begin = f"{self.key}/"
        known = self._listed.objects.keys() | self._listed.folders
        return [key[len(begin) :].split("/") for key in sorted(known) if key.startswith(begin)]

    @property
    def _listed(self) -> _Listing:
        if self._listing is None:
            self._listing = _Listing(self)
        return self._listing

    def _derived(self, other: Any) -> ObjectPath:
        """Another path, with this one's listing if that tells of it."""
        if self._listing is None and other.is_relative_to(self):
            self._listing = _Listing(self)
        if self._listing is not None and other.is_relative_to(self._listing.root):
            other._listing = self._listing
        return other

    # -------------------------------------------------------------------------------------
    # What is in it
    # -------------------------------------------------------------------------------------

    def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:
        """The object as a stream of bytes, of which only what is asked for is fetched."""
        if mode != "rb":
            raise UserError(f"{self}: is in an object store, and opened as {mode!r}; copy it first")
        return _Reader(self)

    def read_bytes(self) -> bytes:
        """All of it."""
        with telling(self):
            return _store().cat_file(self.key)

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        """All of it, as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; fewer where the object ends before."""
        if not length:
            return b""
        with telling(self):
            try:
                return _store().cat_file(self.key, start=start, end=start + length)
            except Exception as error:
                if getattr(error, "code", None) == 416:  # the object ends before `start`
                    return b""
                raise

    def read_ahead(self, start: int, length: int, end: int) -> bytes | memoryview:
        """As `read_range`, but what probably comes next is fetched with it, up to `end`.

        A thread keeps the last two windows, so two objects can be read in turns; another path of
        the same object looks again.
        """
        kept: list[tuple[Path, int, bytes]] = _kept.__dict__.setdefault("windows", [])
        for file, begin, data in kept:
            if file is self and begin <= start and start + length <= begin + len(data):
                return memoryview(data)[start - begin : start - begin + length]
        data = self.read_range(start, min(max(length, WINDOW), end - start))
        kept[:] = [*kept[-1:], (self, start, data)]
        return memoryview(data)[:length]

    def write_bytes(self, data: bytes) -> int:
        """Make or replace the object, at once; the store's digest must be ours."""
        with telling(self):
            _store().pipe_file(self.key, data, consistency="md5")
        return len(data)

    def create(self, data: bytes) -> bool:
        """Make the object, unless there is one; whether it was made."""
        with telling(self):
            try:
                _store().pipe_file(self.key, data, consistency="md5", mode="create")
            except FileExistsError:
                return False
        return True

    def writer(self) -> Any:
        """A stream that becomes the object when it is closed, and nothing when discarded."""
        return _store().open(self.key, "wb", block_size=WINDOW, consistency="md5")

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        with telling(self):
            try:
                _store().rm_file(self.key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: a folder is there when an object is in it."""


_kept = threading.local()


class _Listing:
    """The objects below one path, as they were when they were first asked about."""

    def __init__(self, root: ObjectPath) -> None:
        self.root = root

    @cached_property
    def objects(self) -> dict[str, dict[str, Any]]:
        with telling(self.root):
            found: dict[str, dict[str, Any]] = _store().find(self.root.key, detail=True)
        # An object whose name ends in a slash marks a folder, and is nothing else. Of some thirty
        # facts the few that are asked for are kept: a data set may have a million objects.
        return {
            key: {name: info[name] for name in _FACTS}
            for key, info in found.items()
            if not key.endswith("/")
        }

    @cached_property
    def folders(self) -> set[str]:
        found = set()
        for key in self.objects:
            while (key := key.rpartition("/")[0]) and key not in found:
                found.add(key)
        return found


class _Reader(io.RawIOBase):
    """An object as a stream; a read is a request."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._path.read_range(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}
        self._at = offset + (self._path.stat().st_size if whence == 2 else begin[whence])
        return self._at

    def tell(self) -> int:
        return self._at


# ---------------------------------------------------------------------------------------------
# The library
# ---------------------------------------------------------------------------------------------


@cache
def _store() -> Any:
    """gcsfs, over HTTP alone; it takes credentials as Google's own libraries do.

    STORAGE_EMULATOR_HOST, an address, puts a stand-in in the store's place.
    """
    try:
        from aiohttp import ClientTimeout
        from gcsfs.core import GCSFileSystem
    except ImportError:
        raise UserError("reading gs:// needs the gcsfs package: pip install 'dsjax[gcs]'") from None
    # It logs what it raises too, with a traceback; what it raises is told in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return GCSFileSystem(
        requests_timeout=ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE),
        use_listings_cache=False,
        skip_instance_cache=True,
    )


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turn what the library raises, after it has tried again, into an `ObjectStoreError`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError:
        raise ObjectStoreError(f"{path}: no such object, or no such bucket") from None
    except Exception as error:  # of aiohttp, requests, google.auth and gcsfs: nothing in common
        said = one_line(error) or type(error).__name__
        if forbidden := str(error).startswith("Forbidden: "):  # ... and the address, and a line
            said = one_line(str(error).partition("\n")[2])
        if forbidden or getattr(error, "code", None) == 401:
            raise ObjectStoreError(f"{path}: permission denied ({said}); {_LOGIN}") from error
        raise ObjectStoreError(f"{path}: the store failed ({said}); try again later") from error
