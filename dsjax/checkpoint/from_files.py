"""Loading files into a model, every weight straight to where it belongs.

Each device's slice of each parameter is put together from views of the files: a host reads only
what its devices hold, and beside the finished parameters it holds one more at a time. FP8 is held
as it is, its scales beside it, or widened on the way, slice by slice.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from dsjax.checkpoint.families import FP8, ROUTER_BIAS, Tensor
from dsjax.checkpoint.from_objects import fetch
from dsjax.checkpoint.safetensors import DTYPES, Stored, same_numbers
from dsjax.checkpoint.source import Source, open_source
from dsjax.checkpoint.streams import check_finite
from dsjax.errors import UserError
from dsjax.model.decoder import Decoder, assemble, prepare
from dsjax.model.fp8 import hold_in_fp8
from dsjax.model.layers import SCALE, BlockScale, variable_axes, variables
from dsjax.model.transformer import Transformer
from dsjax.numerics.fp8_host import E4M3, check_scales, dequantize_into
from dsjax.places import ObjectPath, as_path
from sharding.rules import Layout, use_layout

HELD = {name: DTYPES[name] for name in ("F32", "BF16", "F16")}
"""What any weight may be held and stored as; one with scales may be FP8, too."""

COMPUTED = {name: DTYPES[name] for name in ("F32", "BF16")}
"""What is computed in. float16 is not: these models' activations are larger than its 65,504."""

CACHE_LINE = 64


def load_files(folder: str | Path, dtype: Any = None, layout: Layout | None = None) -> Transformer:
    """The model of a Hugging Face folder, of weights that `dsjax convert` wrote, or of a GGUF file.

    What was passed over, put in or brought to another form is said on stderr, a line each.

    Args:
        folder: the folder, or the file.
        dtype: float32 or bfloat16, to cast all but the router biases, which are always float32.
            None keeps each weight as it is stored, and computes as the embedding is stored, in
            float32 where that is float16; FP8 is widened where it multiplies.
        layout: where the weights go; None puts them all on the default device.

    Raises:
        UserError: the config or a file is damaged; a tensor is missing, unknown, misshaped, not
            finite, or stored in a way that cannot be held; a repeat differs from what it repeats.
    """
    reading = _open(folder, dtype, layout)
    leaves = [reading.leaf(path, variable) for path, variable in variables(reading.abstract)]
    return jax.tree.unflatten(jax.tree.structure(reading.abstract), leaves)


def load_files_apart(
    folder: str | Path, dtype: Any = None, layout: Layout | None = None
) -> Decoder:
    """The same weights as a decoder holds them: beside it there is never more than one layer.

    A model of which half a device is full cannot be loaded as a whole and then be taken apart.
    """
    reading = _open(folder, dtype, layout)
    whole, c = reading.abstract, reading.config

    def part(name: str, layer: int | None = None) -> Any:
        module = getattr(whole, name)
        leaves = [
            reading.leaf(f"{name}.{path}", variable, layer) for path, variable in variables(module)
        ]
        return jax.tree.unflatten(jax.tree.structure(module), leaves)

    def layers(name: str, count: int) -> list[Any]:
        return [prepare(part(name, layer), whole.dtype) for layer in range(count)]

    with contextlib.nullcontext() if layout is None else use_layout(layout):
        blocks = layers("dense_layers", c.first_k_dense_replace)
        blocks += layers("moe_layers", c.num_moe_layers)
        mtp = None if whole.mtp is None else layers("mtp", 1)[0]
        head = None if whole.head is None else part("head").weight
        return assemble(c, whole.dtype, part("embed"), blocks, part("norm"), head, mtp)


def _open(folder: str | Path, dtype: Any, layout: Layout | None) -> _Reading:
    """What is in the files, checked as far as their headers tell; MTP's repeats compared."""
    wanted = None if dtype is None else jnp.dtype(dtype)
    if wanted is not None and wanted not in COMPUTED.values():
        raise UserError(f"dtype={wanted}: models compute in float32 or bfloat16; choose one")
    source = open_source(as_path(folder))
    for remark in source.remarks:
        print(f"{folder}: {remark}", file=sys.stderr)
    _check_dtypes(source.parts, source.stored)
    if not isinstance(source.folder, ObjectPath):  # there `fetch` compares what it fetches
        _check_repeats(source.parts, source.stored)
    return _Reading(source, wanted, layout)


class _Reading:
    """A model whose weights are still in files: leaf by leaf they come to their places."""

    def __init__(self, source: Source, wanted: np.dtype[Any] | None, layout: Layout | None):
        self.config = config = source.config
        self._source, self._layout = source, layout
        self._pieces: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in source.parts:
            self._pieces[tensor.path].append(tensor)
        self._dtypes = {
            path: _held_dtype(pieces, source.stored, wanted)
            for path, pieces in self._pieces.items()
            if path
        }
        embedded = self._dtypes["embed.weight"]
        computed = embedded if embedded in COMPUTED.values() else COMPUTED["F32"]
        self.abstract = jax.eval_shape(
            lambda key: Transformer(config, key, param_dtype=embedded, dtype=computed),
            jax.random.key(0),
        )
        fp8 = [path for path, dtype in self._dtypes.items() if dtype == DTYPES[FP8]]
        hold_in_fp8(self.abstract, fp8)
        self._fetched: Mapping[str, Stored] = source.stored

    def leaf(self, path: str, variable: Any, layer: int | None = None) -> jax.Array:
        """One variable of the abstract model; of a stack all layers, or one."""
        shape, axes = variable.shape, variable_axes(variable)
        scales = isinstance(variable, BlockScale)  # behind its weight, and fetched with it
        path = path.removesuffix(SCALE) if scales else path
        pieces = self._pieces[path]
        if layer is not None:
            shape, axes = shape[1:], axes[1:]
            pieces = [replace(t, index=t.index[1:]) for t in pieces if t.index[0] == layer]
        if self._layout is None:
            place: Sharding = SingleDeviceSharding(jax.devices()[0])
        else:
            place = self._layout.sharding(axes, shape)
        if scales:
            return _load(pieces, self._fetched, shape, variable.dtype, place, _read_scales)
        self._fetched = fetch(pieces, self._source, shape, place)
        return _load(pieces, self._fetched, shape, self._dtypes[path], place, _read_slice)


def _load(
    pieces: list[Tensor],
    stored: Mapping[str, Stored],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    place: Sharding,
    read_piece: Callable[..., None],
) -> jax.Array:
    """One variable, each device's slice read from the tensors that it crosses."""
    by_index = {tensor.index: tensor for tensor in pieces}
    stacked = len(pieces[0].index)

    def read(slices: tuple[slice, ...] | None) -> np.ndarray:
        assert slices is not None  # The signature of jax's callback allows it, jax never passes it.
        ranges = [range(size)[part] for part, size in zip(slices, shape, strict=True)]
        out = _empty(tuple(len(r) for r in ranges), dtype)
        for here in np.ndindex(out.shape[:stacked]):
            tensor = by_index[tuple(r[i] for r, i in zip(ranges, here, strict=False))]
            read_piece(out[here], tensor, stored, slices[stacked:])
        return out

    return jax.make_array_from_callback(shape, place, read)


def _read_slice(
    out: np.ndarray, tensor: Tensor, stored: Mapping[str, Stored], slices: tuple[slice, ...]
) -> None:
    """A slice of one tensor, cast or widened into `out` unless this is FP8 too."""
    entry = stored[tensor.name]
    where = f"{entry.file}: {tensor.name}"
    if out.dtype == E4M3:
        out[...] = entry.read().reshape(tensor.inner)[slices]
        check_finite(out, FP8, where, "fetch it again")
        return
    if entry.dtype == FP8 and tensor.scale:
        scales = stored[tensor.scale[0]].read()
        part = _widen(entry.read(), scales, tensor, slices, where, out.dtype)
    else:
        part = entry.read().reshape(tensor.inner)[slices]
    if not np.isfinite(part).all():
        raise UserError(f"{where} holds NaN or infinity; fetch it again")
    out[...] = part


def _read_scales(
    out: np.ndarray, tensor: Tensor, stored: Mapping[str, Stored], slices: tuple[slice, ...]
) -> None:
    """The scales of one tensor, all of which are on every device that has a part of it."""
    assert tensor.scale is not None  # What is held in FP8 has scales in the files.
    scales = stored[tensor.scale[0]].read()
    check_scales(scales, tensor.shape, f"{stored[tensor.name].file}: {tensor.name}")
    out[...] = scales[slices]


def _widen(
    values: np.ndarray,
    scales: np.ndarray,
    tensor: Tensor,
    slices: tuple[slice, ...],
    where: str,
    dtype: np.dtype[Any],
) -> np.ndarray:
    """The slice of a weight in FP8 and, where heads are merged in the file, of whole heads.

    Blocks are of the file's rows and columns, each of which may be several of our dimensions. Of
    them the first is cut before anything is widened, the others after.
    """
    inner, split = tensor.inner, _dimensions_of_rows(tensor)
    rows, columns = _merged(inner[:split], slices[0]), _merged(inner[split:], slices[split])
    wide = np.empty((len(rows), len(columns)), dtype)
    part = values[rows.start : rows.stop, columns.start : columns.stop]
    dequantize_into(wide, part, scales, where, (rows.start, columns.start))
    shape, rest = list(inner), list(slices)
    for first in (0, split):
        shape[first] = len(range(inner[first])[slices[first]])
        rest[first] = slice(None)
    return wide.reshape(shape)[tuple(rest)]


def _merged(sizes: tuple[int, ...], first: slice) -> range:
    """What a slice of the first of several dimensions is of all of them, as one."""
    width = math.prod(sizes[1:])
    cut = range(sizes[0])[first]
    return range(cut.start * width, cut.stop * width)


def _dimensions_of_rows(tensor: Tensor) -> int:
    """How many of our dimensions the file's rows are; the others are its columns."""
    return next(
        n for n in range(1, len(tensor.inner)) if math.prod(tensor.inner[:n]) == tensor.shape[0]
    )


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory that begins on a cache line, which a CPU device then takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _check_dtypes(parts: Iterable[Tensor], stored: Mapping[str, Stored]) -> None:
    for tensor in parts:
        entry = stored[tensor.name]
        if entry.dtype == FP8 and tensor.scale:
            scales = stored[tensor.scale[0]]
            if scales.dtype != "F32":
                raise UserError(
                    f"{scales.file}: {tensor.scale[0]} is stored as {scales.dtype}; expected F32"
                )
        elif entry.dtype not in HELD:
            raise UserError(
                f"{entry.file}: {tensor.name} is stored as {entry.dtype}; "
                f"expected {' or '.join(HELD)}"
            )


def _held_dtype(
    pieces: list[Tensor], stored: Mapping[str, Stored], wanted: np.dtype[Any] | None
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
    return DTYPES[next(iter(found))]


def _check_repeats(parts: Iterable[Tensor], stored: Mapping[str, Stored]) -> None:
    """MTP shares embedding and head: its copies in the files must be copies."""
    for tensor in parts:
        if tensor.repeats and not same_numbers(stored[tensor.name], stored[tensor.repeats]):
            raise UserError(
                f"{stored[tensor.name].file}: {tensor.name} differs from {tensor.repeats}, "
                "which the MTP layer shares; they must be the same"
            )
