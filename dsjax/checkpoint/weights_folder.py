"""Weights alone, as dsjax keeps them: what orbax reads, and what can be read without it.

    folder/config.yaml          the model, as in configs/model/
    folder/tokenizer/           tokenizer, chat template, generation_config.json, as they came
    folder/huggingface/         config.json and the rest, as they came
    folder/weights/PATH/        one array of the model, stacked over layers and experts
    folder/manifest.json        digest of every file, shape and dtype of every array

An array is a zarr as orbax writes it without OCDBT: a file for each chunk, its numbers as they are
in memory. Chunks cut only the stack, layers or experts. So each tensor of the released files lies
in one piece in one file, and can be mapped, read and written like a tensor of safetensors. What is
stored as FP8 has its float32 scales beside it, as the array `PATH_scale_inv`, stacked alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import FP8, Tensor, tensors
from dsjax.checkpoint.safetensors import DTYPES, MAX_RANK, Entry
from dsjax.errors import UserError
from dsjax.places import each
from dsjax.small_files import read_json

WEIGHTS = "weights"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
RELEASED = "huggingface"
SCALE = "_scale_inv"

CHUNK_BYTES = 1 << 28
"""What a chunk takes at most, unless one tensor takes more: 16 of V3's experts in FP8."""

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"

# zarr spells types as numpy does, and those of ml_dtypes by their names.
_ZARR = {
    name: dtype.str if dtype.kind == "f" and dtype.isbuiltin == 1 else dtype.name
    for name, dtype in ((name, DTYPES[name]) for name in ("F32", "F16", "BF16", FP8))
}


def chunk_stack(stack: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
    """How many layers and experts lie in one chunk, when one tensor takes `nbytes`.

    As many of the last axis as `CHUNK_BYTES` hold, then of the one before; only divisors, because
    zarr would pad a chunk at the edge.

    >>> chunk_stack((58, 256), 2048 * 7168), chunk_stack((58,), 4 * 7168), chunk_stack((), 9)
    ((1, 16), (58,), ())
    """
    chunk = [1] * len(stack)
    for axis in reversed(range(len(stack))):
        room = max(CHUNK_BYTES // nbytes, 1)
        chunk[axis] = max(
            n for n in range(1, stack[axis] + 1) if stack[axis] % n == 0 and n <= room
        )
        nbytes *= chunk[axis]
        if chunk[axis] < stack[axis]:
            break
    return tuple(chunk)


def chunk_key(index: tuple[int, ...], chunk: tuple[int, ...], inner: int) -> str:
    """The file of a tensor: its chunk's number along every axis, `inner` uncut ones at the end."""
    cut = [i // size for i, size in zip(index, chunk, strict=True)]
    return ".".join(map(str, cut + [0] * inner))


def array_header(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> bytes:
    """The file `.zarray` of an array, chunked along its first axes only."""
    described = {
        "chunks": [*chunk, *shape[len(chunk) :]],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _ZARR[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }
    return json.dumps(described).encode()


def orbax_files(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bytes]:
    """What makes a folder of arrays a checkpoint of orbax, which restores it as a flat dict."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": shape,
            },
        }
        for name, shape in shapes.items()
    }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    # Without times, which would make two conversions of one source differ.
    whole = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}}
    whole |= {"init_timestamp_nsecs": None, "commit_timestamp_nsecs": None, "custom_metadata": {}}
    return {
        "_METADATA": json.dumps(metadata).encode(),
        "_CHECKPOINT_METADATA": json.dumps(whole).encode(),
    }


def stack_of(pieces: Iterable[Tensor]) -> tuple[int, ...]:
    """Layers and experts of a parameter, from the tensors it consists of."""
    return tuple(max(places) + 1 for places in zip(*(p.index for p in pieces), strict=True))


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Entry]:
    """Every tensor under its released name, scales and repeats included.

    Arrays that are missing, unknown or misshaped are so in the result too: `match` tells of them.

    Raises:
        UserError: a chunk is missing or truncated, or an array is not laid out as described above.
    """
    home = folder / WEIGHTS
    headers = sorted(home.glob("*/.zarray"))
    names = [path.parent.name for path in headers]
    arrays = dict(zip(names, each(_read_array, headers, home), strict=True))
    stored: dict[str, Entry] = {}
    known = set()
    repeated = []
    for tensor in tensors(config):
        if tensor.repeats:
            repeated.append(tensor)
            continue
        for name, path in ((tensor.name, tensor.path), _scale_names(tensor)):
            if path in arrays:
                known.add(path)
                shape = tensor.shape if path == tensor.path else None
                stored[name] = arrays[path].entry(tensor.index, shape)
    stored |= {t.name: stored[t.repeats] for t in repeated if t.repeats in stored}
    stored |= {path: array.entry(None, None) for path, array in arrays.items() if path not in known}
    return stored


def _scale_names(tensor: Tensor) -> tuple[str, str]:
    return f"{tensor.name}{SCALE}", f"{tensor.path}{SCALE}"


class _Array:
    """One array's header, and where in its chunks a tensor is."""

    def __init__(self, home: Path, shape: list[int], chunks: list[int], dtype: str) -> None:
        self.home = home
        self.dtype = dtype
        self._shape = tuple(shape)
        self._chunks = tuple(chunks)
        self._checked: dict[str, Path] = {}

    def entry(self, index: tuple[int, ...] | None, shape: tuple[int, ...] | None) -> Entry:
        """The tensor at `index`, in the file's `shape` if it has as many numbers.

        None for `index` is the whole of what nobody asked for: it has no place.
        """
        if index is None or len(index) > len(self._shape):
            return Entry(self.home, self.dtype, self._shape, 0)
        if self._chunks[len(index) :] != self._shape[len(index) :]:
            raise UserError(
                f"{self.home}: its chunks {list(self._chunks)} cut tensors that must lie in one "
                "piece; convert or copy the folder again"
            )
        inner, stack = self._shape[len(index) :], self._shape[: len(index)]
        if any(i >= size for i, size in zip(index, stack, strict=True)):
            return Entry(self.home, self.dtype, (), 0)  # which is misshaped
        chunk = self._chunks[: len(index)]
        file = self._file(chunk_key(index, chunk, len(inner)))
        nbytes = math.prod(inner) * DTYPES[self.dtype].itemsize
        here = [i % size for i, size in zip(index, chunk, strict=True)]
        number = int(np.ravel_multi_index(here, chunk)) if chunk else 0
        same = shape is not None and math.prod(shape) == math.prod(inner)
        return Entry(file, self.dtype, shape if same and shape else inner, number * nbytes)

    def _file(self, key: str) -> Path:
        if key not in self._checked:
            file = self.home / key
            expected = math.prod(self._chunks) * DTYPES[self.dtype].itemsize
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found} bytes, expected {expected}"
                raise UserError(f"{file}: {what}; convert or copy the folder again")
            self._checked[key] = file
        return self._checked[key]


def _read_array(file: Path) -> _Array:
    """The header of one array, checked before it is believed."""
    tree = read_json(file)
    shape, chunks = _sizes(tree.get("shape")), _sizes(tree.get("chunks"))
    names = [name for name, spelled in _ZARR.items() if spelled == tree.get("dtype")]
    plain = all(tree.get(key) is None for key in ("compressor", "filters"))
    if not (
        names
        and plain
        and tree.get("order") == "C"
        and 0 < len(shape) == len(chunks) <= MAX_RANK
        and all(size % cut == 0 for size, cut in zip(shape, chunks, strict=True))
    ):
        raise UserError(
            f"{file}: not an array as `dsjax convert` writes them: uncompressed, float32, float16, "
            "bfloat16 or float8_e4m3fn, its chunks dividing its shape"
        )
    return _Array(file.parent, shape, chunks, names[0])


def _sizes(value: Any) -> list[int]:
    """A list of positive numbers as it is; none of anything else."""
    good = isinstance(value, list) and all(type(size) is int and size > 0 for size in value)
    return value if good else []


def array_shapes(
    grouped: Mapping[str, list[Tensor]], quantized: set[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every array of a model, and of the scales of those in `quantized`."""
    for path, pieces in grouped.items():
        stack = stack_of(pieces)
        yield path, (*stack, *pieces[0].inner)
        if path in quantized and (scale := pieces[0].scale):
            yield f"{path}{SCALE}", (*stack, *scale[1])
