"""Headers that nobody would write: 10,000 of safetensors, 1,000 of GGUF.

Whatever a file holds, its reader returns what lies within the file, or raises one line: nothing
else, at once, and in memory that is a small multiple of the file. hypothesis draws what is sound,
and a seed; ten damages of it are ten cases, the same ones every time.
"""

from __future__ import annotations

import copy
import json
import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_within_bounds(read: Callable[[Path], Any], path: Path, size: int) -> Any:
    """What the reader returns, or None if it refuses; anything else fails."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        found = read(path)
    except UserError as error:
        assert str(error).isprintable() and str(path.parent) in str(error)
        found = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.monotonic() - begin < SECONDS
    assert peak < MEMORY + 50 * size
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

NUMBERS = [-1, 0, 1, 0.5, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30]
TEXTS = ["", "F32", "f32", "\0", "\x1b[2J", "\ud800", "../x"]
LISTS = [[], [[]], [1, 2], [0, 4], [4, 0], [-1, -4], [1] * 100, [2**32] * 2, [0, 2**62, 2**62]]
OTHERS = [None, True, False, math.nan, math.inf, {}, {"dtype": "F32"}]
HOSTILE = [*NUMBERS, *TEXTS, *LISTS, *OTHERS]
NAMES = st.one_of(
    st.text(max_size=6), st.sampled_from(["a", "__metadata__", "dtype", "weight_map"])
)
TREES = st.recursive(
    st.one_of(st.sampled_from(HOSTILE), st.integers(), st.text(max_size=4)),
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


def spoiled(header: dict[str, Any], random: Random) -> bytes:
    """The header with another value at some depth."""
    header, size = copy.deepcopy(header), data_of(header)
    node: Any = header
    while isinstance(node, dict | list) and node:
        key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or random.random() < 0.4:
            node[key] = random.choice([*HOSTILE, [random.choice(HOSTILE), random.choice(HOSTILE)]])
            break
        node = node[key]
    return written(header, size)


def damaged(data: bytes, random: Random) -> bytes:
    """Some bytes flipped, left out, put in, moved, or read as a number that is another."""
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(data))
        kind = random.choice(["flip", "cut", "insert", "number", "move"])
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << random.randint(0, 7)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + random.randbytes(random.randint(1, 9)) + data[at:]
        elif kind == "number":
            number = random.choice([0, 1, 255, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
            data = data[:at] + struct.pack("<Q", number) + data[at + 8 :]
        else:
            begin = random.randint(0, len(data))
            data = data[:at] + data[begin : begin + 40] + data[at:]
    return data


# ---------------------------------------------------------------------------------------------
# 10,000 of safetensors
# ---------------------------------------------------------------------------------------------


@cases(500)
@given(header=sound_headers())
def test_sound_headers_are_read(place: Path, header: dict[str, Any]) -> None:
    """The control: all but names that are no printable text."""
    file = place / "sound.safetensors"
    file.write_bytes(written(header, data_of(header)))
    try:
        names = read_header(file).keys()
    except UserError as error:
        assert "printable" in str(error)
    else:
        assert names == header.keys() - {"__metadata__"}
    check_header(file, file.read_bytes())


@cases(400)
@given(header=sound_headers(), seed=st.integers(0, 2**32))
def test_damaged_files_are_read_or_refused(place: Path, header: dict[str, Any], seed: int) -> None:
    random, data = Random(seed), written(header, data_of(header))
    for _ in range(10):
        check_header(place / "damaged.safetensors", damaged(data, random))


@cases(400)
@given(header=sound_headers(), seed=st.integers(0, 2**32))
def test_spoiled_headers_are_read_or_refused(
    place: Path, header: dict[str, Any], seed: int
) -> None:
    random = Random(seed)
    for _ in range(10):
        check_header(place / "spoiled.safetensors", spoiled(header, random))


@cases(500)
@given(text=st.binary(max_size=80), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_are_read_or_refused(place: Path, text: bytes, length: int | None) -> None:
    said = len(text) if length is None else length
    check_header(place / "bytes.safetensors", struct.pack("<Q", said) + text)


@cases(500)
@given(tree=TREES, data=st.integers(0, 8))
def test_any_json_is_read_or_refused(place: Path, tree: Any, data: int) -> None:
    check_header(place / "json.safetensors", written(tree, data))


@cases(500)
@given(tree=TREES, as_map=st.booleans())
def test_any_index_is_read_or_refused(place: Path, tree: Any, as_map: bool) -> None:
    folder = place / "folder"
    folder.mkdir(exist_ok=True)
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    (folder / "shard").write_bytes(written({"a": tensor}, 4))
    index = {"weight_map": {"a": "shard", "b": tree}} if as_map else tree
    (folder / INDEX).write_text(json.dumps(index))
    found = read_within_bounds(read_folder, folder, len(json.dumps(index)))
    assert found is None, "no index that is drawn here is right"


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
def sound_gguf(place: Path) -> Path:
    test_gguf.write(place / "sound.gguf", test_gguf.CONFIGS["llama"])
    return place / "sound.gguf"


@cases(100)
@given(seed=st.integers(0, 2**32))
def test_gguf_files_are_read_or_refused(place: Path, sound_gguf: Path, seed: int) -> None:
    """Damaged in the header, which comes first."""
    data, random = sound_gguf.read_bytes(), Random(seed)
    end = data.index(b"output_norm.weight") + 100
    file = place / "model.gguf"
    for _ in range(10):
        file.write_bytes(damaged(data[:end], random) + data[end:])
        read_within_bounds(read_gguf, file, file.stat().st_size)
