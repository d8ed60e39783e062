"""Headers that nobody would write: 10,000 of safetensors, 1,000 of GGUF.

Whatever a file holds, its reader returns what lies within the file, or raises one line. It takes no
other way, no time, and no memory but a small multiple of the file. Cases are drawn by hypothesis, the
same ones every time.
"""

from __future__ import annotations

import json
import math
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from dsjax.checkpoint.gguf import read_gguf
from dsjax.checkpoint.safetensors import DTYPES, INDEX, read_folder, read_header
from dsjax.errors import UserError

SECONDS = 2.0
MEMORY = 2_000_000
"""Beside fifty times the file. No file here has more than some kilobytes, but what they claim!"""


def cases(count: int) -> Callable[..., Any]:
    """So many, the same ones every time, and none kept in a folder."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_within_bounds(read: Callable[[Path], Any], path: Path, size: int) -> Any:
    """What the reader returns, or None if it refuses; anything else fails."""
    tracemalloc.reset_peak()
    before, begin = tracemalloc.get_traced_memory()[0], time.monotonic()
    try:
        found = read(path)
    except UserError as error:
        assert str(error).isprintable() and str(path.parent) in str(error)
        found = None
    assert time.monotonic() - begin < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < MEMORY + 50 * size
    return found


def check_header(file: Path, data: bytes) -> None:
    """Our reader keeps its word; and what it takes, the format's own library takes as the same."""
    file.write_bytes(data)
    entries = read_within_bounds(read_header, file, len(data))
    if entries is None:
        return
    for entry in entries.values():
        assert 8 <= entry.start <= entry.start + entry.nbytes <= len(data)
        assert entry.nbytes == math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    with safe_open(file, "np") as theirs:
        assert set(theirs.keys()) == entries.keys()
        for name, entry in entries.items():
            found = theirs.get_slice(name)
            assert (found.get_dtype(), tuple(found.get_shape())) == (entry.dtype, entry.shape)


# ---------------------------------------------------------------------------------------------
# What headers are made of
# ---------------------------------------------------------------------------------------------

HOSTILE = st.sampled_from(
    [
        None,
        True,
        False,
        -1,
        0,
        1,
        0.5,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63,
        2**64,
        10**30,
        float("nan"),
    ]
    + [float("inf"), "", "F32", "f32", "\0", "\x1b[2J", "\ud800", "../x", [], {}, [[]], [1, 2]]
    + [[2**32, 2**32], [0, 2**62, 2**62], [-1, -4], [1] * 100, {"dtype": "F32"}, [0, 4], [4, 0]]
)
NAMES = st.one_of(
    st.text(max_size=6), st.sampled_from(["a", "__metadata__", "dtype", "weight_map"])
)
TREES = st.recursive(
    st.one_of(HOSTILE, st.integers(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def sound_headers(draw: st.DrawFn) -> dict[str, Any]:
    """Tensors one after the other, as the format wants them."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, st.text(max_size=3), max_size=2))
    end = 0
    for name in draw(st.lists(NAMES.filter("__metadata__".__ne__), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header


def written(header: Any, data: int, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def data_of(header: dict[str, Any]) -> int:
    return max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)


@st.composite
def spoiled_headers(draw: st.DrawFn) -> bytes:
    """One value of a sound header is another, at any depth."""
    header = draw(sound_headers())
    size = data_of(header)
    node: Any = header
    while isinstance(node, dict | list) and node:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or draw(st.booleans()):
            node[key] = draw(TREES)
            break
        node = node[key]
    return written(header, size)


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes of a file flipped, left out or put in, or its length another."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "number", "move"]))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=9)) + data[at:]
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
            data = data[:at] + struct.pack("<Q", number) + data[at + 8 :]
        else:
            to = draw(st.integers(0, len(data)))
            data = data[:at] + data[to : to + 40] + data[at:]
    return data


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    header = draw(sound_headers())
    return damage(draw, written(header, data_of(header)))


# ---------------------------------------------------------------------------------------------
# 10,000 of safetensors
# ---------------------------------------------------------------------------------------------


@cases(1000)
@given(header=sound_headers())
def test_sound_headers_are_read(place: Path, header: dict[str, Any]) -> None:
    """The control: all but names that are no printable text."""
    file = place / "sound.safetensors"
    file.write_bytes(written(header, data_of(header)))
    try:
        names = read_header(file).keys()
    except UserError as error:
        assert "printable" in str(error) or "__metadata__" in str(error)
    else:
        assert names == header.keys() - {"__metadata__"}
    check_header(file, file.read_bytes())


@cases(3000)
@given(data=damaged_files())
def test_damaged_files_are_read_or_refused(place: Path, data: bytes) -> None:
    check_header(place / "damaged.safetensors", data)


@cases(3000)
@given(data=spoiled_headers())
def test_spoiled_headers_are_read_or_refused(place: Path, data: bytes) -> None:
    check_header(place / "spoiled.safetensors", data)


@cases(1000)
@given(text=st.binary(max_size=80), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_are_read_or_refused(place: Path, text: bytes, length: int | None) -> None:
    said = len(text) if length is None else length
    check_header(place / "bytes.safetensors", struct.pack("<Q", said) + text)


@cases(1000)
@given(tree=TREES, data=st.integers(0, 8))
def test_any_json_is_read_or_refused(place: Path, tree: Any, data: int) -> None:
    check_header(place / "json.safetensors", written(tree, data))


@cases(1000)
@given(header=sound_headers(), tree=TREES, spoiled=st.integers(0, 2))
def test_any_index_is_read_or_refused(
    place: Path, header: dict[str, Any], tree: Any, spoiled: int
) -> None:
    folder = place / "folder"
    folder.mkdir(exist_ok=True)
    data = written(header, data_of(header))
    (folder / "shard").write_bytes(data)
    names: dict[str, Any] = dict.fromkeys(header.keys() - {"__metadata__"}, "shard")
    if spoiled and names:
        names[next(iter(names))] = tree
    index = tree if spoiled == 2 else {"weight_map": names}
    (folder / INDEX).write_text(json.dumps(index))
    found = read_within_bounds(read_folder, folder, len(data))
    assert found is None or found.keys() == names.keys()


def test_the_library_is_there_to_disagree(place: Path) -> None:
    """The second opinion can differ: it refuses what is truncated."""
    file = place / "truncated.safetensors"
    file.write_bytes(written({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7))
    with pytest.raises(SafetensorError):
        safe_open(file, "np").__enter__()


# ---------------------------------------------------------------------------------------------
# 1,000 of GGUF
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound_gguf(place: Path) -> bytes:
    test_gguf.write(place / "sound.gguf", test_gguf.CONFIGS["llama"])
    return (place / "sound.gguf").read_bytes()


@cases(1000)
@given(draw=st.data())
def test_gguf_files_are_read_or_refused(
    place: Path, sound_gguf: bytes, draw: st.DataObject
) -> None:
    """Damaged in the header, which comes first."""
    end = sound_gguf.index(b"output_norm.weight") + 100
    file = place / "model.gguf"
    header = damage(lambda strategy: draw.draw(strategy), sound_gguf[:end])
    file.write_bytes(header + sound_gguf[end:])
    read_within_bounds(read_gguf, file, file.stat().st_size)
