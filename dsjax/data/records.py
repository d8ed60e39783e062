"""Rows of files, of whatever columns: JSONL, JSON, CSV and parquet, on a disk or in a bucket."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from dsjax.errors import UserError, one_line

MAX_BYTES = 2**31
"""Of one file, unpacked. LiveCodeBench's largest has 1.3 GB."""

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz")
_TITLES = ("question", "problem", "prompt")
"""One of which a CSV file has, if it has titles at all."""

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file, or of all such files of a folder, by the files' names; where each stands.

    A CSV file whose first line holds no known title has none, as MMLU's: its columns are "0", "1",
    and so on. Its file's name without the suffix is added as "file".

    Raises:
        UserError: nothing is there, or it cannot be read; the message names file and line.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) is not None)
    if not files:
        raise UserError(f"{path}: holds no file that ends with {', '.join(_SUFFIXES)}")
    for file in files:
        yield from _read(file)


def column(row: Row, *names: str) -> Any:
    """The value of the first of these titles that the row has, whatever their case.

    Raises:
        UserError: it has none of them, or nothing under it.
    """
    lowered = {title.lower().replace(" ", "_"): value for title, value in row.items()}
    for name in names:
        if (value := lowered.get(name)) is not None:
            return value
    raise UserError(
        f"expected a column {' or '.join(names)}, found {', '.join(row) or 'no column at all'}"
    )


def _suffix(file: Path) -> str | None:
    return next((s for s in reversed(_SUFFIXES) if file.name.lower().endswith(s)), None)


def _read(file: Path) -> Iterator[tuple[str, Row]]:
    match _suffix(file):
        case ".parquet":
            yield from _parquet(file)
        case ".csv":
            yield from _csv(file)
        case ".json":
            yield from _json(file)
        case ".jsonl" | ".jsonl.gz":
            yield from _json_lines(file)
        case _:
            raise UserError(f"{file}: expected a name that ends with {', '.join(_SUFFIXES)}")


@contextmanager
def _open(file: Path) -> Iterator[TextIO]:
    with ExitStack() as stack:
        try:
            if file.stat().st_size > MAX_BYTES:
                raise UserError(f"{file}: has more than {MAX_BYTES} bytes")
            data: Any = stack.enter_context(file.open("rb"))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        if file.name.lower().endswith(".gz"):
            data = stack.enter_context(gzip.open(data))
        yield stack.enter_context(io.TextIOWrapper(data, encoding="utf-8-sig", newline=""))


def _json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _object(json.loads(line), f"{file}:{number}")
        except (ValueError, RecursionError, EOFError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}: is not JSON lines: {one_line(error)}") from None


def _json(file: Path) -> Iterator[tuple[str, Row]]:
    with _open(file) as stream:
        try:
            tree = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: is not JSON: {one_line(error)}") from None
    if not isinstance(tree, list):
        raise UserError(f"{file}: expected a list of objects, found {type(tree).__name__}")
    for number, row in enumerate(tree, 1):
        yield _object(row, f"{file}: entry {number}")


def _object(row: Any, where: str) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return where, row


def _csv(file: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**27)
    with _open(file) as stream:
        try:
            lines = csv.reader(stream)
            first = next(lines, None)
            if first is None:
                return
            titled = any(
                title.strip().lower() in ("question", "problem", "prompt") for title in first
            )
            titles = first if titled else [str(n) for n in range(len(first))]
            rows: Iterable[list[str]] = lines if titled else (first, *lines)
            for number, line in enumerate(rows, 1):
                row = {**dict(zip(titles, line, strict=False)), "file": file.stem}
                yield f"{file}: row {number}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}: is not CSV: {one_line(error)}") from None


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{file}: reading parquet needs pyarrow: pip install 'dsjax[data]'"
        ) from None
    try:
        with file.open("rb") as data, parquet.ParquetFile(data) as opened:
            batches = (batch.to_pylist() for batch in opened.iter_batches(batch_size=256))
            for number, row in enumerate(chain.from_iterable(batches), 1):
                yield f"{file}: row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{file}: is not parquet: {one_line(error)}") from None
