"""Documents in text files, JSONL, parquet and ArrayRecord, each read by its number.

Nothing is held in memory but where documents begin: eight bytes each for JSONL, the sizes of row
groups for parquet, counts for ArrayRecord.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
import threading
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import SourceConfig
from dsjax.errors import UserError, one_line
from dsjax.places import local_path

PYTHON_STDLIB = "python-stdlib"


class File(NamedTuple):
    """A file of a source. `name` is its path below the source's root: the same on every machine."""

    path: Path
    name: str
    size: int


class Documents(ABC):
    """The documents of one source, in a fixed order, each read when it is asked for.

    Safe to read from several threads. Reading raises `UserError` where the data are broken.
    """

    files: list[File]
    blocks: list[int]
    """Documents in each run that is read from disk as a whole; one run where seeking is free."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> str: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name that decides on which side of the held-out split a document falls."""

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def open_documents(source: SourceConfig) -> Documents:
    """Find the files of `source` and index their documents.

    Raises `UserError` when no file matches, when there is no document, or when a file is not of
    the kind that the source says.
    """
    if source.kind == "text" and source.path == PYTHON_STDLIB:
        documents: Documents = TextFiles(standard_library_files())
    else:
        files = find_files(source.path)
        match source.kind:
            case "text":
                documents = TextFiles(files)
            case "jsonl":
                documents = JsonLines(files, source.text_key)
            case "parquet":
                documents = ParquetRows(files, source.text_key)
            case "array_record":
                documents = ArrayRecords(files)
    if not len(documents):
        raise UserError(
            f"{source.path}: {len(documents.files)} files hold no document; expected some"
        )
    return documents


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def find_files(pattern: str) -> list[File]:
    """The files that match a glob (`**` crosses folders), sorted by name below its fixed part."""
    pattern = str(local_path(os.path.expanduser(pattern), "training data"))
    if os.path.isdir(pattern):
        raise UserError(f"{pattern}: is a folder; expected a glob such as {pattern}/**/*.txt")
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    root = Path(*fixed)
    paths = {Path(path) for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path)}
    if not paths:
        raise UserError(f"{pattern}: no file matches; expected a path or a glob in data.sources")
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


def _named(root: Path, paths: Iterable[Path]) -> list[File]:
    files = [File(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    return sorted(files, key=lambda file: file.name)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _decode(data: bytes, path: Path, begin: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(
            f"{path}: byte {begin + error.start} is 0x{byte:02x}, which is not UTF-8; "
            "convert the file to UTF-8 or leave it out of data.sources"
        ) from None


# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------


class TextFiles(Documents):
    """Each file is one document."""

    def __init__(self, files: list[File]):
        self.files = files
        self.blocks = [len(files)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        path = self.files[index].path
        return _decode(path.read_bytes(), path)

    def key(self, index: int) -> str:
        """The file's name."""
        return self.files[index].name


class Records(Documents):
    """Several documents a file; a document is known as `name:number`, counted from 0."""

    def __init__(self, files: list[File], counts: Sequence[int]):
        self.files = files
        self.blocks = [sum(counts)]
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the file, and the document's number within it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def key(self, index: int) -> str:
        """`name:number`."""
        file, number = self.locate(index)
        return f"{self.files[file].name}:{number}"


class JsonLines(Records):
    """One JSON object a line; the document stands under `text_key`. Blank lines are skipped."""

    def __init__(self, files: list[File], text_key: str):
        self._begins = [_line_begins(file.path) for file in files]
        self._text_key = text_key
        super().__init__(files, [len(begins) for begins in self._begins])

    def __getitem__(self, index: int) -> str:
        file, number = self.locate(index)
        path, begin = self.files[file].path, self._begins[file][number]
        with path.open("rb") as stream:
            stream.seek(begin)
            line = _decode(stream.readline(), path, begin)
        try:
            return _text_of(line, self._text_key)
        except ValueError as error:
            where = f"{path}:{_line_number(path, begin)}"
            raise UserError(
                f"{where}: {error}; expected an object with {self._text_key!r}"
            ) from None


def _line_begins(path: Path) -> array[int]:
    begins, at = array("q"), 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.isspace():
                begins.append(at)
            at += len(line)
    return begins


def _text_of(line: str, text_key: str) -> str:
    """The document in one line of JSON; a `ValueError` says what was found instead."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({one_line(error)})") from None
    if not isinstance(record, dict):
        raise ValueError(f"the line is a JSON {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"the keys are {', '.join(sorted(record)) or 'none'}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} holds a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{text_key!r} holds half of a surrogate pair, which is not text"
        ) from None
    return text


def _line_number(path: Path, begin: int) -> int:
    with path.open("rb") as stream:
        return 1 + stream.read(begin).count(b"\n")


class ParquetRows(Records):
    """One document a row, in the string column `text_key`. Needs pyarrow.

    Parquet is decoded by row groups, so two of them are kept in memory and documents are
    shuffled within groups, not across: the size of the groups bounds memory.
    """

    def __init__(self, files: list[File], text_key: str):
        groups = [_row_groups(file.path, text_key) for file in files]
        super().__init__(files, [sum(rows) for rows in groups])
        self.blocks = [rows for of_file in groups for rows in of_file]
        self._group_ends = list(accumulate(self.blocks))
        self._place_of_group = [
            (f, g) for f, of_file in enumerate(groups) for g in range(len(of_file))
        ]
        self._text_key = text_key
        self._lock = threading.Lock()
        self._column = lru_cache(maxsize=2)(self._read_column)

    def __getitem__(self, index: int) -> str:
        file, number = self.locate(index)
        group = bisect_right(self._group_ends, index)
        row = index - (self._group_ends[group - 1] if group else 0)
        with self._lock:
            column = self._column(group)
        text = column[row].as_py()
        if text is None:
            raise UserError(
                f"{self.files[file].path}: row {number} of column {self._text_key!r} is null; "
                "expected a string"
            )
        return text

    def _read_column(self, group: int) -> Any:
        from pyarrow import parquet

        file, number = self._place_of_group[group]
        with parquet.ParquetFile(self.files[file].path) as stream:
            return stream.read_row_group(number, columns=[self._text_key]).column(0)


def _row_groups(path: Path, text_key: str) -> list[int]:
    """Rows in each row group, once the file is known to hold the column."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; pip install 'dsjax[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as stream:
            metadata, schema = stream.metadata, stream.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {one_line(error)}") from None
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        raise UserError(f"{path}: has no column {text_key!r}; its columns are {columns}")
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {text_key!r} holds {kind}; expected string")
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


class ArrayRecords(Records):
    """One document a record, as UTF-8 bytes. Needs array-record."""

    def __init__(self, files: list[File]):
        self._sources = [_array_record(file.path) for file in files]
        super().__init__(files, [len(source) for source in self._sources])

    def __getitem__(self, index: int) -> str:
        file, number = self.locate(index)
        path = self.files[file].path
        try:
            return self._sources[file][number].decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: byte {error.start} of record {number} is not UTF-8; "
                "expected each record to be a document's text"
            ) from None


def _array_record(path: Path) -> Any:
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError:
        raise UserError(
            f"{path}: reading ArrayRecord needs array-record; pip install 'dsjax[data]'"
        ) from None
    try:
        return ArrayRecordDataSource([str(path)])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as ArrayRecord: {one_line(error)}") from None
