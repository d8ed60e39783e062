"""The weights of a training run's checkpoint, tensor by tensor. Imports no jax.

A step's arrays are read with tensorstore, which orbax wrote them with. Of the optimizer and of
everything else that a step holds, nothing is touched.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import tensors
from dsjax.checkpoint.manifest import MANIFEST, DamagedError, read_manifest, verify
from dsjax.checkpoint.safetensors import InParts
from dsjax.checkpoint.steps_in_bucket import verify_step
from dsjax.errors import UserError, one_line
from dsjax.places import ObjectPath

logger = logging.getLogger(__name__)

CACHE_BYTES = 1 << 28
"""What is kept of chunks that were read; one that is larger is read again for each tensor in it."""

_PREFIX, _SUFFIX = "model.", ".value"
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class RunTensor(InParts):
    """One tensor of the released files within an array of the run; otherwise like an `Entry`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    array: Any

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end`, in the order of the released file."""
        part = self.array[self.index] if self.index else self.array
        row = math.prod(part.shape[1:])
        first = begin // row
        try:
            rows = part[first : -(-end // row)].read().result()
        except ValueError as error:  # what tensorstore makes of any damage
            raise UserError(f"{self.file}: cannot be read: {one_line(error)}") from None
        flat: np.ndarray = np.ascontiguousarray(rows).reshape(-1)
        return flat[begin - first * row : end - first * row]


def newest_step(folder: Path, *, check: bool = True) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The newest checkpoint whose every byte is what its manifest says, and its leaves.

    With `check` False the manifest alone is read, and must be sound.

    Raises:
        UserError: there is none; it says what is wrong with each.
    """
    home = folder / "checkpoints"
    steps = sorted(int(p.name) for p in home.iterdir() if re.fullmatch(r"\d{8,}", p.name))
    damages = []
    for step in reversed(steps):
        path = home / f"{step:08d}"
        if not (path / MANIFEST).is_file():
            damages.append(f"step {step} has no {MANIFEST}")
            continue
        try:
            leaves = _verify(path, step) if check else read_manifest(path)["leaves"]
        except DamagedError as damage:
            damages.append(f"step {step} is damaged: {damage}")
            continue
        for passed_over in damages:
            logger.warning("%s: %s", home, passed_over)
        return path, leaves
    why = "; ".join(damages) or "it has none yet; let it train longer"
    raise UserError(f"{folder}: no sound checkpoint ({why})")


def _verify(path: Path, step: int) -> dict[str, dict[str, Any]]:
    return verify_step(path, step) if isinstance(path, ObjectPath) else verify(path, step)


def read_run(folder: Path, config: ModelConfig, *, check: bool) -> dict[str, RunTensor]:
    """Every tensor of the newest sound checkpoint under its released name, repeats included."""
    step, leaves = newest_step(folder, check=check)
    context = _context()
    opened: dict[str, Any] = {}
    stored: dict[str, RunTensor] = {}
    for tensor in tensors(config):
        if tensor.repeats:
            if tensor.repeats in stored:
                stored[tensor.name] = stored[tensor.repeats]
            continue
        leaf = f"{_PREFIX}{tensor.path}{_SUFFIX}"
        if leaf not in leaves:
            continue
        if leaf not in opened:
            opened[leaf] = _open(step, leaf, leaves[leaf], context)
        array, shape = opened[leaf], tuple(leaves[leaf]["shape"])
        inner = shape[len(tensor.index) :]
        same = math.prod(inner) == tensor.size
        stored[tensor.name] = RunTensor(
            step / "state",
            _NAMES[leaves[leaf]["dtype"]],
            tensor.shape if same else inner,
            tensor.index,
            array,
        )
    return stored


def read_adapters(folder: Path, *, check: bool) -> dict[str, np.ndarray]:
    """Both factors of every adapter of the newest sound checkpoint, layers stacked, by its path."""
    step, leaves = newest_step(folder, check=check)
    context = _context()
    names = [name for name in leaves if name.startswith(_PREFIX) and ".adapter." in name]
    return {
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX): np.asarray(
            _open(step, name, leaves[name], context).read().result()
        )
        for name in names
    }


def _context() -> Any:
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _open(step: Path, leaf: str, described: dict[str, Any], context: Any) -> Any:
    """The stored array, which must be what the manifest says of it."""
    state = (step / "state").absolute()
    if isinstance(state, ObjectPath):
        bucket, _, name = state.key.partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    else:
        base = {"driver": "file", "path": f"{state}/"}
    store = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{leaf}/"},
    }
    try:
        array = ts.open(store, context=context, open=True, read=True).result()
    except ValueError as error:  # what tensorstore makes of any damage
        raise UserError(f"{step}: {leaf} cannot be read: {one_line(error)}") from None
    found = list(array.shape), array.dtype.name
    if found != (described["shape"], described["dtype"]) or found[1] not in _NAMES:
        raise UserError(
            f"{step}: {leaf} is {found[1]} of shape {found[0]}, {MANIFEST} says "
            f"{described['dtype']} of {described['shape']}; expected both the same, of "
            f"{', '.join(_NAMES)}"
        )
    return array
