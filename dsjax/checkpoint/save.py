"""`dsjax.save`: a model in memory, written the way a conversion is."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax

from dsjax.checkpoint.conversion import DSJAX, FORMATS, make_plan
from dsjax.checkpoint.convert import check_free, write_plan
from dsjax.checkpoint.families import tensors
from dsjax.checkpoint.safetensors import DTYPES, InParts
from dsjax.checkpoint.source import Source
from dsjax.errors import UserError
from dsjax.model.layers import SCALE, variables
from dsjax.model.transformer import Transformer
from dsjax.places import as_path

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(model: Transformer, path: str | Path, format: str = DSJAX) -> None:
    """Write a model's weights and configuration, in the dtypes that they are held in.

    Args:
        model: on one device, or spread over the devices of this process.
        path: a folder that is not there yet. It is written beside, and renamed when it is whole.
        format: "hf" for a Hugging Face folder, "dsjax" for what orbax reads.

    Raises:
        UserError: the format is unknown, the folder exists or cannot be written, or a weight is not
            finite.
    """
    folder = as_path(path)
    if format not in FORMATS:
        raise UserError(f"format {format!r}; expected one of {', '.join(FORMATS)}")
    check_free(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    config, parts = model.config, list(tensors(model.config))
    arrays = {name: variable[...] for name, variable in variables(model)}
    if not all(array.is_fully_addressable for array in arrays.values()):
        raise UserError(f"{folder}: the model is spread over other processes; save it from one")
    stored = {t.name: _Held(arrays[t.path], t.index, t.shape) for t in parts if not t.repeats}
    for tensor in parts:
        if tensor.scale and (scales := arrays.get(f"{tensor.path}{SCALE}")) is not None:
            stored[tensor.scale[0]] = _Held(scales, tensor.index, tensor.scale[1])
    stored |= {t.name: stored[t.repeats] for t in parts if t.repeats}
    source = Source(folder, DSJAX, config, config, stored, parts, {})
    # No other save goes on where this one was stopped: the model may have changed.
    identity = {"options": "dsjax.save", "described": secrets.token_hex(16)}
    write_plan(make_plan(source, format, None), folder, identity)


@dataclass(frozen=True)
class _Held(InParts):
    """One tensor of the released files within an array of a model; see `safetensors.Stored`."""

    array: jax.Array
    index: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """For messages."""
        return Path("the model")

    @property
    def dtype(self) -> str:
        """By the name that safetensors has for it."""
        return _NAMES[np.dtype(self.array.dtype)]

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end`, in the released file's order; only their rows leave the device.

        Rows of the array, which may have more dimensions than the file's tensor.
        """
        inner = self.array.shape[len(self.index) :]
        row = math.prod(inner[1:])
        first, last = begin // row, -(-end // row)
        starts = (*self.index, first, *(0 for _ in inner[1:]))
        sizes = (*(1 for _ in self.index), last - first, *inner[1:])
        flat = np.asarray(_cut(self.array, starts, sizes)).reshape(-1)
        return flat[begin - first * row : end - first * row]


@partial(jax.jit, static_argnums=2)
def _cut(array: jax.Array, starts: tuple[Any, ...], sizes: tuple[int, ...]) -> jax.Array:
    """One program for a size, wherever the part begins."""
    return lax.dynamic_slice(array, starts, sizes)
