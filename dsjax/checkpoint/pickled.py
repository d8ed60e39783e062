"""Weights that PyTorch pickled: `pytorch_model.bin`, shards of it, or one .pt or .pth file.

A pickle is a program. PyTorch's weights-only loader runs only the few operations that build
tensors, and is what reads it here, when the user has asked for that. Numbers stay in the file until
they are looked at.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.safetensors import DTYPES, INDEX, SINGLE, read_shards
from dsjax.errors import UserError, one_line
from dsjax.places import local_path
from dsjax.small_files import open_file

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
}

_RECOMPUTED = "rotary_emb.inv_freq"
"""The end of the name of a table that old versions of transformers saved with the weights."""


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as PyTorch stored it, its numbers in their own order."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    numbers: np.ndarray

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.numbers.itemsize

    def read(self) -> np.ndarray:
        """All of it, a view of the file."""
        return self.numbers.reshape(self.shape)

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Some of its numbers, in the file's order."""
        return self.numbers[begin:end]


def find_pickled(folder: Path) -> Path | None:
    """The pickle, or the index of several, that a released folder has in safetensors' place."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return None
    known = [folder / PICKLED_INDEX, folder / PICKLED]
    others = sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    found = [file for file in known if file.is_file()] + others[: len(others) == 1]
    return found[0] if found else None


def refuse_pickled(folder: Path, file: Path) -> None:
    """Say how a folder of pickles is read, to those who did not ask for it."""
    raise UserError(
        f"{folder}: its weights are pickles ({file.name}), and a pickle is a program; if you trust "
        f"who made it, make a folder without: dsjax convert {folder} NEW --allow-pickle"
    )


def read_pickled(folder: Path, file: Path) -> dict[str, PickledTensor]:
    """Every tensor of a folder, by what `find_pickled` found there.

    Raises:
        UserError: torch is missing; a file is damaged, is no dictionary of tensors, or wants more
            than to build them; index and files disagree.
    """
    local_path(folder, "a folder of pickles")
    if file.name == PICKLED_INDEX:
        return read_shards(folder, PICKLED_INDEX, _read_file)
    return _read_file(file)


def _read_file(file: Path) -> dict[str, PickledTensor]:
    torch = _torch()
    try:
        open_file(file).close()
        tree: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # torch and pickle raise nothing more precise
        raise UserError(
            f"{file}: not read by PyTorch's weights-only loader ({one_line(error)[:300]}); save a "
            "dictionary of tensors by torch.save, in its format since 1.6"
        ) from error
    if isinstance(tree, Mapping) and isinstance(tree.get("state_dict"), Mapping):
        tree = tree["state_dict"]  # as trainers save it, beside their own state
    if not isinstance(tree, Mapping) or not all(isinstance(name, str) for name in tree):
        raise UserError(f"{file}: holds {type(tree).__name__}; expected a dictionary of tensors")
    return {
        name: _tensor(value, file, name)
        for name, value in tree.items()
        if not name.endswith(_RECOMPUTED)
    }


def _torch() -> Any:
    """PyTorch, which nothing else here needs; where types are checked it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError("reading pickles needs torch: pip install 'dsjax[pickle]'") from None


def _tensor(value: Any, file: Path, name: str) -> PickledTensor:
    """A tensor's numbers as numpy sees them, which knows no bfloat16: by their bits."""
    torch = _torch()
    where = f"{file}: {one_line(name)}"
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{where} is {type(value).__name__}; expected a tensor")
    dtype = _NAMES.get(str(value.dtype))
    if dtype is None:
        raise UserError(f"{where} is {value.dtype}; expected one of {', '.join(_NAMES)}")
    if value.layout != torch.strided or not value.is_contiguous() or value.is_meta:
        raise UserError(f"{where} is not stored row by row; save it by .contiguous()")
    bits = value.detach().reshape(-1).view(torch.uint8).numpy()
    return PickledTensor(file, dtype, tuple(value.shape), bits.view(DTYPES[dtype]))
