"""The files of a source: found by a glob, and read in parts, on a disk or in a bucket.

In a bucket a glob is answered from one listing of what lies below its fixed part, and a part of a
file is one request. Nothing here holds more of a file than was asked for.
"""

from __future__ import annotations

import glob
import io
import os
import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from dsjax.errors import UserError, hub_hint
from dsjax.places import WINDOW, ObjectPath, as_path

_BLOCK = WINDOW // 2
"""Bytes of one request where a file is read from front to back; two of them are in memory."""


class File(NamedTuple):
    """A file of a source. `name` is its path below the source's root: the same on every machine.

    `size` is in bytes.
    """

    path: Path
    name: str
    size: int

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes `begin` to `end`, or to the end of what the file was when it was found."""
        length = (self.size if end is None else end) - begin
        if isinstance(self.path, ObjectPath):
            return self.path.read_range(begin, length)
        with self.path.open("rb") as stream:
            stream.seek(begin)
            return stream.read(length)


def open_path(path: Path) -> BinaryIO:
    """Open a file to be read from front to back; in a bucket a block is a request."""
    if isinstance(path, ObjectPath):
        return cast(BinaryIO, io.BufferedReader(path.open("rb"), _BLOCK))
    return path.open("rb")


def find_files(pattern: str, key: str) -> list[File]:
    """The files that match a glob (`**` crosses folders), sorted by name below its fixed part.

    Names that begin with a dot match only where the pattern says the dot, as in a shell, in a
    bucket too: the same files give the same list wherever they lie. Brackets are part of a name
    where a file or folder of that very name exists.

    Args:
        pattern: a path or a glob.
        key: the setting that it came from, for messages.

    Raises:
        UserError: nothing matches, or the pattern is a folder or names no bucket.
    """
    path = as_path(os.path.expanduser(pattern))
    is_wild = _is_wild(path) and not _exists_by_name(path)
    if not is_wild and path.is_dir():
        raise UserError(f"{key}: {path}: is a folder; expected a glob such as {path}/**/*.txt")
    root = _fixed_part(path)
    if not is_wild:
        paths = {path} if path.is_file() else set()
    elif isinstance(path, ObjectPath):
        paths = _matching_objects(path, root)
    else:
        below = str(path.relative_to(root))
        found = {root / name for name in glob.iglob(below, root_dir=root, recursive=True)}
        paths = {file for file in found if file.is_file()}
    if not paths:
        raise UserError(
            f"{key}: {path}: no file matches; expected a path or a glob"
            f"{hub_hint(pattern, 'dataset')}"
        )
    return _named(root, paths)


def standard_library_files() -> list[File]:
    """The .py files of the running interpreter's standard library, installed packages left out.

    A few test files are deliberately not UTF-8; they are left out too.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")
        ]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return _named(root, [path for path in paths if path.is_file() and _is_utf8(path)])


def _is_wild(path: Path) -> bool:
    return any(character in str(path) for character in "*?[")


def _exists_by_name(path: Path) -> bool:
    """Whether a path with brackets exists as it is; a bucket's name has none."""
    if isinstance(path, ObjectPath) and _is_wild(Path(path.parts[1])):
        return False
    return "[" in str(path) and path.exists()


def _fixed_part(path: Path) -> Path:
    """The folders of a glob before the first that is a pattern; of a plain path, its folder."""
    fixed = path.parent
    while _is_wild(fixed) and not _exists_by_name(fixed):
        fixed = fixed.parent
    if isinstance(path, ObjectPath) and len(fixed.parts) < 2:
        raise UserError(f"{path}: expected gs://BUCKET/PATH, with a bucket that is no pattern")
    return fixed


def _matching_objects(path: ObjectPath, root: Path) -> set[Path]:
    """The objects that a glob means."""
    wanted = path.relative_to(root).parts
    below = ((found, found.relative_to(root).parts) for found in as_path(str(root)).rglob("*"))
    return {found for found, names in below if _matches(names, wanted) and found.is_file()}


def _matches(names: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether the parts of a path fit those of a glob; `**` stands for any number of them.

    >>> _matches(("a", "b", "c.txt"), ("**", "*.txt")), _matches((".c.txt",), ("*.txt",))
    (True, False)
    """
    if not wanted or not names:
        return not names and set(wanted) <= {"**"}
    shown = not names[0].startswith(".")
    if wanted[0] == "**":
        return _matches(names, wanted[1:]) or (shown and _matches(names[1:], wanted))
    fits = fnmatchcase(names[0], wanted[0]) and (shown or wanted[0].startswith("."))
    return fits and _matches(names[1:], wanted[1:])


def _named(root: Path, paths: Iterable[Path]) -> list[File]:
    files = [File(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    return sorted(files, key=lambda file: file.name)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
