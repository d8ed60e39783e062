"""The JSON object of a request: a body on the port, or a line of a batch file."""

from __future__ import annotations

import codecs
import json
from typing import Any, NoReturn

SIGNATURES = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of data that are not UTF-8; UTF-32's mark begins with UTF-16's, so it comes first."""

_KINDS = {
    list: "array", str: "string", int: "number", float: "number", bool: "boolean",
    type(None): "null",
}  # fmt: skip


def foreign_encoding(data: bytes) -> str | None:
    """Name the encoding or compression that `data` begins with, if it is not plain UTF-8.

    >>> foreign_encoding("{}".encode("utf-16")), foreign_encoding(b"{}")
    ('UTF-16', None)
    """
    return next((name for mark, name in SIGNATURES.items() if data.startswith(mark)), None)


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse strict JSON in UTF-8, with or without a byte order mark. A repeated key counts last.

    >>> parse_object(b'{"a": 1, "a": 2}')
    {'a': 2}

    Raises:
        ValueError: the message is a predicate, as in "is not JSON: ...".
    """
    if found := foreign_encoding(data):
        raise ValueError(f"is {found}; expected UTF-8")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:  # also what is wrong with UTF-8, and integers of 4,300 digits
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {_KINDS[type(value)]}; expected an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
