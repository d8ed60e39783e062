"""Rows of files, of whatever columns: JSONL, JSON, CSV and parquet, on a disk or in a bucket.

All but parquet may be compressed, as the ends of their names say: see `lines`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dsjax.data.lines import COMPRESSED, decode, parse_object, read_lines, read_text
from dsjax.data.parquet import open_parquet, read_group_rows
from dsjax.errors import UserError, one_line

_SUFFIXES = (
    *(f".{kind}{end}" for kind in ("jsonl", "json", "csv") for end in ("", *COMPRESSED)),
    ".parquet",
)
_TITLES = ("question", "problem", "prompt")
"""One of which a CSV file has, if it has titles at all."""

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file, or of all such files of a folder, by the files' names; where each stands.

    Lines are counted from 1, rows of parquet from 0, as in `data.sources`.

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
        UserError: it has none of them, nothing under it, or bytes instead of text.
    """
    lowered = {title.lower().replace(" ", "_"): value for title, value in row.items()}
    for name in names:
        if isinstance(value := lowered.get(name), bytes):
            raise UserError(f"column {name} holds binary; expected string")
        if value is not None:
            return value
    raise UserError(
        f"expected a column {' or '.join(names)}, found {', '.join(row) or 'no column at all'}"
    )


def _suffix(file: Path) -> str | None:
    return next((s for s in reversed(_SUFFIXES) if file.name.lower().endswith(s)), None)


def _read(file: Path) -> Iterator[tuple[str, Row]]:
    suffix = _suffix(file)
    if suffix is None:
        raise UserError(f"{file}: expected a name that ends with {', '.join(_SUFFIXES)}")
    match suffix.split(".")[1]:
        case "parquet":
            yield from _parquet(file)
        case "csv":
            yield from _csv(file)
        case "json":
            yield from _json(file)
        case _:
            yield from _json_lines(file)


def _json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    for number, begin, data in read_lines(file):
        if not data.isspace():
            where = f"{file}:{number}"
            try:
                yield where, parse_object(decode(data, where, begin))
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"{where}: {error}; expected an object") from None


def _json(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        tree = json.loads(read_text(file))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON: {one_line(error)}") from None
    if not isinstance(tree, list):
        raise UserError(f"{file}: expected a list of objects, found {type(tree).__name__}")
    for number, row in enumerate(tree, 1):
        if not isinstance(row, dict):
            found = type(row).__name__
            raise UserError(f"{file}: entry {number}: expected an object, found {found}")
        yield f"{file}: entry {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**27)
    texts = (decode(data, f"{file}:{n}", begin) for n, begin, data in read_lines(file))
    lines = csv.reader(texts, strict=True)
    titles: list[str] | None = None
    begin = 1
    try:
        for cells in lines:
            where, begin = f"{file}:{begin}", lines.line_num + 1
            if not cells:  # a blank line
                continue
            if titles is None:
                titled = any(title.strip().lower() in _TITLES for title in cells)
                titles = cells if titled else [str(n) for n in range(len(cells))]
                if titled:
                    continue
            if len(cells) != len(titles):
                raise UserError(f"{where}: {len(cells)} cells; expected {len(titles)}")
            yield where, {**dict(zip(titles, cells, strict=True)), "file": _stem(file)}
    except csv.Error as error:
        raise UserError(f"{file}:{lines.line_num}: is not CSV: {one_line(error)}") from None


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    with open_parquet(file) as opened:
        groups = (read_group_rows(opened, file, n) for n in range(opened.num_row_groups))
        for number, row in enumerate(chain.from_iterable(groups)):
            yield f"{file}: row {number}", row


def _stem(file: Path) -> str:
    """The name without its known suffix."""
    return file.name[: -len(_suffix(file) or "")]
