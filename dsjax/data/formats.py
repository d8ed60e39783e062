"""Documents in text files, JSONL, parquet and ArrayRecord, each read by its number.

Nothing is held in memory but where documents begin: eight bytes each for JSONL, the sizes of row
groups for parquet, counts for ArrayRecord. In a bucket a document of JSONL is one request, and so
is a row group's column of parquet; what is read in order is read ahead.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from dsjax.config import SourceConfig
from dsjax.data.files import File, find_files, standard_library_files
from dsjax.data.lines import (
    MAX_BYTES,
    Line,
    decode,
    is_compressed,
    parse_object,
    read_bytes,
    read_lines,
    read_text,
)
from dsjax.data.parquet import check_text_column, open_parquet, read_group
from dsjax.errors import UserError, one_line
from dsjax.places import REQUESTS, ObjectPath, ahead, each, local_path

PYTHON_STDLIB = "python-stdlib"


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
        return self.read(range(len(self)))

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        """These documents, in this order; in a bucket several are asked for at a time."""
        return ahead(self.__getitem__, indices, self.files[0].path)

    @property
    def threads(self) -> int:
        """How many readers of single documents are worth having: in a bucket they mostly wait."""
        return REQUESTS if isinstance(self.files[0].path, ObjectPath) else 1


def open_documents(source: SourceConfig) -> Documents:
    """Find the files of `source` and index their documents.

    Raises `UserError` when no file matches, when there is no document, or when a file is not of
    the kind that the source says.
    """
    if source.kind == "text" and source.path == PYTHON_STDLIB:
        documents: Documents = TextFiles(standard_library_files())
    else:
        files = find_files(source.path, "data.sources")
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
        return read_text(self.files[index].path)

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
    """One JSON object a line; the document stands under `text_key`. Blank lines are skipped.

    In a plain file each document is read alone. Compressed files are decompressed whole: two of
    them are kept in memory, and documents are shuffled within them, as in `ParquetRows`.
    """

    def __init__(self, files: list[File], text_key: str):
        self._begins = each(_line_begins, files, files[0].path)
        self._text_key = text_key
        counts = [len(begins) for begins in self._begins]
        super().__init__(files, counts)
        self.blocks = []
        for is_whole, run in groupby(
            zip(files, counts, strict=True), key=lambda pair: is_compressed(pair[0].path)
        ):
            sizes = [count for _, count in run]
            self.blocks += sizes if is_whole else [sum(sizes)]
        self._lock = threading.Lock()
        self._decompressed = lru_cache(maxsize=2)(read_bytes)

    def __getitem__(self, index: int) -> str:
        number, line = self.locate(index)
        file, begins = self.files[number], self._begins[number]
        begin = begins[line]
        # Between two lines that are not blank there are only blank ones, which may be read too.
        end = begins[line + 1] if line + 1 < len(begins) else None
        if is_compressed(file.path):
            with self._lock:
                data = self._decompressed(file.path)[begin:end]
        else:
            data = file.read(begin, end)
        try:
            return _text_of(data.decode(), self._text_key)
        except ValueError:
            raise self._error(file, _line_at(file, begin)) from None

    def __iter__(self) -> Iterator[str]:
        """All, from front to back: a request for many of them, where one by one is one for each."""
        for file in self.files:
            for line in read_lines(file.path):
                data = line[2]
                if data.isspace():
                    continue
                try:
                    text = _text_of(data.decode(), self._text_key)
                except ValueError:
                    raise self._error(file, line) from None
                yield text

    def _error(self, file: File, line: Line) -> UserError:
        """What is wrong with a line."""
        number, begin, data = line
        where = f"{file.path}:{number}"
        try:
            _text_of(decode(data, where, begin), self._text_key)
        except UserError as error:
            return error
        except ValueError as error:
            return UserError(f"{where}: {error}; expected an object with {self._text_key!r}")
        return UserError(f"{where}: changed while it was read")


def _line_begins(file: File) -> array[int]:
    begins, end = array("q"), 0
    for _, begin, data in read_lines(file.path):
        if not data.isspace():
            begins.append(begin)
        end = begin + len(data)
    if end > MAX_BYTES and is_compressed(file.path):
        raise UserError(
            f"{file.path}: has {end:,} bytes once decompressed; at most {MAX_BYTES:,} are kept in "
            "memory; split it, or decompress it"
        )
    return begins


def _text_of(line: str, text_key: str) -> str:
    """The document in one line of JSON; a `ValueError` says what was found instead."""
    record = parse_object(line)
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


def _line_at(file: File, begin: int) -> Line:
    """The line that begins at this byte."""
    found = next((line for line in read_lines(file.path) if line[1] >= begin), None)
    if found is None:
        raise UserError(f"{file.path}: became shorter while it was read")
    return found


class ParquetRows(Records):
    """One document a row, in the string column `text_key`. Needs pyarrow.

    Parquet is decoded by row groups, so two of them are kept in memory and documents are
    shuffled within groups, not across: the size of the groups bounds memory.
    """

    def __init__(self, files: list[File], text_key: str):
        groups = each(lambda file: _row_groups(file.path, text_key), files, files[0].path)
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
        where = f"{self.files[file].path}: row {number} of column {self._text_key!r}"
        try:
            text = column[row].as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8: {error}") from None
        if text is None:
            raise UserError(f"{where} is null; expected a string")
        return text

    def _read_column(self, group: int) -> Any:
        file, number = self._place_of_group[group]
        path = self.files[file].path
        with open_parquet(path) as opened:
            return read_group(opened, path, number, [self._text_key]).column(0)


def _row_groups(path: Path, text_key: str) -> list[int]:
    """Rows in each row group, once the file is known to hold the column."""
    with open_parquet(path) as opened:
        check_text_column(opened, path, text_key)
        metadata = opened.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


class ArrayRecords(Records):
    """One document a record, as UTF-8 bytes. Needs array-record, which reads disks only."""

    def __init__(self, files: list[File]):
        self._sources = [_array_record(file.path) for file in files]
        super().__init__(files, [len(source) for source in self._sources])

    def __getitem__(self, index: int) -> str:
        file, number = self.locate(index)
        path = self.files[file].path
        try:
            return self._sources[file][number].decode()
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path}: record {number} is damaged: {one_line(error)}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: byte {error.start} of record {number} is not UTF-8; "
                "expected each record to be a document's text"
            ) from None


def _array_record(path: Path) -> Any:
    local_path(path, "an ArrayRecord file (parquet and jsonl are read in buckets)")
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError:
        raise UserError(
            f"{path}: reading ArrayRecord needs array-record; pip install 'dsjax[data]'"
        ) from None
    try:
        return ArrayRecordDataSource([str(path)])
    except (RuntimeError, ValueError) as error:
        why = one_line(error) or "it is truncated"
        raise UserError(f"{path}: cannot be read as ArrayRecord: {why}") from None
