"""Parquet files by row groups, on a disk or in a bucket; damage is named by the row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsjax.errors import UserError, one_line
from dsjax.places import ObjectPath


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a file as pyarrow's `ParquetFile`, which checks pages that have a checksum.

    Raises:
        UserError: pyarrow is missing, or this is no parquet file.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; pip install 'dsjax[data]'"
        ) from None
    # Of an object pyarrow fetches the footer and the columns that it needs.
    source: Any = path.open("rb") if isinstance(path, ObjectPath) else path
    with _naming_damage(str(path)):
        opened = parquet.ParquetFile(source, page_checksum_verification=True)
    with opened:
        yield opened


def read_group(opened: Any, path: Path, group: int, columns: Sequence[str] | None = None) -> Any:
    """Read a row group as a table.

    Args:
        opened: the file.
        path: its path, for messages.
        group: the number of the row group, from 0.
        columns: names of those to read; None: all.

    Raises:
        UserError: the row group is damaged.
    """
    with _naming_damage(f"{path}: row group {group}"):
        return opened.read_row_group(group, columns=columns)


def read_group_rows(opened: Any, path: Path, group: int) -> Iterator[dict[str, Any]]:
    """Read the rows of a row group, a few hundred in memory at a time.

    Args:
        opened: the file.
        path: its path, for messages.
        group: the number of the row group, from 0.

    Raises:
        UserError: the row group is damaged, or holds text that is not UTF-8.
    """
    where = f"{path}: row group {group}"
    with _naming_damage(where):
        batches = opened.iter_batches(batch_size=256, row_groups=[group])
    while True:
        with _naming_damage(where):
            batch = next(batches, None)
            if batch is None:
                return
            rows = batch.to_pylist()
        yield from rows


def check_text_column(opened: Any, path: Path, name: str) -> None:
    """Check that a column is there and holds strings, in any of Arrow's types for them.

    Args:
        opened: the file.
        path: its path, for messages.
        name: the column.

    Raises:
        UserError: it is not there, or holds something else.
    """
    schema = opened.schema_arrow
    if name not in schema.names:
        raise UserError(
            f"{path}: has no column {name!r}; its columns are {', '.join(schema.names)}"
        )
    kind = schema.field(name).type
    if not _is_text(kind):
        raise UserError(f"{path}: column {name!r} holds {kind}; expected string")


def _is_text(kind: Any) -> bool:
    from pyarrow import BaseExtensionType, types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    if isinstance(kind, BaseExtensionType):  # such as arrow.json
        return _is_text(kind.storage_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


@contextmanager
def _naming_damage(where: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except UserError:
        raise  # an object store's error says all that is known
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{where}: cannot be read as parquet: {one_line(error)}") from None
