"""Loading a Hugging Face folder into a model, every weight straight to where it belongs.

Each device's slice of each parameter is put together from views of the files: a host reads only
what its devices hold, and beside the finished parameters it holds one more at a time.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from dsjax.checkpoint.families import FP8, ROUTER_BIAS, Tensor, match, without_absent_mtp
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.safetensors import DTYPES, Entry, read_folder
from dsjax.errors import UserError
from dsjax.model.layers import variable_axes, variables
from dsjax.model.transformer import Transformer
from sharding.rules import Layout

__all__ = ["load_huggingface", "read_config"]

HELD = {name: DTYPES[name] for name in ("F32", "BF16")}
"""What a weight may be stored and held as."""

CACHE_LINE = 64
CHUNK_BYTES = 1 << 24


def load_huggingface(
    folder: str | Path, dtype: Any = None, layout: Layout | None = None
) -> Transformer:
    """The model of a folder with `config.json` and safetensors.

    A folder whose config promises MTP layers but which holds no tensor of theirs loads without,
    and says so on stderr.

    Args:
        folder: the folder.
        dtype: float32 or bfloat16, to cast all but the router biases, which are always float32.
            None keeps each weight as it is stored, and computes as the embedding is stored.
        layout: where the weights go; None puts them all on the default device.

    Raises:
        UserError: the config or a file is damaged; a tensor is missing, unknown, misshaped, not
            finite, or stored in a way that cannot be held; a repeat differs from what it repeats.
    """
    folder = Path(folder)
    wanted = None if dtype is None else jnp.dtype(dtype)
    if wanted is not None and wanted not in HELD.values():
        raise UserError(f"dtype={wanted}: weights are held as float32 or bfloat16; choose one")
    promised, stored = read_config(folder), read_folder(folder)
    config = without_absent_mtp(promised, stored)
    if config != promised:
        print(f"{folder}: holds no MTP weights; the model is loaded without", file=sys.stderr)
    parts = match(config, stored, folder)
    _check_dtypes(parts, stored)
    _check_repeats(parts, stored)

    pieces: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in parts:
        pieces[tensor.path].append(tensor)
    dtypes = {path: _held_dtype(pieces[path], stored, wanted) for path in pieces if path}
    computed = dtypes["embed.weight"]
    abstract = jax.eval_shape(
        lambda key: Transformer(config, key, param_dtype=computed), jax.random.key(0)
    )
    leaves = []
    for path, variable in variables(abstract):
        place = _place(variable, layout)
        leaves.append(_load(pieces[path], stored, variable.shape, dtypes[path], place))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _place(variable: Any, layout: Layout | None) -> Sharding:
    if layout is None:
        return SingleDeviceSharding(jax.devices()[0])
    return layout.sharding(variable_axes(variable), variable.shape)


def _load(
    pieces: list[Tensor],
    stored: Mapping[str, Entry],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    place: Sharding,
) -> jax.Array:
    """One parameter, each device's slice read from the tensors that it crosses."""
    names = {tensor.index: tensor.name for tensor in pieces}
    inner = pieces[0].inner
    stacked = len(shape) - len(inner)

    def read(slices: tuple[slice, ...] | None) -> np.ndarray:
        assert slices is not None  # The signature of jax's callback allows it, jax never passes it.
        ranges = [range(size)[part] for part, size in zip(slices, shape, strict=True)]
        out = _empty(tuple(len(r) for r in ranges), dtype)
        for here in np.ndindex(out.shape[:stacked]):
            name = names[tuple(r[i] for r, i in zip(ranges, here, strict=False))]
            part = stored[name].read().reshape(inner)[slices[stacked:]]
            if not np.isfinite(part).all():
                raise UserError(
                    f"{stored[name].file}: {name} holds NaN or infinity; fetch it again"
                )
            out[here] = part
        return out

    return jax.make_array_from_callback(shape, place, read)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory that begins on a cache line, which a CPU device then takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _check_dtypes(parts: Iterable[Tensor], stored: Mapping[str, Entry]) -> None:
    for tensor in parts:
        entry = stored[tensor.name]
        if entry.dtype == FP8:
            raise UserError(
                f"{entry.file}: {tensor.name} is stored as {FP8}; FP8 weights are not supported "
                "yet: convert the folder to BF16 first"
            )
        if entry.dtype not in HELD:
            raise UserError(
                f"{entry.file}: {tensor.name} is stored as {entry.dtype}; "
                f"expected {' or '.join(HELD)}"
            )


def _held_dtype(
    pieces: list[Tensor], stored: Mapping[str, Entry], wanted: np.dtype[Any] | None
) -> np.dtype[Any]:
    """What one parameter is held as."""
    if pieces[0].kind == ROUTER_BIAS:
        return HELD["F32"]
    if wanted is not None:
        return wanted
    found = {stored[tensor.name].dtype: tensor.name for tensor in pieces}
    if len(found) > 1:
        both = " and ".join(f"{name} as {dtype}" for dtype, name in found.items())
        where = stored[pieces[0].name].file.parent
        raise UserError(f"{where}: stored in two ways: {both}; choose one by dtype=")
    return HELD[next(iter(found))]


def _check_repeats(parts: Iterable[Tensor], stored: Mapping[str, Entry]) -> None:
    """MTP shares embedding and head: its copies in the files must be copies."""
    for tensor in parts:
        if tensor.repeats and not _same_bytes(stored[tensor.name], stored[tensor.repeats]):
            raise UserError(
                f"{stored[tensor.name].file}: {tensor.name} differs from {tensor.repeats}, "
                "which the MTP layer shares; they must be the same"
            )


def _same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors are equal bit by bit, compared a chunk at a time."""
    if one.dtype != other.dtype:
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        chunks = range(0, one.nbytes, CHUNK_BYTES)
        sizes = (min(CHUNK_BYTES, one.nbytes - begin) for begin in chunks)
        return all(a.read(size) == b.read(size) for size in sizes)
