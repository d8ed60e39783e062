import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsjax.checkpoint.safetensors import INDEX, read_folder, read_header
from dsjax.errors import UserError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of any header, honest or not."""

    def write(header: object, data: int, length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file = tmp_path / "model.safetensors"
        said = len(text) if length is None else length
        file.write_bytes(said.to_bytes(8, "little") + text + bytes(data))
        return file

    return write


def refusal(function: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(UserError) as error:
        function(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = [np.float32, np.float64, np.float16, np.int32, np.uint8, ml_dtypes.bfloat16]
    tensors = {
        np.dtype(kind).name: rng.integers(0, 100, (3, i + 1)).astype(kind)
        for i, kind in enumerate(kinds)
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    entries = read_header(tmp_path / "x.safetensors")
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        read = entries[name].read()
        assert read.dtype == tensor.dtype
        assert read.tobytes() == tensor.tobytes()
        assert not read.flags.writeable


def test_an_honest_file_of_two_tensors_is_read(write: Callable[..., Path]) -> None:
    # The control for everything below: only the damage makes those fail.
    entries = read_header(write({"a": F32, "b": NEXT}, 16))
    assert [entry.nbytes for entry in entries.values()] == [8, 8]
    assert entries["b"].start == entries["a"].start + 8


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": F32, "b": NEXT}, 15, "truncated: its tensors take 16 bytes, the file has 15"),
        ({"a": F32, "b": NEXT}, 17, "1 bytes at its end belong to no tensor"),
        ({"a": F32, "b": F32}, 8, "b begins at byte 0, inside the tensor before it"),
        ({"a": F32, "b": NEXT | {"data_offsets": [12, 20]}}, 20, "bytes 8 to 12, before b"),
        ({"a": F32 | {"shape": [3]}}, 8, "takes 12 bytes, but its data_offsets [0, 8] hold 8"),
        ({"a": F32 | {"shape": [2**40, 2**40]}}, 8, "are not sizes"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, 8, "hold -8"),
        ({"a": F32 | {"data_offsets": [-8, 0]}}, 8, "are not sizes"),
        ({"a": F32 | {"data_offsets": [0]}}, 8, "are not sizes"),
        ({"a": F32 | {"shape": [2.0]}}, 8, "are not sizes"),
        ({"a": F32 | {"shape": [True, 2]}}, 8, "are not sizes"),
        ({"a": F32 | {"dtype": "F99"}}, 8, "unknown dtype 'F99'"),
        ({"a": F32 | {"dtype": ["F32"]}}, 8, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "dtype, shape and data_offsets"),
        ({"a": [0, 8]}, 8, "dtype, shape and data_offsets"),
        ({"a\nb": F32}, 8, "printable"),
        ([F32], 8, "expected a JSON object, found list"),
        (b'{"a": ', 0, "not the JSON expected"),
        (b"\xff\xfe", 0, "not the JSON expected"),
        (b"[" * 100_000, 0, "not the JSON expected"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), 8, "'a' stands twice"),
    ],
)
def test_a_header_that_lies_is_refused(
    write: Callable[..., Path], header: object, data: int, says: str
) -> None:
    assert says in refusal(read_header, write(header, data))


def test_a_header_is_measured_before_it_is_read(write: Callable[..., Path]) -> None:
    assert "the limit is 20000000" in refusal(read_header, write(b"{}", 0, length=2**60))
    assert "truncated" in refusal(read_header, write(b"{}", 0, length=9_000_000))


def test_every_truncation_of_a_file_is_noticed(write: Callable[..., Path]) -> None:
    file = write({"a": F32, "b": NEXT}, 16)
    for size in range(file.stat().st_size - 1, -1, -1):
        os.truncate(file, size)
        refusal(read_header, file)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(read_header, tmp_path / "absent.safetensors")


def test_shards_are_read_as_their_index_says(
    write_folder: Callable[..., Path], weights: dict[str, np.ndarray]
) -> None:
    entries = read_folder(write_folder(weights, shards=3))
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    assert len({entry.file for entry in entries.values()}) == 3


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "..", "", "a\\b", 5, None]
)
def test_a_shard_outside_the_folder_is_refused(
    write_folder: Callable[..., Path], weights: dict[str, np.ndarray], shard: object
) -> None:
    folder = write_folder(weights, shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    assert "lm_head.weight lies in" in refusal(read_folder, folder)


def test_an_index_that_lies_is_refused(
    write_folder: Callable[..., Path], weights: dict[str, np.ndarray]
) -> None:
    folder = write_folder(weights, shards=2)
    honest = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(honest.values()))

    def with_map(weight_map: object) -> Path:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return folder

    read_folder(with_map(honest))
    name = next(name for name, shard in honest.items() if shard == second)
    assert f"says that {first} holds {name}" in refusal(
        read_folder, with_map(honest | {name: first})
    )
    assert "says that" in refusal(read_folder, with_map(honest | {"extra": first}))
    assert "holds lm_head.weight, but" in refusal(
        read_folder, with_map({k: v for k, v in honest.items() if k != "lm_head.weight"})
    )
    assert "cannot be read" in refusal(read_folder, with_map(honest | {"extra": "third"}))
    assert "expected a weight_map" in refusal(read_folder, with_map({}))
    assert "expected a weight_map" in refusal(read_folder, with_map([]))
    (folder / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}')
    assert "'a' stands twice" in refusal(read_folder, folder)


def test_a_folder_without_weights_or_with_two_sets_of_them_is_refused(
    write_folder: Callable[..., Path], weights: dict[str, np.ndarray]
) -> None:
    folder = write_folder(weights)
    (folder / INDEX).write_text("{}")
    assert "remove the one that is stale" in refusal(read_folder, folder)
    (folder / INDEX).unlink()
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(read_folder, folder)
